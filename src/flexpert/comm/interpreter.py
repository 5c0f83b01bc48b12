"""Triton's interpreter: kernels without a GPU, to test with. Asked for by TRITON_INTERPRET=1."""

from __future__ import annotations

import functools
import os
from typing import Any

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def mend() -> None:
    """Triton 3.9 makes integers of a comparison of scalars, and takes only bools as masks.

    To be called before a kernel runs, once or more; does nothing where nothing is interpreted.
    """
    if not INTERPRETED:
        return
    from triton.runtime import interpreter

    builder: Any = interpreter.InterpreterBuilder
    splat = builder.create_splat

    def create_splat(self: Any, kind: Any, scalar: Any) -> Any:
        handle = splat(self, kind, scalar)
        if scalar.data.dtype == bool:
            handle.data = handle.data.astype(bool)
        return handle

    builder.create_splat = create_splat
