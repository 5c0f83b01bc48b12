"""torch's kernels for the meta device that are written in Python.

To import them takes time and 18 MiB, and most models are built and walked without one of them. So
a fork server leaves them out of its import of torch, and they are imported where one is missed.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TypeVar

Made = TypeVar("Made")


def with_meta_kernels(make: Callable[[], Made]) -> Made:
    """What `make` returns; it is called again if it misses a kernel, when all are there.

    Raises: NotImplementedError: torch has no such kernel; whatever `make` raises.
    """
    try:
        return make()
    except NotImplementedError:
        load_meta_kernels()
        return make()


def load_meta_kernels() -> None:
    """Does nothing if they are there already."""
    kernels = importlib.import_module("torch._meta_registrations")
    getattr(kernels, "register_meta", None)  # what was left out comes when it is asked for
