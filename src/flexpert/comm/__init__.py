"""Elastic dispatch/combine between expert-parallel ranks; usable without the rest of flexpert."""

from flexpert.comm.buffer import (
    Buffer,
    BufferSpec,
    ExpertTable,
    Loss,
    Pending,
    Received,
    Reduce,
    Statistics,
    make_buffer,
)
from flexpert.comm.errors import (
    CommError,
    Evicted,
    Interrupted,
    PeerUnreachable,
    RankLost,
    RankTimeout,
    StaleEpoch,
)

__all__ = [
    "Buffer",
    "BufferSpec",
    "CommError",
    "Evicted",
    "ExpertTable",
    "Interrupted",
    "Loss",
    "PeerUnreachable",
    "Pending",
    "RankLost",
    "RankTimeout",
    "Received",
    "Reduce",
    "StaleEpoch",
    "Statistics",
    "make_buffer",
]
