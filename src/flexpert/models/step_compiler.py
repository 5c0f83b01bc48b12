"""From a recording to a program of our kernels, with calls of torch where there is none.

Each call of the recording becomes operations of program.c, or stays what it is: a call from Python
on views of the program's memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor

from flexpert.kernels.affine import Affine, product
from flexpert.kernels.cpu.program import (
    DIMS,
    DTYPES,
    OPERATIONS,
    Address,
    RowProgram,
    Word,
    experts_operation,
    scalar,
)
from flexpert.kernels.cpu.selection import orders_as_torch, topk_operation
from flexpert.models.recording import (
    AttentionCall,
    Call,
    LinearCall,
    ModuleCall,
    NormCall,
    Operand,
    RoutedCall,
    TorchCall,
    replaced,
)

ONE: Final = Affine(1)
ZERO: Final = Affine(0)
_aten = torch.ops.aten


Step = list[Word] | TorchCall | ModuleCall | RoutedCall
"""An operation of program.c, or something that Python calls."""


@dataclass(slots=True)
class Compiled:
    """steps: in order. asked: by number of a step, the layer of experts that Python computes where
    C leaves it to it. lives: first and last step that uses a buffer. left: names of the operations
    that torch computes. kept: tensors whose addresses are in the steps."""

    steps: list[Step] = field(default_factory=list)
    asked: dict[int, RoutedCall] = field(default_factory=dict)
    lives: dict[int, tuple[int, int]] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)
    kept: list[Tensor] = field(default_factory=list)

    @property
    def operations(self) -> list[list[Word]]:
        """The steps that are operations of program.c."""
        return [step for step in self.steps if isinstance(step, list)]


@dataclass(frozen=True, slots=True)
class Place:
    """An operand whose numbers are affine."""

    operand: Operand
    offset: Affine
    sizes: tuple[Affine, ...]
    strides: tuple[Affine, ...]

    @classmethod
    def of(cls, operand: Any) -> Place:
        """operand: as `fit` made it."""
        return cls(operand, operand.offset, operand.sizes, operand.strides)

    @property
    def item(self) -> int:
        return self.operand.dtype.itemsize

    @property
    def dtype(self) -> torch.dtype:
        return self.operand.dtype

    def shifted(self, by: Affine) -> Place:
        return Place(self.operand, self.offset + by, self.sizes, self.strides)

    def sized(self, sizes: Sequence[Affine], strides: Sequence[Affine]) -> Place:
        return Place(self.operand, self.offset, tuple(sizes), tuple(strides))


def compile_calls(calls: Sequence[Any], inputs: Sequence[Any]) -> Compiled:
    """calls: of fitted recordings. inputs: operands of tokens, positions and sample rows."""
    compiled = Compiled()
    compiler = _Compiler(compiled)
    tokens, positions, samples = (Place.of(one) for one in inputs)
    take: list[Word] = [0] * 32
    take[0] = OPERATIONS["inputs"]
    take[3], take[4] = tokens.sizes[-1], samples.sizes[-1]
    take[8], take[14], take[20] = (compiler.address(one) for one in (tokens, positions, samples))
    compiler.add(take, tokens, positions, samples)
    for call in calls:
        compiler.compile(call)
    return compiled


def compile_rows(calls: Sequence[Any]) -> Compiled | None:
    """calls: of fitted recordings of rows alone; None: something has to be called from Python."""
    compiled = Compiled()
    compiler = _Compiler(compiled)
    for call in calls:
        compiler.compile(call)
    return compiled if len(compiled.operations) == len(compiled.steps) else None


class _Compiler:
    def __init__(self, compiled: Compiled) -> None:
        self._compiled = compiled

    def add(self, step: Step, *used: Place) -> None:
        number = len(self._compiled.steps)
        self._compiled.steps.append(step)
        for place in used:
            if (buffer := _buffer(place.operand)) is not None:
                first, _ = self._compiled.lives.get(buffer, (number, number))
                self._compiled.lives[buffer] = (first, number)
            elif place.operand.constant is not None:
                self._compiled.kept.append(place.operand.constant)

    def address(self, place: Place) -> Word:
        buffer = _buffer(place.operand)
        if buffer is not None:
            return Address(buffer, place.offset * place.item)
        constant = place.operand.constant
        assert constant is not None
        return constant.data_ptr()

    def compile(self, call: Call) -> None:
        if isinstance(call, NormCall):
            self._norm(call)
        elif isinstance(call, LinearCall):
            self._product(Place.of(call.source), Place.of(call.result), call.weight, call.bias)
        elif isinstance(call, AttentionCall):
            self._attention(call)
        elif isinstance(call, RoutedCall):
            self._experts(call)
        elif isinstance(call, ModuleCall):
            self.add(call, *map(Place.of, operands_of(call)))
        elif not self._known(call):
            self._compiled.left.append(call.function.name())
            self.add(call, *map(Place.of, operands_of(call)))

    # ---- what our kernels compute -------------------------------------------------------------

    def _norm(self, call: NormCall) -> None:
        source, result = Place.of(call.source), Place.of(call.result)
        self._compiled.kept.append(call.weight)
        op: list[Word] = [0] * 32
        op[0], op[1] = OPERATIONS["norm"], DTYPES[source.dtype]
        op[3], op[4] = _numel(source.sizes[:-1]), source.sizes[-1]
        op[8], op[14] = self.address(result), self.address(source)
        op[20] = call.weight.data_ptr()
        op[26], op[27] = scalar(call.eps), int(call.early)
        self.add(op, source, result)

    def _attention(self, call: Any) -> None:
        query, key, value, result = map(Place.of, (call.query, call.key, call.value, call.result))
        caches = call.key_cache, call.value_cache
        self._compiled.kept += [*caches, *([] if call.sinks is None else [call.sinks])]
        strides = [one.strides[d] for one in (query, key, value) for d in (0, 1)]
        op: list[Word] = [
            OPERATIONS["attention"],
            DTYPES[query.dtype],
            *map(self.address, (result, query, key, value)),
            *(cache.data_ptr() for cache in caches),
            0 if call.sinks is None else call.sinks.data_ptr(),
            *strides,
            call.key_cache.shape[1],
            query.sizes[1],
            key.sizes[1],
            key.sizes[2],
            value.sizes[2],
            call.value_cache.stride(2),
            call.window,
            scalar(call.scaling),
            scalar(call.softcap),
        ]
        self.add(op, query, key, value, result)

    def _experts(self, call: Any) -> None:
        operands = call.source, call.expert_ids, call.weights, call.result
        x, ids, weights, result = places = [*map(Place.of, operands)]
        floats = (torch.float32, torch.bfloat16)
        if (
            not isinstance(call.gate, RowProgram)
            or x.dtype not in floats
            or weights.dtype not in floats
            or ids.dtype != torch.int64
        ):
            self.add(call, *places)
            return
        addresses = [self.address(one) for one in (result, x, ids, weights)]
        dtypes = x.dtype, weights.dtype
        op = experts_operation(call.layer, dtypes, ids.sizes, addresses, call.gate)
        self._compiled.asked[len(self._compiled.steps)] = call
        self.add(op, *places)

    # ---- what torch computed ------------------------------------------------------------------

    def _known(self, call: TorchCall) -> bool:
        """Whether there is a kernel; then its operations are added."""
        name = call.function.name().split("::")[1]
        if any(place.dtype not in DTYPES for place in map(Place.of, operands_of(call))):
            return False
        args, kwargs = call.arguments
        results = [Place.of(one) for one in call.results if one is not None]
        base = name.split(".")[0].rstrip("_")
        match base:
            case "_to_copy" | "clone" | "copy" | "_copy":
                return self._unary("copy", results[0], args[1 if base == "copy" else 0])
            case _ if base in _UNARY and len(args) == 1 and not kwargs:
                return self._unary(base, results[0], args[0])
            case "gelu":
                tanh = kwargs.get("approximate", "none") == "tanh"
                return self._unary("gelu_tanh" if tanh else "gelu", results[0], args[0])
            case "pow" if len(args) == 2 and args[1] in (2, 2.0, Affine(2)):
                return self._unary("square", results[0], args[0])
            case "add" | "sub" | "mul" | "div" | "maximum" | "minimum" if len(args) == 2:
                if set(kwargs) - {"alpha"}:
                    return False
                return self._binary(base, results[0], args, _number(kwargs.get("alpha", 1)))
            case "clamp" | "clamp_min" | "clamp_max":
                return self._clamp(base, results[0], args, kwargs)
            case "bmm":
                return self._outer(results[0], args)
            case "cat":
                return self._cat(results[0], args)
            case "mm" | "addmm" | "linear":
                return self._linear(base, results[0], args)
            case "_softmax" | "sum" | "mean":
                return self._reduction(base, results[0], args, kwargs)
            case "embedding" | "index" | "index_select":
                return self._rows(base, results[0], args)
            case "topk":
                return self._topk(results, args)
        return False

    def _unary(self, name: str, result: Place, source: Any) -> bool:
        return isinstance(source, Operand) and self._elementwise(name, result, Place.of(source))

    def _binary(self, name: str, result: Place, args: Sequence[Any], alpha: float | None) -> bool:
        first, second = args
        if not isinstance(first, Operand) or alpha is None:
            return False
        if isinstance(second, Operand):
            return self._elementwise(name, result, Place.of(first), Place.of(second), alpha=alpha)
        value = _number(second)
        if value is None:
            return False
        return self._elementwise(name, result, Place.of(first), value=value, alpha=alpha)

    def _clamp(self, name: str, result: Place, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
        low, high = [*args[1:], None, None][:2] if name != "clamp_max" else (None, args[1])
        low, high = kwargs.get("min", low), kwargs.get("max", high)
        limits = []
        for limit, none in ((low, -torch.inf), (high, torch.inf)):
            value = none if limit is None else _number(limit)
            if value is None:
                return False
            limits.append(float(torch.tensor(value, dtype=result.dtype, device="cpu")))
        return self._elementwise(
            "clamp", result, Place.of(args[0]), value=limits[0], alpha=limits[1]
        )

    def _elementwise(
        self,
        name: str,
        result: Place,
        first: Place,
        second: Place | None = None,
        *,
        value: float = 0.0,
        alpha: float = 1.0,
    ) -> bool:
        places = [result, first, *([] if second is None else [second])]
        moves = name == "copy" and first.dtype == result.dtype
        floats = result.dtype in (torch.float32, torch.bfloat16)
        if not moves and not (floats and _computes(name, places[1:])):
            return False
        strides = [result.strides]
        for place in places[1:]:
            spread = _spread(place, result.sizes)
            if spread is None:
                return False
            strides.append(spread)
        sizes, merged = _merge(result.sizes, strides)
        if len(sizes) > DIMS:
            return False
        op: list[Word] = [0] * 32
        codes = [DTYPES[place.dtype] for place in places]
        op[0] = OPERATIONS[name]
        op[1] = sum(code << 8 * place for place, code in enumerate(codes))
        op[2] = len(sizes)
        op[3 : 3 + len(sizes)] = sizes
        for at, place, along in zip((8, 14, 20), places, merged, strict=False):
            op[at] = self.address(place)
            op[at + 1 : at + 1 + len(along)] = along
        op[26], op[27] = scalar(value), scalar(alpha)
        self.add(op, *places)
        return True

    def _outer(self, result: Place, args: Sequence[Any]) -> bool:
        """A batched product that sums nothing."""
        first, second = map(Place.of, args)
        if first.sizes[2].fixed != 1:
            return False
        columns = first.sized((*first.sizes[:2], ONE), (*first.strides[:2], ZERO))
        row = second.sized(
            (second.sizes[0], ONE, second.sizes[2]), (second.strides[0], ZERO, second.strides[2])
        )
        return self._elementwise("mul", result, columns, row)

    def _cat(self, result: Place, args: Sequence[Any]) -> bool:
        parts = [Place.of(one) for one in args[0]]
        dim = _number(args[1]) if len(args) > 1 else 0
        if dim is None or any(len(one.sizes) != len(result.sizes) for one in parts):
            return False
        along, begin, targets = int(dim) % len(result.sizes), ZERO, []
        for one in parts:
            shift = product(begin, result.strides[along])
            if one.dtype != result.dtype or shift is None:
                return False
            targets.append(result.shifted(shift).sized(one.sizes, result.strides))
            begin = begin + one.sizes[along]
        return all(
            self._elementwise("copy", target, one)
            for target, one in zip(targets, parts, strict=True)
        )

    def _linear(self, name: str, result: Place, args: Sequence[Any]) -> bool:
        bias: Any = None
        if name == "addmm":
            bias, *args = args
        elif name == "linear" and len(args) > 2:
            bias = args[2]
        source, matrix = map(Place.of, args[:2])
        weight = matrix.operand.constant
        if weight is None or not is_contiguous(source) or not is_contiguous(result):
            return False
        weight = weight if name == "linear" else weight.t()
        vector = None if bias is None else bias.constant
        if (
            weight.ndim != 2
            or not weight.is_contiguous()
            or source.dtype not in (torch.float32, torch.bfloat16)
            or not (source.dtype == weight.dtype == result.dtype)
            or (bias is not None and (vector is None or vector.dtype != weight.dtype))
            or (vector is not None and (vector.ndim != 1 or not vector.is_contiguous()))
        ):
            return False
        self._product(source, result, weight, vector)
        return True

    def _product(self, source: Place, result: Place, weight: Tensor, vector: Tensor | None) -> None:
        """All contiguous and of one dtype."""
        self._compiled.kept += [weight, *([] if vector is None else [vector])]
        op: list[Word] = [0] * 32
        op[0], op[1] = OPERATIONS["linear"], DTYPES[source.dtype]
        op[3], op[4], op[5] = _numel(source.sizes[:-1]), *reversed(weight.shape)
        op[8], op[14] = self.address(result), self.address(source)
        op[20], op[27] = weight.data_ptr(), 0 if vector is None else vector.data_ptr()
        self.add(op, source, result)

    def _reduction(
        self, name: str, result: Place, args: Sequence[Any], kwargs: dict[str, Any]
    ) -> bool:
        source = Place.of(args[0])
        dims = args[1] if len(args) > 1 else None
        wanted = [_number(one) for one in (dims if isinstance(dims, tuple) else (dims,))]
        last = len(source.sizes) - 1
        if any(one is None for one in wanted) or [int(one or 0) % (last + 1) for one in wanted] != [
            last
        ]:
            return False
        floats = (torch.float32, torch.bfloat16)
        if source.dtype not in floats or result.dtype not in floats:
            return False
        softmax = name == "_softmax"
        strides = result.strides
        if softmax or len(result.sizes) == last + 1:
            strides = strides[:last]
        sizes, merged = _merge(source.sizes[:last], [strides, source.strides[:last]])
        if len(sizes) > 1:
            return False
        op: list[Word] = [0] * 32
        op[0] = OPERATIONS["softmax" if softmax else name]
        op[1] = DTYPES[result.dtype] | DTYPES[source.dtype] << 8
        op[3], op[4] = sizes[0], source.sizes[last]
        op[8], op[9] = self.address(result), merged[0][0]
        op[10] = result.strides[last] if softmax else 0
        op[14], op[15], op[16] = self.address(source), merged[1][0], source.strides[last]
        self.add(op, source, result)
        return True

    def _topk(self, results: Sequence[Place], args: Sequence[Any]) -> bool:
        """Of rows. In the order of torch, also of equal values, as far as that is known."""
        source, (values, indices) = Place.of(args[0]), (results[0], results[1])
        options = dict(zip(("k", "dim", "largest", "sorted"), args[1:], strict=False))
        k, dim = (_number(options.get(name, -1)) for name in ("k", "dim"))
        largest, in_order = options.get("largest", True), bool(options.get("sorted", True))
        last = len(source.sizes) - 1
        n = source.sizes[last].fixed
        sizes, merged = _merge(source.sizes[:last], [source.strides[:last]])
        floats = (torch.float32, torch.bfloat16)
        if (
            n is None
            or k is None
            or dim not in (-1, last)
            or not largest
            or source.dtype not in floats
            or not (is_contiguous(values) and is_contiguous(indices))
            or len(sizes) > 1
            or not orders_as_torch(n, int(k), source.dtype, in_order=in_order)
        ):
            return False
        op = topk_operation(
            source.dtype,
            (sizes[0], n, int(k)),
            [self.address(one) for one in (values, source, indices)],
            (merged[0][0], source.strides[last]),
            in_order=in_order,
        )
        self.add(op, source, values, indices)
        return True

    def _rows(self, name: str, result: Place, args: Sequence[Any]) -> bool:
        """Rows of a table along one dimension, those before it being 1."""
        table, along = Place.of(args[0]), 0
        if name == "embedding":
            ids = args[1]
        elif name == "index_select":
            along, ids = int(_number(args[1]) or 0), args[2]
        else:
            given = list(args[1])
            chosen = [number for number, one in enumerate(given) if one is not None]
            if len(chosen) != 1:
                return False
            along, ids = chosen[0], given[chosen[0]]
        numbers = Place.of(ids)
        row = table.sizes[along + 1 :]
        if (
            numbers.dtype != torch.int64
            or any(one.fixed != 1 for one in table.sizes[:along])
            or not is_contiguous(result)
            or not _dense(row, table.strides[along + 1 :])
            or table.dtype != result.dtype
        ):
            return False
        sizes, merged = _merge(numbers.sizes, [numbers.strides])
        if len(sizes) > 1:
            return False
        width = _numel(row)
        op: list[Word] = [0] * 32
        op[0] = OPERATIONS["rows"]
        op[3], op[4] = sizes[0], width * table.item
        op[8], op[9] = self.address(result), width * table.item
        op[14], op[15] = self.address(numbers), merged[0][0]
        op[20], op[21] = self.address(table), table.strides[along] * table.item
        op[27] = table.sizes[along]
        self.add(op, table, numbers, result)
        return True


_UNARY: Final = {
    "neg",
    "silu",
    "sigmoid",
    "exp",
    "cos",
    "sin",
    "rsqrt",
    "tanh",
    "relu",
    "sqrt",
    "reciprocal",
    "square",
}


def operands_of(call: TorchCall | ModuleCall) -> list[Operand]:
    """All that a call reads or writes."""
    found: list[Operand] = [one for one in call.results if one is not None]
    replaced(call.arguments, Operand, found.append)
    return found


def _buffer(operand: Any) -> int | None:
    number = operand.buffer
    return number.base if isinstance(number, Affine) else number


def _computes(name: str, sources: Sequence[Place]) -> bool:
    """Whether operands are of dtypes that program.c computes with; conversions take all."""
    floats = (torch.float32, torch.bfloat16)
    return name == "copy" or all(place.dtype in floats for place in sources)


def _number(value: Any) -> float | None:
    if isinstance(value, Affine):
        return value.fixed
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value


def _numel(sizes: Sequence[Affine]) -> Affine:
    whole = ONE
    for size in sizes:
        found = product(whole, size)
        if found is None:
            raise ValueError("two sizes grow with the batch")
        whole = found
    return whole


def _dense(sizes: Sequence[Affine], strides: Sequence[Affine]) -> bool:
    """Whether elements lie side by side in order."""
    expected = ONE
    for size, stride in zip(reversed(sizes), reversed(strides), strict=True):
        if size.fixed == 1:
            continue
        if stride != expected:
            return False
        found = product(expected, size)
        if found is None:
            return False
        expected = found
    return True


def is_contiguous(place: Place) -> bool:
    """Whether its elements lie one behind the other, for any number of rows."""
    return _dense(place.sizes, place.strides)


def _spread(place: Place, sizes: Sequence[Affine]) -> tuple[Affine, ...] | None:
    """Strides along all of `sizes`, 0 where an operand is broadcast; None: it does not fit."""
    missing = len(sizes) - len(place.sizes)
    if missing < 0:
        return None
    strides = [ZERO] * missing
    for size, stride, wanted in zip(place.sizes, place.strides, sizes[missing:], strict=True):
        if size == wanted:
            strides.append(stride)
        elif size.fixed == 1:
            strides.append(ZERO)
        else:
            return None
    return tuple(strides)


def _merge(
    sizes: Sequence[Affine], strides: Sequence[Sequence[Affine]]
) -> tuple[list[Affine], list[list[Affine]]]:
    """As few dimensions as say the same. strides: of each operand."""
    kept: list[Affine] = []
    along: list[list[Affine]] = [[] for _ in strides]
    for dim, size in enumerate(sizes):
        if size.fixed == 1:
            continue
        whole = product(kept[-1], size) if kept else None
        joins = whole is not None and all(
            product(each[dim], size) == mine[-1] for each, mine in zip(strides, along, strict=True)
        )
        if joins and whole is not None:
            kept[-1] = whole
            for each, mine in zip(strides, along, strict=True):
                mine[-1] = each[dim]
        else:
            kept.append(size)
            for each, mine in zip(strides, along, strict=True):
                mine.append(each[dim])
    if not kept:
        return [ONE], [[ZERO] for _ in strides]
    return kept, along
