"""Triton's interpreter: kernels without a GPU, to test with. Asked for by TRITON_INTERPRET=1."""

from __future__ import annotations

import functools
import os
from typing import Any

import torch

E4M3 = torch.float8_e4m3fn
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def mend() -> None:
    """Triton 3.9 makes integers of a comparison of scalars, and takes only bools as masks; it does
    not round to bfloat16 and e4m3 as a GPU does; and numpy's product gives a row other bits at
    another place of a tile, which on a GPU it does not.

    To be called before a kernel runs, once or more; does nothing where nothing is interpreted.
    """
    if not INTERPRETED:
        return
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    builder: Any = interpreter.InterpreterBuilder
    splat = builder.create_splat

    def create_splat(self: Any, kind: Any, scalar: Any) -> Any:
        handle = splat(self, kind, scalar)
        if scalar.data.dtype == bool:
            handle.data = handle.data.astype(bool)
        return handle

    convert = interpreter._convert_float
    rounded = {tl.bfloat16: (torch.bfloat16, torch.int16), tl.float8e4nv: (E4M3, torch.uint8)}

    def convert_float(data: Any, kind: Any, target: Any, mode: Any) -> Any:
        if kind != tl.float32 or target not in rounded:
            return convert(data, kind, target, mode)
        dtype, word = rounded[target]
        bits = torch.from_numpy(np.array(data)).to(dtype).view(word).numpy()
        return bits.view(f"uint{8 * bits.itemsize}")

    dot = builder.create_dot

    def create_dot(self: Any, a: Any, b: Any, d: Any, precision: Any, most: Any) -> Any:
        if not a.data.dtype == b.data.dtype == d.data.dtype == np.float32 or a.data.ndim != 2:
            return dot(self, a, b, d, precision, most)
        total = (a.data[:, :, None] * b.data[None]).sum(1)  # from the first to the last
        return interpreter.TensorHandle(total + d.data, d.dtype.scalar)

    builder.create_dot = create_dot
    builder.create_splat = create_splat
    interpreter._convert_float = convert_float
