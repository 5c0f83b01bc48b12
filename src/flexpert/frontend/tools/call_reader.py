"""Text that comes in pieces, read by a grammar as if it were whole.

A grammar is a generator that yields whenever it needs more text. What it finds depends on the whole
text alone, and not on how that was cut: wherever the next characters could decide otherwise, it
waits for them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Sequence
from functools import lru_cache
from typing import TypeVar

T = TypeVar("T")
Reading = Generator[None, None, T]
"""A part of a grammar; its value is what it returns."""
Emit = Callable[[str], None]

_SPACE = re.compile(r"\s*")
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
        self._text = ""
        self._at = 0  # what is before it is read
        self._over = False
        self.log: list[str] | None = None

    def push(self, text: str) -> None:
        """More has come."""
        self._text = self._text[self._at :] + text
        self._at = 0

    def finish(self) -> None:
        """No more comes."""
        self._over = True

    def unread(self, text: str) -> None:
        """What was read last is read again."""
        self._text = text + self._text[self._at :] if self._at < len(text) else self._text
        self._at = max(0, self._at - len(text))

    def until(self, markers: Sequence[str], emit: Emit) -> Reading[str | None]:
        """Emit what comes before the first of the markers, and read that.

        Returns: the marker; None: there is none up to the end.
        """
        pattern = _any_of(tuple(markers))
        while True:
            found = pattern.search(self._text, self._at) if markers else None
            open_at = len(self._text) - self._may_begin(markers)
            if found and (self._over or found.start() <= open_at):
                self._emit(found.start() - self._at, emit)
                self._read(len(found[0]))
                return found[0]
            if self._over:
                self._emit(self._left, emit)
                return None
            self._emit(open_at - self._at, emit)
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
            found = _SPACE.match(self._text, self._at)
            if space := self._read(found.end() - self._at if found else 0):
                pieces.append(space)
            if self._left or self._over:
                return "".join(pieces)
            yield

    def next_is(self, text: str) -> Reading[bool]:
        """Whether that follows; it is not read."""
        while not self._over and self._left < len(text):
            if not text.startswith(self._text[self._at :]):
                break
            yield
        return self._text.startswith(text, self._at)

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
            while not self._left:
                if self._over:
                    return False
                yield
            character = self._text[self._at]
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
            found = _IN_STRING.match(self._text, self._at)
            self._emit(found.end() - self._at if found else 0, emit)
            if self._text.startswith('"', self._at):
                self._emit(1, emit)
                return True
            if self._left > 1:  # an escape
                self._emit(2, emit)
            elif self._over:
                self._emit(self._left, emit)
                return False
            else:
                yield

    def _scalar(self, emit: Emit) -> Reading[bool]:
        read = 0
        while True:
            found = _SCALAR.match(self._text, self._at)
            length = found.end() - self._at if found else 0
            more = length == self._left and not self._over
            read += length
            self._emit(length, emit)
            if not more:
                return read > 0
            yield

    def _emit(self, count: int, emit: Emit) -> None:
        if count:
            emit(self._read(count))

    def _read(self, count: int) -> str:
        text = self._text[self._at : self._at + count]
        self._at += count
        if self.log is not None and text:
            self.log.append(text)
        return text

    @property
    def _left(self) -> int:
        return len(self._text) - self._at

    def _may_begin(self, markers: Sequence[str]) -> int:
        """Length of the longest end of what is left with which a marker begins, but is not
        complete."""
        longest = max(map(len, markers), default=1) - 1
        for length in range(min(longest, self._left), 0, -1):
            end = self._text[-length:]
            if any(len(marker) > length and marker.startswith(end) for marker in markers):
                return length
        return 0


@lru_cache(64)
def _any_of(markers: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, markers)))
