"""The process that owns the host's copy of the experts and fills it, giving way to all others."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from typing import Protocol

import msgspec

from flexpert.cluster.processes.child_connection import Connection, ConnectionEnded
from flexpert.errors import FlexpertError
from flexpert.kernels.experts import ExpertShape
from flexpert.models.source import ModelInfo
from flexpert.moe.expert_cache import ExpertCache
from flexpert.moe.expert_store import ExpertFiles, Key
from flexpert.parallel import run_parallel

ENTRY = f"{__name__}:expert_cache_main"

_NICENESS = 10
_THREADS = 4


class CacheSpec(msgspec.Struct, frozen=True):
    """most_bytes: of memory for experts."""

    most_bytes: int


class CacheOpened(msgspec.Struct, frozen=True, tag="opened"):
    """It can be read, and holds nothing yet. nbytes: of the experts it will hold."""

    address: bytes
    nbytes: int


class CacheFilled(msgspec.Struct, frozen=True, tag="filled"):
    """It holds all it will. experts: how many."""

    experts: int


class CacheFailed(msgspec.Struct, frozen=True, tag="failed"):
    """It holds no more than it does."""

    error: str


CacheReport = CacheOpened | CacheFilled | CacheFailed

encode = msgspec.msgpack.encode
decode_report = msgspec.msgpack.Decoder(CacheReport).decode


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
        except (FlexpertError, OSError, MemoryError) as error:
            connection.send(encode(CacheFailed(str(error))))
        else:
            connection.send(encode(CacheFilled(len(cache.keys))))
