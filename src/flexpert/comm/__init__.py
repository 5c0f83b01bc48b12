"""Elastic dispatch/combine between expert-parallel ranks; usable without the rest of flexpert."""

from flexpert.comm.buffer import Buffer, BufferSpec, ExpertTable, Received, Reduce, make_buffer
from flexpert.comm.errors import (
    CommError,
    Interrupted,
    PeerUnreachable,
    RankTimeout,
    StaleEpoch,
)

__all__ = [
    "Buffer",
    "BufferSpec",
    "CommError",
    "ExpertTable",
    "Interrupted",
    "PeerUnreachable",
    "RankTimeout",
    "Received",
    "Reduce",
    "StaleEpoch",
    "make_buffer",
]
