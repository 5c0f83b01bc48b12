"""Our buffer behind the interfaces of others; `compat.nixl_ep` is NVIDIA's nixl_ep."""

from __future__ import annotations

import importlib
import sys

_NAMES = ("nixl_ep", "nixl_ep.buffer", "nixl_ep.utils")


def install_nixl_ep() -> None:
    """Make `import nixl_ep`, `nixl_ep.buffer` and `nixl_ep.utils` find `flexpert.compat.nixl_ep`.

    Call it before anything imports nixl_ep; calling it again does nothing.

    Raises: RuntimeError: another nixl_ep has been imported already.
    """
    for name in _NAMES:
        ours = importlib.import_module(f"{__name__}.{name}")
        there = sys.modules.get(name)
        if there is not None and there is not ours:
            raise RuntimeError(
                f"{name} was imported already, from {getattr(there, '__file__', None)}; call "
                "flexpert.compat.install_nixl_ep() first thing in the program"
            )
    for name in _NAMES:
        sys.modules[name] = importlib.import_module(f"{__name__}.{name}")
