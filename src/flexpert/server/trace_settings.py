"""Whether traces can be sent, before anything of OpenTelemetry is imported; and their key."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

from flexpert.config import ServerConfig
from flexpert.errors import ConfigError

# Key in the ASGI scope: the `RequestTrace` of a request that is traced.
TRACE = "flexpert.trace"

_PACKAGES = ("opentelemetry-sdk", "opentelemetry-exporter-otlp-proto-http")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")


def check_tracing(config: ServerConfig, environment: Mapping[str, str] | None = None) -> None:
    """Raises: ConfigError: the settings ask for traces that could not be sent."""
    if config.otlp_traces_endpoint is None:
        return
    for package in _PACKAGES:
        try:
            version(package)
        except PackageNotFoundError:
            raise ConfigError(
                f"--otlp-traces-endpoint needs {package}: pip install 'flexpert[otel]'"
            ) from None
    given = os.environ if environment is None else environment
    for name in _PROTOCOLS:
        protocol = given.get(name, "").strip()
        if protocol:
            if protocol != "http/protobuf":
                raise ConfigError(
                    f"{name}={protocol}: traces are sent by http/protobuf; set it to that, or "
                    "unset it, and name the collector's port for HTTP, usually 4318"
                )
            return
