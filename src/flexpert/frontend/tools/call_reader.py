"""Text that comes in pieces, read by a grammar as if it were whole.

A grammar is a generator that yields whenever it needs more text. What it finds depends on the whole
text alone, and not on how that was cut: wherever the next characters could decide otherwise, it
waits for them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Sequence
from typing import TypeVar

T = TypeVar("T")
Reading = Generator[None, None, T]
"""A part of a grammar; its value is what it returns."""
Emit = Callable[[str], None]

_SCALAR = re.compile(r"[-+.\w]*")
_IN_STRING = re.compile(r'[^"\\]*')
_LAYOUT = frozenset(" \t\r\n,:")
_CLOSER = {"{": "}", "[": "]"}


def nowhere(_text: str) -> None:
    """Emits nothing."""


class CallReader:
    """The text that has come and is not read yet.

    log: where a list, everything that is read is appended to it, so that it can be given back.
    """

    def __init__(self) -> None:
        self._rest = ""
        self._over = False
        self.log: list[str] | None = None

    def push(self, text: str) -> None:
        """More has come."""
        self._rest += text

    def finish(self) -> None:
        """No more comes."""
        self._over = True

    def unread(self, text: str) -> None:
        """It is read again."""
        self._rest = text + self._rest

    def until(self, markers: Sequence[str], emit: Emit) -> Reading[str | None]:
        """Emit what comes before the first of the markers, and read that.

        Returns: the marker; None: there is none up to the end.
        """
        while True:
            found = [(at, marker) for marker in markers if (at := self._rest.find(marker)) >= 0]
            open_at = len(self._rest) - _may_begin(self._rest, markers)
            if found and (self._over or min(found)[0] <= open_at):
                at, marker = min(found)
                self._emit(at, emit)
                self._read(len(marker))
                return marker
            if self._over:
                self._emit(len(self._rest), emit)
                return None
            self._emit(open_at, emit)
            yield

    def take(self, markers: Sequence[str]) -> Reading[tuple[str, str | None]]:
        """As `until`, with the text in one piece."""
        pieces: list[str] = []
        marker = yield from self.until(markers, pieces.append)
        return "".join(pieces), marker

    def space(self) -> Reading[str]:
        """Read white space; it is returned."""
        pieces = []
        while True:
            solid = len(self._rest.lstrip())
            if space := self._read(len(self._rest) - solid):
                pieces.append(space)
            if solid or self._over:
                return "".join(pieces)
            yield

    def next_is(self, text: str) -> Reading[bool]:
        """Whether that follows; it is not read."""
        while not self._over and len(self._rest) < len(text) and text.startswith(self._rest):
            yield
        return self._rest.startswith(text)

    def literal(self, text: str) -> Reading[bool]:
        """Read that text if it follows."""
        follows = yield from self.next_is(text)
        if follows:
            self._read(len(text))
        return follows

    def json_value(self, emit: Emit) -> Reading[bool]:
        """Emit a JSON value, as it is written.

        Returns: it is complete. Else what follows, if anything does, cannot belong to one.
        """
        closers: list[str] = []
        while True:
            while not self._rest:
                if self._over:
                    return False
                yield
            character = self._rest[0]
            if character in _CLOSER:
                closers.append(_CLOSER[character])
                self._emit(1, emit)
            elif character == '"':
                whole = yield from self._string(emit)
                if not whole:
                    return False
            elif closers and character == closers[-1]:
                closers.pop()
                self._emit(1, emit)
            elif closers and character in _LAYOUT:
                self._emit(1, emit)
                continue
            else:
                whole = yield from self._scalar(emit)
                if not whole:
                    return False
            if not closers:
                return True

    def _string(self, emit: Emit) -> Reading[bool]:
        self._emit(1, emit)
        while True:
            found = _IN_STRING.match(self._rest)
            self._emit(found.end() if found else 0, emit)
            if self._rest.startswith('"'):
                self._emit(1, emit)
                return True
            if len(self._rest) > 1:  # an escape
                self._emit(2, emit)
            elif self._over:
                self._emit(len(self._rest), emit)
                return False
            else:
                yield

    def _scalar(self, emit: Emit) -> Reading[bool]:
        read = 0
        while True:
            found = _SCALAR.match(self._rest)
            end = found.end() if found else 0
            more = end == len(self._rest) and not self._over
            read += end
            self._emit(end, emit)
            if not more:
                return read > 0
            yield

    def _emit(self, count: int, emit: Emit) -> None:
        if count:
            emit(self._read(count))

    def _read(self, count: int) -> str:
        text, self._rest = self._rest[:count], self._rest[count:]
        if self.log is not None:
            self.log.append(text)
        return text


def _may_begin(text: str, markers: Sequence[str]) -> int:
    """Length of the longest end of `text` with which a marker begins, but is not complete."""
    longest = max(map(len, markers), default=1) - 1
    for length in range(min(longest, len(text)), 0, -1):
        end = text[-length:]
        if any(len(marker) > length and marker.startswith(end) for marker in markers):
            return length
    return 0
