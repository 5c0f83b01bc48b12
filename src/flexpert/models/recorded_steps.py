"""Steps on a CPU without transformers' modules: a program recorded once, walked for any batch.

What CUDA graphs are on a GPU. The program knows neither who holds which expert nor how many ranks
there are: at each layer of experts C looks into the runtime's tables, or asks the runtime as
transformers' modules do. So it outlives every change.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from flexpert.errors import UnsupportedModel
from flexpert.kernels.affine import Affine, fit
from flexpert.kernels.cpu.program import (
    Program,
    RowProgram,
    StepWords,
    Word,
    experts_operation,
    run,
)
from flexpert.models.batch import ForwardBatch
from flexpert.models.recording import (
    ModuleCall,
    Operand,
    Recording,
    RoutedCall,
    TorchCall,
    replaced,
    tensors_of,
)
from flexpert.models.state_runs import NO_STATE, StateRuns
from flexpert.models.step_compiler import Compiled, compile_calls, operands_of

_TAKES: Final = ((5, 3), (6, 3), (6, 4), (9, 2))
"""Rows and samples of the batches that are recorded; see `fit`."""

_MOST_LAYOUTS: Final = 128
"""Of the embedded model one takes 0.3 ms to make, and some 50 KiB."""

Native = Callable[[], AbstractContextManager[int]]
"""See `NativeMoELayers.native`."""


def in_python() -> AbstractContextManager[int]:
    """A `Native` of layers that are all asked from Python."""
    return nullcontext(0)


Experts = Callable[[int, Tensor, Tensor, Tensor, Any], Tensor]
"""(layer, x, expert ids, weights, gate) → what all experts give; see `MoELayers.forward`."""


@dataclass(frozen=True, slots=True)
class RecordedModel:
    """A walk as calls with affine sizes. inputs: tokens, positions, sample rows; result: logits,
    float32 [samples, vocab]; beside: what else it gives."""

    calls: tuple[Any, ...]
    nbytes: tuple[Any, ...]
    inputs: tuple[Any, ...]
    result: Any
    beside: tuple[Any, ...]


Walk = Callable[[ForwardBatch], tuple[Tensor, ...]]
"""A batch → logits, and what else is wanted of it."""


def record(walk: Walk, block_size: int, given: Sequence[Tensor] = ()) -> RecordedModel:
    """block_size: of the KV cache, in tokens. given: memory that the walk reads, see `Recording`.

    Raises:
        UnsupportedModel: what the model computes is not the same list for every batch.
    """
    takes = {}
    for rows, samples in _TAKES:
        batch = trial_batch(rows, samples, block_size)
        inputs = batch.token_ids, batch.positions, batch.sample_rows
        recording = Recording(inputs, given)
        with torch.no_grad(), recording:
            result, *beside = walk(batch)
            takes[rows, samples] = RecordedModel(
                tuple(recording.calls),
                tuple(recording.nbytes),
                tuple(recording.operand(one) for one in inputs),
                recording.operand(result),
                tuple(recording.operand(one) for one in beside),
            )
    return fit(takes)


def trial_batch(rows: int, samples: int, block_size: int, *, stride: int = 1) -> ForwardBatch:
    """One short sequence in the first blocks of the cache. stride: of positions."""
    blocks = -(-rows // block_size)
    return ForwardBatch(
        token_ids=torch.arange(rows, device="cpu") * 7 % 11 + 2,
        positions=torch.arange(rows, device="cpu") * stride,
        query_start=torch.tensor([0, rows], dtype=torch.int32, device="cpu"),
        context_len=torch.tensor([rows], dtype=torch.int32, device="cpu"),
        block_tables=torch.arange(blocks, dtype=torch.int32, device="cpu").unsqueeze(0),
        slot_mapping=torch.arange(rows, device="cpu"),
        sample_rows=torch.arange(rows - samples, rows, device="cpu"),
        states=StateRuns((0, rows), (NO_STATE,), (0,), decodes=0),
    )


@dataclass(frozen=True, slots=True)
class _Range:
    """Operations of the program that follow each other."""

    first: int
    last: int


@dataclass(frozen=True, slots=True)
class _Layout:
    """The program for so many rows and samples. parts: what is run, one after the other. experts:
    by number of the operation, what computes a layer that C leaves to Python. results: where the
    words that are places in the result point, from its begin; logits: what is in it. beside: views
    of the program's memory."""

    words: np.ndarray
    parts: tuple[_Range | Callable[[Experts], None], ...]
    experts: dict[int, Callable[[Experts], None]]
    results: np.ndarray
    logits: Callable[[Tensor], Tensor]
    nbytes: int
    beside: tuple[Tensor, ...]


class RecordedSteps:
    """Used by one thread.

    Attributes:
        left: operations for which there is no kernel; torch computes them.
        beside: what the walk gave beside logits, until the next `forward`.
    """

    def __init__(self, recorded: RecordedModel) -> None:
        self._compiled: Compiled = compile_calls(recorded.calls, recorded.inputs)
        self.left = tuple(self._compiled.left)
        self._result = recorded.result
        self._beside = recorded.beside
        self.beside: tuple[Tensor, ...] = ()
        self._nbytes = recorded.nbytes
        self._step = StepWords()
        steps = self._compiled.steps
        self._operations: list[Sequence[Word]] = []
        self._numbers: list[int | None] = []  # of the program, for each step
        for step in steps:
            if isinstance(step, list):
                self._numbers.append(len(self._operations))
                self._operations.append(step)
            else:
                self._numbers.append(None)
        result = self._buffer(self._result)
        lives = [(0, len(steps))] * len(self._nbytes)
        stay = {result, *map(self._buffer, self._beside)}
        for buffer, life in self._compiled.lives.items():
            lives[buffer] = life if buffer not in stay else (life[0], len(steps))
        self._program = Program(self._operations, self._nbytes, lives)
        self._result_by_torch = any(
            operand.buffer is not None and self._buffer(operand) == result
            for step in steps
            if isinstance(step, TorchCall | ModuleCall)
            for operand in operands_of(step)
        )
        self._result_words = self._program.words_of(result)
        if self._result_by_torch:
            self._result_words = self._result_words[:0]
        self._room = (0, 0)
        self._places: list[int] = []
        self._memory = torch.empty(0, dtype=torch.uint8, device="cpu")
        self._layouts: dict[tuple[int, int], _Layout] = {}

    def forward(self, batch: ForwardBatch, experts: Experts, native: Native = in_python) -> Tensor:
        """[M, vocab] float32 logits of `batch.sample_rows`.

        experts: computes the layers that `native` does not.
        """
        layout = self._layout(batch.token_ids.shape[0], batch.sample_rows.shape[0])
        kept = self._step.fill(batch)
        result = torch.empty(layout.nbytes, dtype=torch.uint8, device="cpu")
        layout.words[self._result_words] = layout.results + result.data_ptr()
        for part in layout.parts:
            if not isinstance(part, _Range):
                part(experts)
                continue
            at = part.first
            while at < part.last:
                with native() as moe:
                    at = run(layout.words, at, part.last, self._step, moe)
                if at < part.last:
                    layout.experts[at](experts)
                    at += 1
        del kept
        self.beside = layout.beside
        return layout.logits(result)

    # ---- layouts ------------------------------------------------------------------------------

    def _layout(self, rows: int, samples: int) -> _Layout:
        found = self._layouts.get((rows, samples))
        if found is None:
            if rows > self._room[0] or samples > self._room[1]:
                self._make_room(rows, samples)
            elif len(self._layouts) >= _MOST_LAYOUTS:
                del self._layouts[next(iter(self._layouts))]  # the oldest
            found = self._layouts[rows, samples] = self._lay_out(rows, samples)
        return found

    def _make_room(self, rows: int, samples: int) -> None:
        """Memory for up to so many, or more."""
        self._layouts.clear()
        rows, samples = (
            max(old, 8, 1 << (new - 1).bit_length() if new else 0)
            for old, new in zip(self._room, (rows, samples), strict=True)
        )
        self._room = rows, samples
        self._places, size = self._program.places(rows, samples)
        self._memory = torch.zeros(size, dtype=torch.uint8, device="cpu")

    def _lay_out(self, rows: int, samples: int) -> _Layout:
        bases = np.array(self._places, dtype=np.int64) + self._memory.data_ptr()
        words = self._program.laid_out(rows, samples, bases)
        parts: list[_Range | Callable[[Experts], None]] = []
        asked = {
            number: self._experts(self._compiled.asked[at], rows, samples)
            for at, number in enumerate(self._numbers)
            if number is not None and at in self._compiled.asked
        }
        for number, step in zip(self._numbers, self._compiled.steps, strict=True):
            called: Callable[[Experts], None] | None = None
            if isinstance(step, RoutedCall):
                called = self._experts(step, rows, samples)
            elif isinstance(step, TorchCall | ModuleCall):
                called = self._python(step, rows, samples)
            if called is not None:
                parts.append(called)
            elif parts and isinstance(last := parts[-1], _Range) and last.last == number:
                parts[-1] = _Range(last.first, last.last + 1)
            else:
                assert number is not None
                parts.append(_Range(number, number + 1))
        result = self._buffer(self._result)
        at, nbytes = self._places[result], self._nbytes[result].at(rows, samples)
        begins = words[self._result_words] - bases[result]
        sizes, strides, offset = _numbers(self._result, rows, samples)
        held = self._memory[at : at + nbytes]
        by_torch = self._result_by_torch

        def logits(memory: Tensor) -> Tensor:
            given = held.clone() if by_torch else memory
            return given.view(torch.float32).as_strided(sizes, strides, offset)

        beside = tuple(self._view(one, rows, samples) for one in self._beside)
        return _Layout(words, tuple(parts), asked, begins, logits, nbytes, beside)

    def _experts(self, call: RoutedCall, rows: int, samples: int) -> Callable[[Experts], None]:
        x, ids, weights, result = (
            self._view(one, rows, samples)
            for one in (call.source, call.expert_ids, call.weights, call.result)
        )
        layer = getattr(call.layer, "base", call.layer)

        def called(experts: Experts) -> None:
            result.copy_(experts(layer, x, ids, weights, call.gate))

        return called

    def _python(
        self, call: TorchCall | ModuleCall, rows: int, samples: int
    ) -> Callable[[Experts], None]:
        def value(one: Any) -> Any:
            return (
                one.at(rows, samples) if isinstance(one, Affine) else self._view(one, rows, samples)
            )

        args, kwargs = replaced(call.arguments, (Operand, Affine), value)
        args = [list(one) if isinstance(one, tuple) else one for one in args]
        results = [value(one) for one in call.results if one is not None]
        mutable = isinstance(call, TorchCall) and call.function._schema.is_mutable

        def called(experts: Experts) -> None:
            made = call.function(*args, **kwargs)
            if not mutable:
                for place, one in zip(results, tensors_of(made), strict=True):
                    place.copy_(one)

        return called

    def _buffer(self, operand: Any) -> int:
        number: int = operand.buffer.base
        return number

    def _view(self, operand: Any, rows: int, samples: int) -> Tensor:
        """What an operand is in the memory."""
        sizes, strides, offset = _numbers(operand, rows, samples)
        if operand.buffer is None:
            constant: Tensor = operand.constant
            return constant.as_strided(sizes, strides, offset)
        place = self._places[self._buffer(operand)]
        if 0 in sizes:
            return torch.empty(sizes, dtype=operand.dtype, device="cpu")
        memory = self._memory[place:]
        memory = memory[: memory.shape[0] // operand.dtype.itemsize * operand.dtype.itemsize]
        return memory.view(operand.dtype).as_strided(
            sizes, strides, _begin(memory, operand.dtype) + offset
        )


class IdleStep:
    """The layers of experts of a rank that has no tokens, and serves those of its peers."""

    def __init__(self, dtype: torch.dtype, topk: int, gates: Sequence[RowProgram]) -> None:
        """gates: of each layer."""
        self._step = StepWords()
        self._words = np.array(
            [
                experts_operation(layer, (dtype, torch.float32), (0, topk), (0,) * 4, gate)
                for layer, gate in enumerate(gates)
            ],
            dtype=np.int64,
        )

    def walk(self, layer: Callable[[int], object], native: Native, layers: range) -> None:
        """layer: computes one that `native` does not. layers: which are walked."""
        at, last = layers.start, layers.stop
        while at < last:
            with native() as moe:
                at = run(self._words, at, last, self._step, moe)
            if at < last:
                layer(at)
                at += 1


def _numbers(operand: Any, rows: int, samples: int) -> tuple[list[int], list[int], int]:
    """Sizes, strides and offset of an operand."""
    sizes, strides = (
        [one.at(rows, samples) for one in ones] for ones in (operand.sizes, operand.strides)
    )
    return sizes, strides, operand.offset.at(rows, samples)


def _begin(memory: Tensor, dtype: torch.dtype) -> int:
    """Where a part of a memory begins in it, in elements of a dtype."""
    return memory.storage_offset() // dtype.itemsize


EXACT: Final = {
    "_to_copy",
    "abs",
    "arange",
    "argmax",
    "bitwise_and",
    "bitwise_not",
    "bitwise_or",
    "clamp",
    "eq",
    "floor",
    "full_like",
    "gather",
    "ge",
    "gt",
    "index",
    "index_put_",
    "le",
    "lt",
    "masked_fill",
    "max",
    "ne",
    "ones",
    "ones_like",
    "scalar_tensor",
    "scatter",
    "scatter_",
    "stack",
    "topk",
    "where",
    "zeros",
    "zeros_like",
}
"""Operations of torch that give an element the same bits wherever it lies."""


def rounds_by_torch(steps: RecordedSteps) -> tuple[str, ...]:
    """Operations whose results may depend on the batch, because torch computes them."""
    names = {name.partition("::")[2].partition(".")[0] for name in steps.left}
    return tuple(sorted(names - EXACT))


def check(
    steps: RecordedSteps,
    batch: ForwardBatch,
    expected: Tensor,
    experts: Experts,
    *,
    rounding: float,
) -> None:
    """Whether a program gives what the model does. rounding: by how much of its norm a row of
    logits may differ.

    Raises:
        UnsupportedModel: it does not, but for rounding.
    """
    found = steps.forward(batch, experts)
    difference = (found - expected).norm(dim=1)
    if not bool((difference <= rounding * expected.norm(dim=1)).all()):
        raise UnsupportedModel("what was recorded gives something else for another batch")
