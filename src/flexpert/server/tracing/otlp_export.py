"""Spans on their way to a collector: the SDK's batch processor, bounded at the end, and quiet.

Everything else about the export is the SDK's: `OTEL_EXPORTER_OTLP_HEADERS`, `_CERTIFICATE`,
`_TIMEOUT` and `_COMPRESSION`, `OTEL_TRACES_SAMPLER`, `OTEL_BSP_*`, `OTEL_RESOURCE_ATTRIBUTES`.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from urllib.parse import urlsplit

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

import flexpert
from flexpert.errors import ConfigError

log = logging.getLogger("flexpert.server")

FLUSH_S = 2.0  # for what has not been sent when the service ends


class OtlpExport:
    """Sends the spans of `provider`; ended by `close`. url: with a path.

    Raises: ConfigError: the environment has settings that the SDK does not take.
    """

    def __init__(self, url: str) -> None:
        self._complaints = _Complaints()
        try:
            exporter = _ToldExporter(OTLPSpanExporter(url), _shown(url), self._complaints)
            self.provider = TracerProvider(resource=_resource(), shutdown_on_exit=False)
            self.provider.add_span_processor(BatchSpanProcessor(exporter))
        except (ValueError, OSError) as error:
            self._complaints.close()
            raise ConfigError(f"--otlp-traces-endpoint: {error}") from None

    def close(self, limit_s: float = FLUSH_S) -> None:
        """What has not been sent is sent, as far as there is time for it."""
        ending = threading.Thread(target=self.provider.shutdown, daemon=True)
        ending.start()
        ending.join(limit_s)
        if not ending.is_alive():  # else it goes on until the process ends, and complains
            self._complaints.close()


class _Complaints(logging.Handler):
    """Takes what the SDK logs, and logs each text once. What its exporter says is not logged: who
    tells that batches do not arrive has the first of it, which is nearest to the cause."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.first = ""
        self._said: set[str] = set()
        self._logger = logging.getLogger("opentelemetry")
        self._propagated = self._logger.propagate
        self._logger.propagate = False
        self._logger.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        text = str(record.msg)
        if record.name.startswith("opentelemetry.exporter"):
            self.first = self.first or record.getMessage()
        elif text not in self._said:
            self._said.add(text)
            log.log(record.levelno, "traces: %s", record.getMessage())

    def close(self) -> None:
        self._logger.removeHandler(self)
        self._logger.propagate = self._propagated
        super().close()


class _ToldExporter(SpanExporter):
    """Says once that batches do not arrive, and when they do again."""

    def __init__(self, exporter: SpanExporter, where: str, complaints: _Complaints) -> None:
        self._exporter = exporter
        self._where = where
        self._complaints = complaints
        self._fails = False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self._complaints.first = ""
        result = self._exporter.export(spans)
        failed = result is not SpanExportResult.SUCCESS
        if failed and not self._fails:
            why = self._complaints.first or "no reason is known"
            log.warning(
                "traces do not reach %s and are dropped until they do: %s", self._where, why
            )
        elif self._fails and not failed:
            log.info("traces reach %s again", self._where)
        self._fails = failed
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        return self._exporter.force_flush(timeout_millis)


def _resource() -> Resource:
    """Named by the environment, else after us."""
    found = Resource.create({"service.version": flexpert.__version__})
    if str(found.attributes.get(SERVICE_NAME, "")).startswith("unknown_service"):
        return found.merge(Resource({SERVICE_NAME: "flexpert"}))
    return found


def _shown(url: str) -> str:
    """Without a password that it may hold."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
