"""Work on many pieces in a few threads, which end together."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Final, Generic, TypeVar

Piece = TypeVar("Piece")

MOST_THREADS: Final = 8
"""A few copy as fast as the memory gives; more would take cores from ranks that serve."""


def read_threads() -> int:
    """How many threads should read: one for each core this process may use, but not many."""
    return min(MOST_THREADS, len(os.sched_getaffinity(0)))


def run_parallel(pieces: Sequence[Piece], work: Callable[[Piece], None], threads: int) -> None:
    """Call `work` with each piece once, in up to `threads` threads, of which the caller is one.

    If it fails with one, the others end after the piece that they are at. All have ended when
    this returns or raises.

    Raises: the first error.
    """
    shared = _Pieces(pieces)

    def run() -> None:
        for piece in shared.take():
            try:
                work(piece)
            except BaseException as error:  # noqa: BLE001 - raised below
                shared.fail(error)

    others = []
    try:
        for number in range(min(threads, len(pieces)) - 1):
            other = threading.Thread(target=run, name=f"read-{number}", daemon=True)
            try:
                other.start()
            except RuntimeError:
                break  # the process may have no more threads: fewer do as well
            others.append(other)
        run()
    finally:
        shared.stop()
        for other in others:
            other.join()
    if shared.error is not None:
        raise shared.error


class _Pieces(Generic[Piece]):
    """Those that nobody has taken yet, and the first error."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self._lock = threading.Lock()
        self._left = iter(pieces)
        self._stopped = False
        self.error: BaseException | None = None

    def take(self) -> Iterator[Piece]:
        while True:
            with self._lock:
                if self._stopped:
                    return
                try:
                    piece = next(self._left)
                except StopIteration:
                    return
            yield piece

    def fail(self, error: BaseException) -> None:
        with self._lock:
            self._stopped = True
            self.error = self.error or error

    def stop(self) -> None:
        with self._lock:
            self._stopped = True
