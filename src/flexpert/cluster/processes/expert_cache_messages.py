"""What the head and the process of the experts' copy say to each other."""

from __future__ import annotations

import msgspec

ENTRY = "flexpert.cluster.processes.expert_cache_process:expert_cache_main"


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
