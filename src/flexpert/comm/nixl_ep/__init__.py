"""Between flexpert and NVIDIA's nixl_ep: our buffer behind their interface, see `compat`."""

from __future__ import annotations

import importlib
import sys

_NAMES = ("nixl_ep", "nixl_ep.buffer", "nixl_ep.utils")


def install() -> None:
    """Make `import nixl_ep`, `nixl_ep.buffer` and `nixl_ep.utils` find `compat`.

    Call it before anything imports nixl_ep; calling it again does nothing.

    Raises: RuntimeError: another nixl_ep has been imported already.
    """
    for name in _NAMES:
        ours = importlib.import_module(__name__ + ".compat" + name.removeprefix("nixl_ep"))
        there = sys.modules.get(name)
        if there is not None and there is not ours:
            raise RuntimeError(
                f"{name} was imported already, from {getattr(there, '__file__', None)}; call "
                "flexpert.comm.nixl_ep.install() first thing in the program"
            )
    for name in _NAMES:
        sys.modules[name] = importlib.import_module(
            __name__ + ".compat" + name.removeprefix("nixl_ep")
        )
