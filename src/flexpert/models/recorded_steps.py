"""Steps on a CPU without transformers' modules: a program recorded once, walked for any batch.

What CUDA graphs are on a GPU. The program knows neither who holds which expert nor how many ranks
there are: at each layer of experts it asks the runtime, as transformers' modules do. So it outlives
every change.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from flexpert.errors import UnsupportedModel
from flexpert.kernels.affine import Affine, fit
from flexpert.kernels.cpu.program import WIDTH, Program, StepWords, Word, run
from flexpert.models.batch import ForwardBatch
from flexpert.models.recording import (
    ExpertsCall,
    Operand,
    Recording,
    TorchCall,
    replaced,
    tensors_of,
)
from flexpert.models.step_compiler import Compiled, LinearStep, compile_calls

_TAKES: Final = ((5, 3), (6, 3), (6, 4), (9, 2))
"""Rows and samples of the batches that are recorded; see `fit`."""

_MOST_LAYOUTS: Final = 64

Experts = Callable[[int, Tensor, Tensor, Tensor, Any], Tensor]
"""(layer, x, expert ids, weights, gate) → what all experts give; see `MoELayers.forward`."""


@dataclass(frozen=True, slots=True)
class RecordedModel:
    """A walk as calls with affine sizes. inputs: tokens, positions, sample rows; result: logits,
    float32 [samples, vocab]."""

    calls: tuple[Any, ...]
    nbytes: tuple[Affine, ...]
    inputs: tuple[Any, ...]
    result: Any


def record(walk: Callable[[Tensor, Tensor, Tensor], Tensor]) -> RecordedModel:
    """walk: (tokens, positions, sample rows) → logits, of a batch that exists for the trial.

    Raises:
        UnsupportedModel: what the model computes is not the same list for every batch.
    """
    takes = {}
    for rows, samples in _TAKES:
        inputs = trial_inputs(rows, samples)
        recording = Recording(inputs)
        with torch.no_grad(), recording:
            result = walk(*inputs)
            takes[rows, samples] = RecordedModel(
                tuple(recording.calls),
                tuple(recording.nbytes),
                tuple(recording.operand(one) for one in inputs),
                recording.operand(result),
            )
    return fit(takes)  # type: ignore[type-var]


def trial_inputs(rows: int, samples: int, *, stride: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, positions and sample rows of one short sequence. stride: of positions."""
    tokens = torch.arange(rows, device="cpu") * 7 % 11 + 2
    positions = torch.arange(rows, device="cpu") * stride
    return tokens, positions, torch.arange(rows - samples, rows, device="cpu")


@dataclass(frozen=True, slots=True)
class _Range:
    """Operations of the program that follow each other."""

    first: int
    last: int


@dataclass(frozen=True, slots=True)
class _Layout:
    """The program for so many rows and samples. parts: what is run, one after the other."""

    words: np.ndarray
    parts: tuple[_Range | Callable[[Experts], None], ...]
    logits: Tensor


class RecordedSteps:
    """Used by one thread.

    Args:
        recorded: see `record`.
        by_torch: whether torch computes a product, by rows and the bytes of the weight.

    Attributes:
        left: operations for which there is no kernel; torch computes them.
    """

    def __init__(self, recorded: RecordedModel, *, by_torch: Callable[[int, int], bool]) -> None:
        self._compiled: Compiled = compile_calls(recorded.calls, recorded.inputs)
        self.left = tuple(self._compiled.left)
        self._by_torch = by_torch
        self._result = recorded.result
        self._nbytes = recorded.nbytes
        self._step = StepWords()
        steps = self._compiled.steps
        self._operations: list[Sequence[Word]] = []
        self._numbers: list[int | None] = []  # of the program, for each step
        for step in steps:
            operation = step.operation if isinstance(step, LinearStep) else step
            if isinstance(operation, list):
                self._numbers.append(len(self._operations))
                self._operations.append(operation)
            else:
                self._numbers.append(None)
        result = self._buffer(self._result)
        lives = [(0, len(steps))] * len(self._nbytes)
        for buffer, life in self._compiled.lives.items():
            lives[buffer] = life if buffer != result else (life[0], len(steps))
        self._program = Program(self._operations, self._nbytes, lives)
        self._rows = 0
        self._places: list[int] = []
        self._memory = torch.empty(0, dtype=torch.uint8, device="cpu")
        self._layouts: dict[tuple[int, int], _Layout] = {}

    def forward(self, batch: ForwardBatch, experts: Experts) -> Tensor:
        """[M, vocab] float32 logits of `batch.sample_rows`, valid until the next call."""
        layout = self._layout(batch.token_ids.shape[0], batch.sample_rows.shape[0])
        tensors = {
            name: getattr(batch, name).contiguous()
            for name in StepWords.NAMES
            if name not in ("sequences", "max_blocks")
        }
        self._step.fill(tensors)
        for part in layout.parts:
            if isinstance(part, _Range):
                run(layout.words, part.first, part.last, self._step)
            else:
                part(experts)
        return layout.logits

    # ---- layouts ------------------------------------------------------------------------------

    def _layout(self, rows: int, samples: int) -> _Layout:
        found = self._layouts.get((rows, samples))
        if found is None:
            if rows > self._rows or len(self._layouts) >= _MOST_LAYOUTS:
                self._make_room(rows)
            found = self._layouts[rows, samples] = self._lay_out(rows, samples)
        return found

    def _make_room(self, rows: int) -> None:
        """Memory for up to so many rows, or more."""
        self._layouts.clear()
        if rows <= self._rows:
            return
        self._rows = max(8, 1 << (rows - 1).bit_length())
        self._places, size = self._program.places(self._rows, self._rows)
        self._memory = torch.zeros(size + 64, dtype=torch.uint8, device="cpu")
        skip = -self._memory.data_ptr() % 64
        self._memory = self._memory[skip : skip + size]

    def _lay_out(self, rows: int, samples: int) -> _Layout:
        bases = np.array(self._places, dtype=np.int64) + self._memory.data_ptr()
        words = self._program.laid_out(rows, samples, bases)
        parts: list[_Range | Callable[[Experts], None]] = []
        for number, step in zip(self._numbers, self._compiled.steps, strict=True):
            called: Callable[[Experts], None] | None = None
            if isinstance(step, ExpertsCall):
                called = self._experts(step, rows, samples)
            elif isinstance(step, TorchCall):
                called = self._torch(step, rows, samples)
            elif isinstance(step, LinearStep):
                count = int(words[(number or 0) * WIDTH + 3])
                if self._by_torch(count, step.weight.nbytes):
                    called = self._product(step, rows, samples)
            if called is not None:
                parts.append(called)
            elif parts and isinstance(last := parts[-1], _Range) and last.last == number:
                parts[-1] = _Range(last.first, last.last + 1)
            else:
                assert number is not None
                parts.append(_Range(number, number + 1))
        return _Layout(words, tuple(parts), self._view(self._result, rows, samples))

    def _experts(self, call: ExpertsCall, rows: int, samples: int) -> Callable[[Experts], None]:
        x, ids, weights, result = (
            self._view(one, rows, samples)
            for one in (call.source, call.expert_ids, call.weights, call.result)
        )
        layer = getattr(call.layer, "base", call.layer)

        def called(experts: Experts) -> None:
            result.copy_(experts(layer, x, ids, weights, call.gate))

        return called

    def _product(self, step: LinearStep, rows: int, samples: int) -> Callable[[Experts], None]:
        x, result = (self._view(one, rows, samples) for one in (step.source, step.result))

        def called(experts: Experts) -> None:
            result.copy_(F.linear(x, step.weight, step.bias).view(result.shape))

        return called

    def _torch(self, call: TorchCall, rows: int, samples: int) -> Callable[[Experts], None]:
        def value(one: Any) -> Any:
            return one.at(rows, samples) if isinstance(one, Affine) else self._view(one, rows, samples)

        args, kwargs = replaced(call.arguments, (Operand, Affine), value)
        args = [list(one) if isinstance(one, tuple) else one for one in args]
        results = [value(one) for one in call.results if one is not None]
        mutable = call.function._schema.is_mutable

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
        sizes, strides = (
            [one.at(rows, samples) for one in ones] for ones in (operand.sizes, operand.strides)
        )
        offset = operand.offset.at(rows, samples)
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


def _begin(memory: Tensor, dtype: torch.dtype) -> int:
    """Where a part of a memory begins in it, in elements of a dtype."""
    return memory.storage_offset() // dtype.itemsize


def check(steps: RecordedSteps, batch: ForwardBatch, expected: Tensor, experts: Experts) -> None:
    """Whether a program gives what the model does.

    Raises:
        UnsupportedModel: it does not, but for rounding.
    """
    found = steps.forward(batch, experts)
    difference = (found - expected).norm(dim=1)
    if not bool((difference <= 0.05 * expected.norm(dim=1)).all()):
        raise UnsupportedModel("what was recorded gives something else for another batch")
