"""The process that owns the host's copy of the experts and fills it, giving way to all others."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from typing import Protocol

import msgspec

from flexpert.cluster.processes.child_connection import Connection, ConnectionEnded
from flexpert.cluster.processes.expert_cache_messages import (
    CacheFailed,
    CacheFilled,
    CacheOpened,
    CacheSpec,
    encode,
)
from flexpert.errors import FlexpertError
from flexpert.kernels.experts import ExpertShape
from flexpert.models.source import ModelInfo
from flexpert.moe.expert_cache import ExpertCache
from flexpert.moe.expert_store import ExpertFiles, Key
from flexpert.parallel import run_parallel

_NICENESS = 10
_THREADS = 4


class CachedModel(ExpertFiles, Protocol):
    """What it needs of a model."""

    @property
    def info(self) -> ModelInfo: ...
    def expert_shapes(self) -> list[ExpertShape]: ...


def expert_cache_main(spec: bytes, end: socket.socket, source: CachedModel) -> int:
    """Keep the copy until the head closes the connection. spec: `CacheSpec`."""
    most_bytes = msgspec.msgpack.decode(spec, type=CacheSpec).most_bytes
    os.nice(_NICENESS)
    connection = Connection(end)
    try:
        cache = ExpertCache(source.expert_shapes(), source.info.experts, most_bytes)
    except OSError as error:
        connection.send(encode(CacheFailed(str(error))))
        return 1
    with contextlib.suppress(ConnectionEnded):
        connection.send(encode(CacheOpened(cache.address, cache.nbytes)))
        threading.Thread(target=_fill, args=(cache, source, connection), daemon=True).start()
        while True:
            connection.receive()
    os._exit(0)  # in the middle of a read, perhaps


def _fill(cache: ExpertCache, source: CachedModel, connection: Connection) -> None:
    def read(key: Key) -> None:
        cache.fill(source, key)

    with contextlib.suppress(ConnectionEnded):
        try:
            run_parallel(cache.keys, read, _THREADS)
        except (FlexpertError, OSError, MemoryError, RuntimeError) as error:
            connection.send(encode(CacheFailed(str(error))))
        else:
            connection.send(encode(CacheFilled(len(cache.keys))))
