"""What a model computes in a step, written down as operations on buffers.

While a `Recording` is entered, whatever torch computes on this thread is noted below autograd,
where few kinds of operations are left. Views are no operations: an operand is a place in a buffer,
with sizes and strides. Norms, attention and experts are computed by kernels that torch does not
see; what stands for them in the model tells the recording (`current`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from flexpert.errors import UnsupportedModel
from flexpert.kernels.experts import Gate
from flexpert.kernels.kernel_set import NormKernel


@dataclass(frozen=True, slots=True)
class Operand:
    """Elements of a buffer of the recording, or of a tensor that it only reads.

    buffer: its number; None: a constant. offset, strides: in elements.
    """

    buffer: int | None
    constant: Tensor | None
    offset: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class TorchCall:
    """An operation of torch. arguments: args and kwargs, with operands in place of tensors."""

    function: Any
    arguments: tuple[tuple[Any, ...], dict[str, Any]]
    results: tuple[Operand | None, ...]


@dataclass(frozen=True, slots=True)
class LinearCall:
    """See `ops.linear`; source and result are contiguous."""

    source: Operand
    weight: Tensor
    bias: Tensor | None
    result: Operand


@dataclass(frozen=True, slots=True)
class NormCall:
    """See `ops.rms_norm`; source and result are contiguous."""

    source: Operand
    weight: Tensor
    eps: float
    early: bool
    result: Operand


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """See `ops.paged_attention`."""

    query: Operand
    key: Operand
    value: Operand
    key_cache: Tensor
    value_cache: Tensor
    scaling: float
    window: int
    softcap: float
    sinks: Tensor | None
    result: Operand


@dataclass(frozen=True, slots=True)
class RoutedCall:
    """See `MoELayers.forward`; all operands are contiguous."""

    layer: int
    source: Operand
    expert_ids: Operand
    weights: Operand
    gate: Gate
    result: Operand


@dataclass(frozen=True, slots=True)
class ModuleCall:
    """What stays a call from Python in each step, such as a layer that keeps a state.

    arguments: args and kwargs, with operands in place of tensors. results: those of its tensors, in
    order.
    """

    function: Callable[..., Any]
    arguments: tuple[tuple[Any, ...], dict[str, Any]]
    results: tuple[Operand, ...]


Call = TorchCall | ModuleCall | LinearCall | NormCall | AttentionCall | RoutedCall


class Recording(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Calls of one walk, in order.

    calls: noted so far. nbytes: of each buffer.
    """

    def __init__(self, inputs: Sequence[Tensor], given: Sequence[Tensor] = ()) -> None:
        """inputs: the first buffers. given: memory that others write, contiguous; it is read from
        its begin, and the more of it the more tokens there are."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[Call] = []
        self.nbytes: list[int] = []
        self._numbers: dict[int, int] = {}  # storage → buffer
        self._kept: list[Tensor] = []  # so that no storage is made twice
        self._paused = False
        self._given = {_storage(tensor): tensor for tensor in given}
        for tensor in inputs:
            self._made(tensor)

    # ---- what torch computes ------------------------------------------------------------------

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = dict(kwargs or {})
        if self._paused:
            return func(*args, **given)
        if func in _ASKING or _chooses(func, args):
            raise UnsupportedModel(f"it computes with values ({func})")
        result = func(*args, **given)
        outputs = [result] if isinstance(result, Tensor) else list(tensors_of(result))
        self._kept += outputs
        if not outputs:
            return result
        written = _written(func, args, given)
        read = {_storage(one) for one in tensors_of((args, given))}
        if not written and all(_storage(one) in read for one in outputs):
            return result  # a view
        if written:
            for one in written:
                if _storage(one) not in self._numbers:
                    raise UnsupportedModel(f"it changes a weight or buffer ({func})")
            results = tuple(self.operand(one) for one in written)
        else:
            for one in outputs:
                self._made(one)
            if func in _MAKING:
                return result
            results = tuple(self.operand(one) for one in outputs)
        arguments = replaced((args, given), Tensor, self.operand)
        self.calls.append(TorchCall(func, arguments, results))
        return result

    def operand(self, tensor: Tensor) -> Operand:
        number = self._numbers.get(_storage(tensor))
        if number is None:
            self._kept.append(tensor)
        return Operand(
            buffer=number,
            constant=self._given.get(_storage(tensor), tensor) if number is None else None,
            offset=int(tensor.storage_offset()),
            sizes=tuple(tensor.shape),
            strides=tuple(tensor.stride()),
            dtype=tensor.dtype,
        )

    def _made(self, tensor: Tensor) -> None:
        self._numbers[_storage(tensor)] = len(self.nbytes)
        self.nbytes.append(tensor.untyped_storage().nbytes())
        self._kept.append(tensor)

    # ---- what our kernels compute -------------------------------------------------------------

    def module(
        self,
        function: Callable[..., Any],
        arguments: tuple[tuple[Any, ...], dict[str, Any]],
        compute: Callable[[], Any],
    ) -> Any:
        """A call that is repeated in each step as it is.

        function: for the steps. compute: gives tensors like those that `function` will.
        """
        operands = replaced(arguments, Tensor, self.operand)
        with self._unseen():
            result = replaced(compute(), Tensor, torch.Tensor.clone)
        outputs = list(tensors_of(result))
        for one in outputs:
            self._made(one)
        self.calls.append(ModuleCall(function, operands, tuple(map(self.operand, outputs))))
        return result

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """As a product; computed is nothing, which would take long: the result is 0."""
        x = x.contiguous()
        result = x.new_empty((*x.shape[:-1], weight.shape[0]))
        with self._unseen():
            result.zero_()
        self.calls.append(LinearCall(self.operand(x), weight, bias, self.operand(result)))
        return result

    def norm(
        self, kernel: NormKernel, x: Tensor, weight: Tensor, eps: float, *, early: bool
    ) -> Tensor:
        """See `ops.rms_norm`."""
        x = x.contiguous()
        result = kernel(x, weight, eps, early=early)
        self.calls.append(NormCall(self.operand(x), weight, eps, early, self.operand(result)))
        return result

    def attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        caches: tuple[Tensor, Tensor],
        **options: Any,
    ) -> Tensor:
        """options: as `ops.paged_attention` has them. Computed is nothing: the result is 0."""
        result = query.new_empty((*query.shape[:2], value.shape[2]))
        with self._unseen():
            result.zero_()
        call = AttentionCall(
            self.operand(query),
            self.operand(key),
            self.operand(value),
            *caches,
            **options,
            result=self.operand(result),
        )
        self.calls.append(call)
        return result

    def experts(
        self, layer: int, x: Tensor, expert_ids: Tensor, weights: Tensor, gate: Gate
    ) -> Tensor:
        """What stands for the experts' sum while a walk is recorded: [N, hidden]."""
        with self._unseen():
            result = stand_in(x, expert_ids, weights)
        self._made(result)
        source, ids, factors, sums = map(self.operand, (x, expert_ids, weights, result))
        self.calls.append(RoutedCall(layer, source, ids, factors, gate, sums))
        return result

    @contextlib.contextmanager
    def _unseen(self) -> Iterator[None]:
        """What is computed in it is not noted."""
        global _current
        self._paused, _current = True, None
        try:
            yield
        finally:
            self._paused, _current = False, self

    def __enter__(self) -> Recording:
        global _current
        super().__enter__()  # type: ignore[no-untyped-call]
        _current = self
        return self

    def __exit__(self, *raised: Any) -> None:
        global _current
        _current = None
        super().__exit__(*raised)  # type: ignore[no-untyped-call]


def stand_in(x: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
    """In place of experts in trials: [N, hidden]; the rounding of x and weights alone changes it a
    little, another choice of experts does so much."""
    chosen = (expert_ids + 1).float() * weights.float()
    return x * (chosen.sum(1, keepdim=True) / (chosen.abs().amax() + 1)).to(x.dtype)


def stand_in_experts(layer: int, x: Tensor, ids: Tensor, weights: Tensor, gate: object) -> Tensor:
    """`stand_in`, called as `MoELayers.forward`."""
    return stand_in(x, ids, weights)


_current: Recording | None = None


def current() -> Recording | None:
    """The recording that is entered, if any."""
    return _current


def tensors_of(value: Any) -> Iterator[Tensor]:
    """All tensors in nested tuples, lists and dicts, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for one in value:
            yield from tensors_of(one)
    elif isinstance(value, dict):
        for one in value.values():
            yield from tensors_of(one)


def replaced(value: Any, kind: type | tuple[type, ...], by: Callable[[Any], Any]) -> Any:
    """Nested tuples, lists and dicts with what is of a kind replaced."""
    if isinstance(value, kind):
        return by(value)
    if isinstance(value, tuple | list):
        return tuple(replaced(one, kind, by) for one in value)
    if isinstance(value, dict):
        return {name: replaced(one, kind, by) for name, one in value.items()}
    return value


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors that an operation changes."""
    found = []
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = args[index] if index < len(args) else kwargs.get(argument.name)
        found += list(tensors_of(value))
    return found


def _chooses(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether it takes the rows that a mask names: how many, the values say."""
    return func is _aten.index.Tensor and any(
        one is not None and one.dtype in (torch.bool, torch.uint8) for one in args[1]
    )


_aten = torch.ops.aten
_ASKING = {
    _aten._local_scalar_dense.default,
    _aten.equal.default,
    _aten.is_nonzero.default,
    _aten.nonzero.default,
    _aten.masked_select.default,
}
"""Operations whose results decide what is computed next."""

_MAKING = {
    _aten.empty.memory_format,
    _aten.empty_like.default,
    _aten.empty_strided.default,
    _aten.new_empty.default,
    _aten.new_empty_strided.default,
}
"""Operations that make memory without content."""
