"""Elastic dispatch/combine between expert-parallel ranks; usable without the rest of flexpert.

Further modules: `agreement`, survivors that come to one view of who is up; `peer_memory`, memory
that peers may read; `manager`, one buffer for a whole process.
"""

from flexpert.comm.buffer import Buffer, BufferSpec, ExpertTable, MissingResults, Received
from flexpert.comm.errors import (
    CommError,
    Interrupted,
    PeerUnreachable,
    RankLost,
    RankTimeout,
    StaleEpoch,
)
from flexpert.comm.factory import make_buffer

__all__ = [
    "Buffer",
    "BufferSpec",
    "CommError",
    "ExpertTable",
    "Interrupted",
    "MissingResults",
    "PeerUnreachable",
    "RankLost",
    "RankTimeout",
    "Received",
    "StaleEpoch",
    "make_buffer",
]
