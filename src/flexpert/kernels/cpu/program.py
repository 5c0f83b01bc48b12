"""Lists of operations for program.c: built once, laid out for each number of rows and samples.

An operation's words are affine in both numbers (`Affine`), but for addresses, to which the place of
a buffer comes. Buffers share memory as far as their lives do not overlap.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
import torch
from torch import Tensor

from flexpert.kernels.affine import Affine
from flexpert.kernels.cpu import ops

WIDTH: Final = 32
DIMS: Final = 5
_ALIGN: Final = 64  # bytes

DTYPES: Final = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.int64: 2,
    torch.int32: 3,
    torch.bool: 4,
}
"""As program.c numbers them."""

_NAMES: Final = (
    "inputs copy neg silu sigmoid exp cos sin rsqrt tanh relu gelu gelu_tanh square sqrt "
    "reciprocal softplus add sub mul div maximum minimum clamp sum mean softmax linear norm rows "
    "attention topk experts"
)
OPERATIONS: Final = {name: number for number, name in enumerate(_NAMES.split())}
"""In program.c's order."""


@dataclass(frozen=True, slots=True)
class Address:
    """Of a byte in a buffer."""

    buffer: int
    offset: Affine


Word = int | Affine | Address


def experts_operation(
    layer: Word,
    dtypes: tuple[torch.dtype, torch.dtype],
    sizes: Sequence[Word],
    addresses: Sequence[Word],
    gate: RowProgram,
) -> list[Word]:
    """A layer of experts (experts.c).

    dtypes: of x and of the weights. sizes: tokens, choices. addresses: of the result, x, expert ids
    and weights; all contiguous.
    """
    op: list[Word] = [0] * WIDTH
    op[0], op[2] = OPERATIONS["experts"], layer
    op[1] = DTYPES[dtypes[0]] | DTYPES[dtypes[1]] << 8
    op[3:5] = sizes
    op[8], op[14], op[20], op[26] = addresses
    op[27] = gate.address
    return op


MOST_BUFFERS: Final = 64
"""Of a `RowProgram`."""


def scalar(value: float) -> int:
    """A float64 as a word."""
    return int(struct.unpack("<q", struct.pack("<d", value))[0])


class Program:
    """Operations, and where their buffers lie.

    Args:
        operations: of at most WIDTH words each.
        nbytes: of each buffer.
        lives: of each buffer, the first and last position at which it is in use.
    """

    def __init__(
        self,
        operations: Sequence[Sequence[Word]],
        nbytes: Sequence[Affine],
        lives: Sequence[tuple[int, int]],
    ) -> None:
        self._coefficients = np.zeros((len(operations) * WIDTH, 3), dtype=np.int64)
        words, buffers = [], []
        for number, operation in enumerate(operations):
            for place, word in enumerate(operation):
                at = number * WIDTH + place
                if isinstance(word, Address):
                    words.append(at)
                    buffers.append(word.buffer)
                    word = word.offset
                if isinstance(word, Affine):
                    self._coefficients[at] = word.base, word.per_row, word.per_sample
                else:
                    self._coefficients[at, 0] = word
        self._words = np.array(words, dtype=np.int64)
        self._buffers = np.array(buffers, dtype=np.int64)
        self._nbytes = list(nbytes)
        self._lives = list(lives)

    def places(self, rows: int, samples: int) -> tuple[list[int], int]:
        """The offset of each buffer in one memory, for up to so many; and the size of that."""
        sizes = [one.at(rows, samples) for one in self._nbytes]
        order = sorted(range(len(sizes)), key=lambda one: self._lives[one][0])
        offsets = [0] * len(sizes)
        held: list[int] = []  # buffers in use, by their offset
        whole = 0
        for one in order:
            begin = self._lives[one][0]
            held = [other for other in held if self._lives[other][1] >= begin]
            size = max(-(-sizes[one] // _ALIGN) * _ALIGN, _ALIGN)
            at = 0
            for place, other in enumerate(held):
                if offsets[other] - at >= size:
                    held.insert(place, one)
                    break
                end = offsets[other] + max(-(-sizes[other] // _ALIGN) * _ALIGN, _ALIGN)
                at = max(at, end)
            else:
                held.append(one)
            offsets[one] = at
            whole = max(whole, at + size)
        return offsets, whole

    def words_of(self, buffer: int) -> np.ndarray:
        """[n] positions of the words that are addresses in a buffer."""
        found: np.ndarray = self._words[self._buffers == buffer]
        return found

    def laid_out(self, rows: int, samples: int, bases: np.ndarray) -> np.ndarray:
        """[operations · WIDTH] int64 for this size. bases: the address of each buffer."""
        words: np.ndarray = self._coefficients @ np.array([1, rows, samples], dtype=np.int64)
        words[self._words] += bases[self._buffers]
        return words


class ProgramInputs(Protocol):
    """What a step of serving has beside a program; see `ForwardBatch`."""

    query_start: Tensor
    context_len: Tensor
    block_tables: Tensor
    slot_mapping: Tensor
    token_ids: Tensor
    positions: Tensor
    sample_rows: Tensor


class StepWords:
    """What program.c reads of a step, in one array."""

    def __init__(self) -> None:
        self.array = ops.ffi.new("int64_t[]", _STEP_WORDS)
        self.address = int(ops.ffi.cast("intptr_t", self.array))

    def fill(self, step: ProgramInputs) -> list[Tensor]:
        """Returns what must be kept while it is used."""
        given = (
            step.query_start,
            step.context_len,
            step.block_tables,
            step.slot_mapping,
            step.token_ids,
            step.positions,
            step.sample_rows,
        )
        kept = [one.contiguous() for one in given]
        array, addresses = self.array, [one.data_ptr() for one in kept]
        array[0:4] = addresses[:4]
        array[4] = step.context_len.shape[0]
        array[5] = step.block_tables.shape[1]
        array[6:9] = addresses[4:]
        return kept


_STEP_WORDS: Final = 10
_MOE: Final = 9
"""In program.c's order."""


def run(words: np.ndarray, first: int, last: int, step: StepWords, moe: int) -> int:
    """Operations first … last - 1 of what `laid_out` gave, as far as Python need not be asked.

    moe: address of a `moe_step` (tables.h); 0: Python is asked for all layers of experts.

    Returns: the layer of experts that is next, and not done; last: all are done.

    Raises:
        MemoryError: none for the scratch of a kernel.
        IndexError: a number of a token or row that does not exist.
        ExchangeStopped: in the middle of an exchange.
    """
    step.array[_MOE] = moe
    reached: int = ops.lib.fx_run(words.ctypes.data, first, last, step.address)
    if reached >= 0:
        return reached
    _raise(reached)
    raise ExchangeStopped


class ExchangeStopped(Exception):  # noqa: N818 - it is replaced by what stopped it
    """Why, says `Buffer.native` when it is left."""


def _raise(failed: int) -> None:
    if failed == -1:
        raise MemoryError("no memory for the scratch of a CPU kernel")
    if failed == -2:
        raise IndexError("a token or row that does not exist")


class RowProgram:
    """Operations that make one row of each row, called without Python (`row_program` in tables.h).

    Args:
        operations: of at most WIDTH words each, affine in the number of rows.
        nbytes: of each buffer; at most MOST_BUFFERS.
        source, result: buffers; both contiguous rows.
        result_row: elements of a row of the result.
        kept: what must live as long.

    address: of the C struct.
    """

    def __init__(
        self,
        operations: Sequence[Sequence[Word]],
        nbytes: Sequence[Affine],
        *,
        source: int,
        result: int,
        result_row: int,
        kept: Sequence[Tensor] = (),
    ) -> None:
        if len(nbytes) > MOST_BUFFERS:
            raise ValueError(f"{len(nbytes)} buffers; there is room for {MOST_BUFFERS}")
        words = np.zeros((len(operations), WIDTH, 2), dtype=np.int64)
        owners = np.full((len(operations), WIDTH), -1, dtype=np.int32)
        for number, operation in enumerate(operations):
            for place, word in enumerate(operation):
                if isinstance(word, Address):
                    owners[number, place] = word.buffer
                    word = word.offset
                affine = word if isinstance(word, Affine) else Affine(word)
                words[number, place] = affine.base, affine.per_row
        sizes = np.array([[one.base, one.per_row] for one in nbytes], dtype=np.int64)
        self._kept = words, owners, sizes, tuple(kept)
        self._result_row = result_row
        self._struct = ops.ffi.new("row_program *")
        struct = self._struct
        struct.operations, struct.buffers = len(operations), len(nbytes)
        struct.words, struct.owners = words.ctypes.data, owners.ctypes.data
        struct.sizes = sizes.ctypes.data
        struct.source, struct.result = source, result
        self.address = int(ops.ffi.cast("intptr_t", struct))

    def __call__(self, x: Tensor) -> Tensor:
        """x: [rows, …], contiguous → [rows, result_row] of x's dtype."""
        rows = x.shape[0]
        y = x.new_empty((rows, self._result_row))
        _raise(ops.lib.fx_run_rows(self._struct, x.data_ptr(), y.data_ptr(), rows))
        return y
