"""Over which interfaces and ports a rank reaches those of other hosts.

NIXL moves the bytes with UCX, which reads both from the environment when an endpoint is made. Left
alone, UCX takes every interface that is up, and listens on a port that the system gives it.
"""

from __future__ import annotations

import os
import socket
from collections.abc import MutableMapping
from pathlib import Path

from flexpert.config import EngineConfig
from flexpert.errors import ConfigError

_RDMA = Path("/sys/class/infiniband")


def interfaces() -> list[str]:
    """The names of this host's network interfaces and RDMA devices."""
    try:
        rdma = sorted(device.name for device in _RDMA.iterdir())
    except OSError:
        rdma = []
    return [name for _, name in socket.if_nameindex()] + rdma


def check_network(config: EngineConfig) -> None:
    """Raises: ConfigError: this host has no such interface."""
    there = interfaces()
    for name in _chosen(config):
        if name.partition(":")[0] not in there:  # of an RDMA device, the port follows
            raise ConfigError(
                f"there is no network interface {name!r} here (--interface); there are "
                f"{', '.join(there)}"
            )


def choose_network(
    config: EngineConfig, environment: MutableMapping[str, str] = os.environ
) -> None:
    """For endpoints that are made from now on. What is not set stays as the environment says."""
    if names := _chosen(config):
        environment["UCX_NET_DEVICES"] = ",".join(names)
    if config.port_range:
        environment["UCX_TCP_PORT_RANGE"] = config.port_range


def _chosen(config: EngineConfig) -> list[str]:
    names = (name.strip() for name in config.interface.split(","))
    return [name for name in names if name]
