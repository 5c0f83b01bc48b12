"""`--deterministic` on a GPU: a token has the same bits whatever its batch.

torch's libraries choose the order of a sum by the number of rows. While `FixedOrderMode` is
entered, linear layers, and sums along a row, are computed by kernels of ours whose order is one of
the shape of a row. Elementwise functions are left to torch: on a GPU each element is a thread's.
`check_fixed_order` looks at what a model leaves to torch, once, when it is loaded: whatever might
sum in another order is refused, with the name of the module that asks for it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from flexpert.errors import UnsupportedModel
from flexpert.kernels.kernel_set import FixedOrderKernels
from flexpert.models import recorded_steps
from flexpert.models.deterministic import BY_WHOLE_VECTORS, outside_modes

_SUMS: Final = (torch.sum, torch.Tensor.sum)
_MEANS: Final = (torch.mean, torch.Tensor.mean)
_SOFTMAXES: Final = (torch.softmax, torch.Tensor.softmax, F.softmax)
_LINEAR: Final = (F.linear,)
_PRODUCTS: Final = (
    torch.matmul,
    torch.mm,
    torch.Tensor.matmul,
    torch.Tensor.mm,
    torch.Tensor.__matmul__,
)

EXACT: Final = recorded_steps.EXACT | {
    "__and__", "__or__", "__xor__", "_reshape_alias", "_unsafe_view", "alias", "all", "amax",
    "amin", "any", "cat", "clone",
    "concat", "constant_pad_nd", "contiguous", "copy_", "embedding", "empty", "empty_like",
    "empty_strided", "expand_as", "fill_", "flatten", "full", "index_copy_", "index_select",
    "min", "new_empty", "new_full", "new_ones", "new_zeros", "pad", "polar", "repeat",
    "repeat_interleave", "reshape", "set_", "split_with_sizes", "to", "tril", "triu", "type_as",
    "zero_",
}  # fmt: skip
"""Operations that move or choose numbers, and round none."""


class FixedOrderMode(TorchFunctionMode):
    """While entered, torch's functions on this thread give each row bits of its own.

    interpreted: tensors are on a CPU, whose elementwise functions need the ends of vectors filled.
    """

    def __init__(self, kernels: FixedOrderKernels, *, interpreted: bool) -> None:
        super().__init__()
        self._kernels = kernels
        self._instead: dict[Any, Callable[..., Any]] = {
            **(BY_WHOLE_VECTORS if interpreted else {}),
            **dict.fromkeys(_LINEAR, self._linear),
            **dict.fromkeys(_PRODUCTS, self._product),
            **{function: self._along_rows(function, kernels.sum_rows) for function in _SUMS},
            **{function: self._along_rows(function, kernels.mean_rows) for function in _MEANS},
            **{function: self._softmax(function) for function in _SOFTMAXES},
            F.layer_norm: self._layer_norm,
        }

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return self._instead.get(func, func)(*args, **(kwargs or {}))

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if input.dtype != weight.dtype or weight.ndim != 2 or not input.is_floating_point():
            raise UnsupportedModel(
                f"--deterministic multiplies numbers of one type, not {input.dtype} by "
                f"{weight.dtype}, as this model does"
            )
        with outside_modes():
            return self._kernels.linear(input, weight, bias)

    def _product(self, a: Tensor, b: Tensor, **_: object) -> Tensor:
        if b.ndim == 2 and a.ndim >= 2:
            return self._linear(a, b.t())
        if a.shape[-1] == 1 and b.ndim >= 2:  # one product an element: nothing is summed
            return a * b
        raise UnsupportedModel(
            "--deterministic cannot order the sums of a product of "
            f"{tuple(a.shape)} by {tuple(b.shape)}, which this model's layers compute"
        )

    def _along_rows(
        self, function: Callable[..., Tensor], kernel: Callable[[Tensor], Tensor]
    ) -> Callable[..., Tensor]:
        def call(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            dim = kwargs.get("dim", args[0] if args else None)
            keep = kwargs.get("keepdim", args[1] if len(args) > 1 else False)
            last = dim in (-1, x.ndim - 1, [-1], (-1,)) and x.is_floating_point()
            if not last or len(args) > 2 or kwargs.keys() - {"dim", "keepdim"}:
                return function(x, *args, **kwargs)
            with outside_modes():
                result = kernel(x)
                return result.unsqueeze(-1) if keep else result

        return call

    def _softmax(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(
            input: Tensor, dim: int | None = None, *args: Any, dtype: Any = None, **kwargs: Any
        ) -> Tensor:
            if dim not in (-1, input.ndim - 1) or args:
                return function(input, dim, *args, dtype=dtype, **kwargs)
            with outside_modes():
                return self._kernels.softmax_rows(input if dtype is None else input.to(dtype))

        return call

    def _layer_norm(
        self,
        input: Tensor,
        normalized_shape: Sequence[int],
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> Tensor:
        if len(normalized_shape) != 1:
            return F.layer_norm(input, normalized_shape, weight, bias, eps)
        with outside_modes():
            return self._kernels.layer_norm_rows(input, weight, bias, eps)


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes what torch computes itself, and in which module."""

    def __init__(self, current: list[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._current = current
        self.found: dict[str, str] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not _keeps_rows(func):
            name = func.name().partition("::")[2].partition(".")[0]
            self.found.setdefault(name, self._current[-1])
        return func(*args, **(kwargs or {}))


def _keeps_rows(func: Any) -> bool:
    """Whether an operation gives an element the same bits wherever it lies."""
    name = func.name().partition("::")[2].partition(".")[0]
    return func.is_view or torch.Tag.pointwise in func.tags or name in EXACT


def check_fixed_order(model: nn.Module, walk: Callable[[], object]) -> None:
    """Look at what a model computes by torch's own kernels.

    Args:
        walk: computes a step of the model, with whatever stands in for torch's functions.

    Raises:
        UnsupportedModel: torch may sum in an order that depends on the batch; says where.
    """
    current = [type(model).__name__]
    with _named(model, current), _Watch(current) as watch:
        walk()
    if watch.found:
        where = "; ".join(f"{name} in {module}" for name, module in sorted(watch.found.items()))
        raise UnsupportedModel(
            "--deterministic does not fit this model on a GPU: torch's libraries compute "
            f"{where}, in an order that depends on the batch; leave --deterministic out, or serve "
            "with --device cpu"
        )


@contextlib.contextmanager
def _named(model: nn.Module, current: list[str]) -> Iterator[None]:
    """Within it `current` ends with the module that computes."""
    handles = []

    def enter(name: str) -> Callable[..., None]:
        return lambda *_: current.append(name)

    def leave(*_: object) -> None:
        current.pop()

    for name, module in model.named_modules():
        if name:
            said = f"{name} ({type(module).__name__})"
            handles.append(module.register_forward_pre_hook(enter(said)))
            handles.append(module.register_forward_hook(leave))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
