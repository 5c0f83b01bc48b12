"""Keys and values in memory that two processes have open: the calls of a torch `Store` that count.

Not torch's `FileStore`, which opens its path again and again, even when it is destroyed: a path
through /proc/self/fd may lead to another file by then.

The memory holds a header, where the content is and how long, and the content. A change writes the
new content next to the old one and then the header, in one call: who is killed in between leaves
the old content. One at a time: the lock (flock) of who is killed is free.
"""

from __future__ import annotations

import fcntl
import os
import struct
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

import msgspec

from flexpert.comm.errors import CommError

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

_HEADER = struct.Struct("<QQ")  # begin and length of the content
_LOCK_LIMIT_S = 10.0
_FIRST_NAP_S, _LONGEST_NAP_S = 0.0005, 0.02


class SharedStore:
    """Has the descriptor from now on. Callable from any thread.

    Raises, from every call: CommError: it is closed, or a process that was stopped in a call keeps
        the others out.
    """

    def __init__(self, fd: int) -> None:
        """fd: of a memfd that belongs to nobody else's open file: it has the lock's owner."""
        self._fd = fd
        self._lock = threading.Lock()

    def close(self) -> None:
        """Idempotent."""
        with self._lock:
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1

    # ---- as torch's Store -----------------------------------------------------------------------

    def set(self, key: str, value: str | bytes) -> None:
        with self._opened() as values:
            values[key] = _bytes(value)
            self._write(values)

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        """What the key holds afterwards; `expected` if it is missing and that is not empty."""
        with self._opened() as values:
            found = values.get(key, b"")
            if found != expected.encode():
                return found or expected.encode()
            values[key] = desired.encode()
            self._write(values)
            return values[key]

    def delete_key(self, key: str) -> bool:
        """Whether there was one."""
        with self._opened() as values:
            found = values.pop(key, None) is not None
            if found:
                self._write(values)
            return found

    def check(self, keys: Iterable[str]) -> bool:
        """Whether all of them are there."""
        with self._opened() as values:
            return set(keys) <= set(values)

    def wait(self, keys: Sequence[str], timeout: timedelta) -> None:
        """Until all of them are there. Raises: TimeoutError."""
        deadline = time.monotonic() + timeout.total_seconds()
        for _ in _naps(deadline):
            if self.check(keys):
                return
        raise TimeoutError(f"no {', '.join(keys)} within {timeout.total_seconds():g} s")

    def multi_get(self, keys: Iterable[str]) -> list[bytes]:
        """Raises: KeyError: one is missing."""
        with self._opened() as values:
            return [values[key] for key in keys]

    # ---- the memory -----------------------------------------------------------------------------

    @contextmanager
    def _opened(self) -> Iterator[dict[str, bytes]]:
        with self._lock:
            if self._fd < 0:
                raise CommError("the store that ranks meet through is closed")
            self._take()
            try:
                begin, size = self._header()
                content = os.pread(self._fd, size, begin)
                yield msgspec.msgpack.decode(content, type=dict[str, bytes]) if size else {}
            finally:
                fcntl.flock(self._fd, fcntl.LOCK_UN)

    def _take(self) -> None:
        for _ in _naps(time.monotonic() + _LOCK_LIMIT_S):
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            return
        raise CommError("a rank that was stopped keeps the others out of the store they meet in")

    def _header(self) -> tuple[int, int]:
        header = os.pread(self._fd, _HEADER.size, 0)
        begin, size = _HEADER.unpack(header) if header else (_HEADER.size, 0)
        return begin, size

    def _write(self, values: dict[str, bytes]) -> None:
        content = msgspec.msgpack.encode(values)
        begin, size = self._header()
        room = begin - _HEADER.size
        at = _HEADER.size if len(content) <= room else begin + size
        if os.pwrite(self._fd, content, at) != len(content):
            raise CommError("no memory for the store that ranks meet through")
        os.pwrite(self._fd, _HEADER.pack(at, len(content)), 0)


class Under:
    """The same calls of a store, this one or torch's, with a prefix before every key."""

    def __init__(self, prefix: str, store: SharedStore | Store) -> None:
        self._prefix = f"{prefix}/"
        self._store = store

    def set(self, key: str, value: str | bytes) -> None:
        self._store.set(self._prefix + key, value)  # type: ignore[arg-type]  # torch's takes bytes

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        return self._store.compare_set(self._prefix + key, expected, desired)

    def delete_key(self, key: str) -> bool:
        return self._store.delete_key(self._prefix + key)

    def check(self, keys: Iterable[str]) -> bool:
        return self._store.check([self._prefix + key for key in keys])

    def wait(self, keys: Iterable[str], timeout: timedelta) -> None:
        self._store.wait([self._prefix + key for key in keys], timeout)

    def multi_get(self, keys: Iterable[str]) -> list[bytes]:
        return self._store.multi_get([self._prefix + key for key in keys])


def _naps(deadline: float) -> Iterator[None]:
    """At once, then after longer and longer naps until the time is over."""
    nap_s = _FIRST_NAP_S
    while True:
        yield
        if time.monotonic() >= deadline:
            return
        time.sleep(nap_s)
        nap_s = min(1.5 * nap_s, _LONGEST_NAP_S)


def _bytes(value: str | bytes) -> bytes:
    return value.encode() if isinstance(value, str) else value
