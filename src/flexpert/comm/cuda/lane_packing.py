"""What one rank sends another in an exchange, packed for the wire and unpacked again.

Tokens lie in a lane at their places at home, most of them empty: only some have an expert at that
peer. On the wire the rows of those stand one behind the other, in the order of tokens, behind the
slots that say which they are; so both sides know the places without further words.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from flexpert.comm.buffer import BufferSpec, Scales
from flexpert.comm.cuda.cuda_layout import (
    SLOTS_AT,
    layout,
    read_combine_format,
    read_dispatch_format,
    scale_bytes,
)
from flexpert.comm.cuda.host_lane import HostLane
from flexpert.comm.quant import BLOCK
from flexpert.comm.window_layout import align

Array: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"

_UNIT = 64  # where each part of a packed exchange begins


@dataclass(frozen=True, slots=True)
class Dispatched:
    """Who is where in one dispatch.

    tag: of its flag, without the tokens. tokens: of the source. choices: of each. slots:
    [tokens, choices] int32, at the receiver; -1: none.
    """

    tag: int
    tokens: int
    choices: int
    slots: Array

    def places(self, *, home: bool) -> Array:
        """Of the rows that come back: of tokens, or (home) of choices; int64, ascending."""
        there = self.slots >= 0
        return np.flatnonzero(there if home else there.any(1))


class LanePacking:
    """The sizes of one buffer's exchanges, and how they are packed.

    dispatch_bytes, weights_bytes, combine_bytes: the most that one takes.
    """

    def __init__(self, spec: BufferSpec, choices: int) -> None:
        """choices: rows of results a token; see `layout`."""
        self._spec = spec
        self._choices = choices
        self._where = layout(spec, choices=choices)
        tokens, self._row = spec.max_tokens, spec.hidden * spec.dtype.itemsize
        self.weights_bytes = align(tokens * spec.topk * 4, _UNIT)
        scales = align(tokens * (spec.hidden // BLOCK) * 4, _UNIT)
        self.dispatch_bytes = 2 * self.weights_bytes + scales + align(tokens * self._row, _UNIT)
        self.combine_bytes = align(tokens * choices * self._row, _UNIT)

    # ---- dispatch -----------------------------------------------------------------------------

    def pack_dispatch(
        self, lane: HostLane, tag: int, tokens: int, format_word: int, into: int
    ) -> tuple[Dispatched, int, int]:
        """(what it was, rows, bytes written at the address `into`)."""
        choices, row, scales = self._read_dispatch(tokens, format_word)
        size = tokens * choices * 4
        slots_at, weights_at = into, into + align(size, _UNIT)
        ctypes.memmove(slots_at, lane.address + SLOTS_AT, size)
        ctypes.memmove(weights_at, lane.address + self._where.weights_at, size)
        sent = Dispatched(tag, tokens, choices, _over(slots_at, (tokens, choices)).copy())
        places = sent.places(home=False)
        end = weights_at + align(size, _UNIT)
        for at, each in self._of_rows(row, scales):
            _gather(lane.address + at, each, tokens, places, end)
            end += align(len(places) * each, _UNIT)
        return sent, len(places), end - into

    def unpack_dispatch(
        self, source: int, tag: int, tokens: int, format_word: int, rows: int, lane: HostLane
    ) -> Dispatched:
        """Lay out what came at the address `source`.

        Raises: ValueError: it cannot be what was packed.
        """
        choices, row, scales = self._read_dispatch(tokens, format_word)
        size = tokens * choices * 4
        slots = _over(source, (tokens, choices)).copy()
        came = Dispatched(tag, tokens, choices, slots)
        places = came.places(home=False)
        if len(places) != rows:
            raise ValueError(f"{rows} rows for {len(places)} tokens")
        where = self._where
        ctypes.memmove(lane.address + SLOTS_AT, slots.ctypes.data, size)
        ctypes.memmove(lane.address + where.weights_at, source + align(size, _UNIT), size)
        begin = source + 2 * align(size, _UNIT)
        for at, each in self._of_rows(row, scales):
            _scatter(begin, each, tokens, places, lane.address + at)
            begin += align(rows * each, _UNIT)
        return came

    def _read_dispatch(self, tokens: int, word: int) -> tuple[int, int, Scales | None]:
        choices, row, scales = read_dispatch_format(word)
        spec = self._spec
        if not (0 <= tokens <= spec.max_tokens and 1 <= choices <= spec.topk):
            raise ValueError(f"{tokens} tokens of {choices} choices")
        if not 0 <= row <= self._row or (scales and row != spec.hidden):
            raise ValueError(f"rows of {row} bytes")
        return choices, row, scales

    def _of_rows(self, row: int, scales: Scales | None) -> list[tuple[int, int]]:
        """(begin in a lane, bytes a row) of what a token has."""
        parts = [(self._where.scales_at, scale_bytes(self._spec.hidden, scales))] if scales else []
        return [*parts, (self._where.rows_at, row)] if row else parts

    # ---- weights of a combine -------------------------------------------------------------------

    def pack_weights(self, lane: HostLane, sent: Dispatched, into: int) -> int:
        """Bytes written at the address `into`."""
        size = sent.tokens * sent.choices * 4
        ctypes.memmove(into, lane.address + self._where.weights_at, size)
        return size

    def unpack_weights(self, source: int, came: Dispatched, lane: HostLane) -> None:
        size = came.tokens * came.choices * 4
        ctypes.memmove(lane.address + self._where.weights_at, source, size)

    # ---- combine --------------------------------------------------------------------------------

    def pack_combine(
        self, lane: HostLane, came: Dispatched, format_word: int, into: int
    ) -> tuple[int, int]:
        """Results for the tokens that came: (rows, bytes written at the address `into`)."""
        home = self._read_combine(came, format_word)
        places = came.places(home=home)
        count = came.tokens * (came.choices if home else 1)
        _gather(lane.address + self._where.results_at, self._row, count, places, into)
        return len(places), len(places) * self._row

    def unpack_combine(
        self,
        source: int,
        sent: Dispatched,
        format_word: int,
        rows: int,
        lane: HostLane,
    ) -> None:
        """Raises: ValueError: it cannot be what was packed."""
        home = self._read_combine(sent, format_word)
        places = sent.places(home=home)
        if len(places) != rows:
            raise ValueError(f"{rows} results for {len(places)} rows")
        count = sent.tokens * (sent.choices if home else 1)
        _scatter(source, self._row, count, places, lane.address + self._where.results_at)

    def _read_combine(self, dispatched: Dispatched, word: int) -> bool:
        choices, home = read_combine_format(word)
        if choices != dispatched.choices or (home and choices > self._choices):
            raise ValueError(f"results of {choices} choices for {dispatched.choices}")
        return home


def _over(address: int, shape: tuple[int, int]) -> Array:
    """[…] int32 at an address."""
    return _bytes(address, shape[0] * shape[1] * 4).view(np.int32).reshape(shape)


def _bytes(address: int, size: int) -> Array:
    memory = (ctypes.c_ubyte * size).from_address(address)
    return np.frombuffer(memoryview(memory), dtype=np.uint8)


def _gather(source: int, row: int, count: int, places: Array, target: int) -> None:
    """Rows of `count` at these places, one behind the other."""
    if len(places) == count:
        ctypes.memmove(target, source, count * row)
    elif len(places):
        rows = _bytes(source, count * row).reshape(count, row)
        into = _bytes(target, len(places) * row).reshape(len(places), row)
        np.take(rows, places, axis=0, out=into, mode="clip")  # else it goes through a copy


def _scatter(source: int, row: int, count: int, places: Array, target: int) -> None:
    """The reverse of `_gather`."""
    if len(places) == count:
        ctypes.memmove(target, source, count * row)
    elif len(places):
        rows = _bytes(source, len(places) * row).reshape(len(places), row)
        _bytes(target, count * row).reshape(count, row)[places] = rows
