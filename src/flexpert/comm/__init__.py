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
from flexpert.comm.lent import Borrowed, Borrowing, Lending, Lent, borrow, lend, lend_pages

__all__ = [
    "Borrowed",
    "Borrowing",
    "Buffer",
    "BufferSpec",
    "ChannelDown",
    "CommError",
    "Evicted",
    "ExpertTable",
    "Interrupted",
    "Lending",
    "Lent",
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
    "borrow",
    "lend",
    "lend_pages",
    "make_buffer",
]
