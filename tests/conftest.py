"""For all tests: without a GPU, Triton's kernels run in its interpreter."""

import os
from typing import Any

import torch


def _interpret() -> None:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is first imported
    try:
        from triton.runtime import interpreter
    except ImportError:
        return  # tests that need it say so
    builder: Any = interpreter.InterpreterBuilder
    splat = builder.create_splat

    def create_splat(self: Any, kind: Any, scalar: Any) -> Any:
        """Triton 3.9 makes integers of a comparison of scalars, and takes only bools as masks."""
        handle = splat(self, kind, scalar)
        if scalar.data.dtype == bool:
            handle.data = handle.data.astype(bool)
        return handle

    builder.create_splat = create_splat


if not torch.cuda.is_available():
    _interpret()
