"""Triton's interpreter: kernels without a GPU, to test with. Asked for by TRITON_INTERPRET=1."""

from __future__ import annotations

import functools
import operator
import os
from types import FunctionType, SimpleNamespace
from typing import Any

import torch

E4M3 = torch.float8_e4m3fn
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def mend() -> None:
    """Triton 3.9 makes integers of a comparison of scalars, and takes only bools as masks; it does
    not round to bfloat16 and e4m3 as a GPU does, and multiplies the words of bfloat16 as if they
    were integers; and numpy's product gives a row other bits at another place of a tile, which on a
    GPU it does not. It also takes most of its time for what it has done before, see `_hasten`.

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

    def widened(factor: Any) -> Any:
        if factor.dtype.scalar != tl.bfloat16:
            return factor
        words = factor.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(words.view(np.float32), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, d: Any, precision: Any, most: Any) -> Any:
        a, b = widened(a), widened(b)
        if not a.data.dtype == b.data.dtype == d.data.dtype == np.float32 or a.data.ndim != 2:
            return dot(self, a, b, d, precision, most)
        total = (a.data[:, :, None] * b.data[None]).sum(1)  # from the first to the last
        return interpreter.TensorHandle(total + d.data, d.dtype.scalar)

    builder.create_dot = create_dot
    builder.create_splat = create_splat
    interpreter._convert_float = convert_float
    _hasten(interpreter)


def _hasten(interpreter: Any) -> None:
    """What Triton's interpreter does again and again is done once, or by numpy.

    It replaces the functions of its language at each launch, and looks for them anew whenever a
    kernel calls a function; makes a table of dtypes to look one up, and the text of a block's type
    for each value; and sees whether integers overflow by a dozen of its own operations.
    """
    import numpy as np
    import triton.language as tl

    replace = interpreter._patch_lang

    @functools.cache
    def replaced_for_good() -> Any:
        seen = {"tl": tl, "core": tl.core}  # it replaces what a function sees of them
        replace(FunctionType((lambda: None).__code__, seen))
        return SimpleNamespace(restore=lambda: None)

    look_up = interpreter._get_np_dtype
    dtypes: dict[str, Any] = {}

    def get_np_dtype(kind: Any) -> Any:
        found = dtypes.get(kind.name)
        if found is None:
            found = dtypes[kind.name] = look_up(kind)
        return found

    make_block_type = tl.block_type.__init__
    block_types: dict[Any, dict[str, Any]] = {}

    def block_type(self: Any, element_ty: Any, shape: Any) -> None:
        key = (element_ty.name, *(getattr(size, "value", size) for size in shape))
        made = block_types.get(key)
        if made is None:
            make_block_type(self, element_ty, shape)
            block_types[key] = dict(vars(self))
        else:
            vars(self).update(made)

    make_tensor = tl.tensor.__init__
    shapes: dict[str, tuple[Any, Any]] = {}  # by type; equal ones are one
    by_sizes: dict[tuple[int, ...], tuple[Any, Any]] = {}

    def tensor(self: Any, handle: Any, type: Any) -> None:
        made = shapes.get(type.name)
        if made is None:
            make_tensor(self, handle, type)
            sizes = tuple(size.value for size in self.shape)
            made = shapes[type.name] = by_sizes.setdefault(sizes, (self.shape, self.numel))
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = made

    semantic = type(interpreter.interpreter_semantic)
    broadcast = semantic.broadcast_impl_value

    def broadcast_impl_value(self: Any, left: Any, right: Any) -> tuple[Any, Any]:
        if left.shape is right.shape:
            return left, right
        pair: tuple[Any, Any] = broadcast(self, left, right)
        return pair

    def no_overflow(self: Any, left: Any, right: Any, operation: Any) -> None:
        kind = left.type.scalar
        if kind.int_bitwidth >= 64:
            return
        name = operation.__name__
        exact = getattr(operator, name)(left.handle.data.astype(np.int64), right.handle.data)
        if exact.min() < kind.get_int_min_value() or exact.max() > kind.get_int_max_value():
            raise OverflowError(f"int{kind.int_bitwidth} overflow detected for operation {name}")

    interpreter._patch_lang = lambda function: replaced_for_good()
    interpreter._get_np_dtype = get_np_dtype
    tl.block_type.__init__ = block_type
    tl.tensor.__init__ = tensor
    semantic.broadcast_impl_value = broadcast_impl_value
    semantic.binary_op_sanitize_overflow_impl = no_overflow
