"""Elastic dispatch/combine between expert-parallel ranks; usable without the rest of flexpert."""

from flexpert.comm.agreement import View, agree, asked
from flexpert.comm.buffer import (
    Buffer,
    BufferSpec,
    ExpertTable,
    MissingResults,
    Pending,
    Received,
    Reduce,
    Statistics,
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
from flexpert.comm.factory import make_buffer
from flexpert.comm.peer_memory import (
    ExportedMemory,
    ExportedPages,
    ImportedMemory,
    ImportedPages,
    export_memory,
    export_pages,
    import_memory,
)

__all__ = [
    "Buffer",
    "BufferSpec",
    "ChannelDown",
    "CommError",
    "Evicted",
    "ExpertTable",
    "ExportedMemory",
    "ExportedPages",
    "ImportedMemory",
    "ImportedPages",
    "Interrupted",
    "MissingResults",
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
    "export_memory",
    "export_pages",
    "import_memory",
    "make_buffer",
]
