"""Elastic dispatch/combine between expert-parallel ranks; usable without the rest of flexpert.

Here is what every user of a buffer needs. The rest is imported from where it is defined:

buffer        the contract, and what belongs to it: `Capabilities`, `Pending`, `Statistics`
errors        all that an exchange can fail with
agreement     survivors without a coordinator agree on who is up
peer_memory   memory that peers may read
quant         FP8 rows and their scales
manager       one buffer for all layers of a process
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flexpert.comm.buffer import Buffer, BufferSpec, ExpertTable, MissingResults, Received
    from flexpert.comm.errors import (
        CommError,
        Interrupted,
        PeerUnreachable,
        RankLost,
        RankTimeout,
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
    "make_buffer",
]

_MODULES = {
    "Buffer": "buffer",
    "BufferSpec": "buffer",
    "ExpertTable": "buffer",
    "MissingResults": "buffer",
    "Received": "buffer",
    "make_buffer": "factory",
}


def __getattr__(name: str) -> Any:
    """On first use: torch comes with most of them, and not all who use errors have it."""
    if name not in __all__:
        raise AttributeError(f"module 'flexpert.comm' has no attribute {name!r}")
    module = import_module(f"flexpert.comm.{_MODULES.get(name, 'errors')}")
    return globals().setdefault(name, getattr(module, name))
