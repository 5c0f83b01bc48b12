"""Elastic dispatch/combine between expert-parallel ranks; usable without the rest of flexpert."""

from flexpert.comm.agree import View, agree, asked
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
    ChannelDown,
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
    "ChannelDown",
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
    "View",
    "agree",
    "asked",
    "make_buffer",
]
