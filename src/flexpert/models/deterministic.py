"""Row-independent arithmetic: `--deterministic` gives a token the same bits whatever its batch.

Library products choose their blocking, and so their order of summation, by the number of rows; and
vectorised functions treat the last few elements of a tensor with other code than the rest, so
that the bits of exp or silu depend on where an element lies. In this mode products go through our
row-wise kernel and such functions see whole vectors only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from flexpert.errors import UnsupportedModel
from flexpert.kernels.cpu import ops

WHOLE_VECTORS: Final = 128
"""Elements: a multiple of what any CPU kernel of torch does in one go (two 512-bit vectors of
bf16 are 64)."""

outside_modes = torch._C.DisableTorchFunction
"""Context in which no mode intercepts anything, for code that calls our own kernels."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As F.linear, row by row. x: [..., in], weight: [out, in], bias: [out]."""
    if x.dtype in ops.DTYPES and weight.dtype == x.dtype and weight.ndim == 2:
        return ops.linear(x, weight, bias)
    raise UnsupportedModel(
        f"--deterministic multiplies bfloat16 or float32, not {x.dtype} by {weight.dtype}"
    )


def matmul(a: Tensor, b: Tensor, **_: object) -> Tensor:
    """As torch.matmul, where it is a linear layer or an outer product."""
    if b.ndim == 2 and a.ndim >= 2:
        return linear(a, b.t())
    if a.shape[-1] == 1 and b.ndim >= 2:  # one product an element: nothing is summed
        return a * b
    raise UnsupportedModel(
        "--deterministic cannot order the sums of a product of "
        f"{tuple(a.shape)} by {tuple(b.shape)}, which this model's layers compute"
    )


def refuse(*_: object, **__: object) -> Tensor:
    """A product whose order of summation we do not control."""
    raise UnsupportedModel("--deterministic does not fit this model: it uses batched products")


def whole_vectors(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """An elementwise function that never meets a partial vector or a strided tensor."""

    def call(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        count = x.numel()
        if not x.is_floating_point() or (count % WHOLE_VECTORS == 0 and x.is_contiguous()):
            return function(x, *args, **kwargs)
        padded = x.new_zeros(-(-count // WHOLE_VECTORS) * WHOLE_VECTORS)
        padded[:count].view(x.shape).copy_(x)
        return function(padded, *args, **kwargs)[:count].view(x.shape)

    return call


_ELEMENTWISE: Final = (
    F.gelu,
    F.hardswish,
    F.mish,
    F.sigmoid,
    F.silu,
    F.softplus,
    F.tanh,
    torch.Tensor.cos,
    torch.Tensor.exp,
    torch.Tensor.log,
    torch.Tensor.rsqrt,
    torch.Tensor.sigmoid,
    torch.Tensor.sin,
    torch.Tensor.tanh,
    torch.cos,
    torch.exp,
    torch.log,
    torch.rsqrt,
    torch.sigmoid,
    torch.sin,
    torch.tanh,
)

BY_WHOLE_VECTORS: Final[dict[Any, Callable[..., Tensor]]] = {
    function: whole_vectors(function) for function in _ELEMENTWISE
}
"""What takes the place of elementwise functions on a CPU."""

_INSTEAD: Final[dict[Any, Callable[..., Tensor]]] = {
    F.linear: linear,
    torch.matmul: matmul,
    torch.mm: matmul,
    torch.Tensor.matmul: matmul,
    torch.Tensor.mm: matmul,
    torch.Tensor.__matmul__: matmul,
    torch.bmm: refuse,
    torch.Tensor.bmm: refuse,
    torch.baddbmm: refuse,
    torch.einsum: refuse,
    torch.addmm: refuse,
    **BY_WHOLE_VECTORS,
}


class RowwiseMode(TorchFunctionMode):
    """While entered, torch's functions on this thread give each row bits of its own."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _INSTEAD.get(func, func)(*args, **(kwargs or {}))


class SingleRowMode(TorchFunctionMode):
    """While entered, torch computes one row, as in each call of it with tensors of these shapes.

    So its bits depend on nothing else, whatever the order of summation; but for linear layers,
    whose weights may lie at any address, and library products look at that.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        with outside_modes():
            if func is F.linear:
                return linear(*args, **(kwargs or {}))
            return func(*args, **(kwargs or {}))
