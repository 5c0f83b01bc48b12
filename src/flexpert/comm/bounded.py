"""A torch `Store` whose calls come back, for those who must not wait for ever.

A TCPStore's calls have no limit of their own: while its server is stopped or cut off, even `check`
and `compare_set` sleep in C++, where not even Ctrl-C reaches them. As the server mostly lives in
one of the ranks, it stops just when the others have to agree. So the calls are made by a thread
that can be left behind.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Protocol

from flexpert.comm.errors import CommError

_GRACE_S = 1.0  # for what must still be read or tidied up when the time is over
_WAKING_S = 0.2  # for an answer that came while this process was stopped itself

_Job = tuple["Future[Any]", Callable[[], Any]]


class StoreKeys(Protocol):
    """A torch `Store`, or what else has these calls of it."""

    def set(self, key: str, value: str, /) -> None: ...
    def compare_set(self, key: str, expected: str, desired: str, /) -> bytes: ...
    def delete_key(self, key: str, /) -> bool: ...


class BoundedStore:
    """The calls that `meet` and `agree` need, with one deadline for all of them.

    Use it in a `with`, which ends its thread. A thread that is still in a call then goes on until
    the server answers or its connection ends.

    Raises, from every call: CommError: no answer within `timeout_s`, counted from the beginning,
        and little more than a second. After that all calls fail at once. What the store raises, it
        raises.
    """

    def __init__(self, store: StoreKeys, timeout_s: float) -> None:
        self._store = store
        self._began = time.monotonic()
        self._timeout_s = timeout_s
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._silent = ""
        self._thread = threading.Thread(
            target=_work, args=(self._jobs,), name="flexpert-store", daemon=True
        )

    def __enter__(self) -> BoundedStore:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._jobs.put(None)
        if not self._silent:
            self._thread.join(_GRACE_S)

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        """What the key holds afterwards; `expected` if it is missing and that is not empty."""
        value: bytes = self._call(lambda: self._store.compare_set(key, expected, desired))
        return value

    def set(self, key: str, value: str) -> None:
        self._call(lambda: self._store.set(key, value))

    def delete_key(self, key: str) -> None:
        self._call(lambda: self._store.delete_key(key))

    def _call(self, call: Callable[[], Any]) -> Any:
        if self._silent:
            raise CommError(self._silent)
        done: Future[Any] = Future()
        self._jobs.put((done, call))
        left_s = max(0.0, self._began + self._timeout_s - time.monotonic())
        for wait_s in (left_s + _GRACE_S, _WAKING_S):
            if wait([done], wait_s).done:
                return done.result()
        self._silent = (
            f"the store gave no answer for {left_s + _GRACE_S:.1f} s: "
            "the process that serves it is stopped or cut off"
        )
        raise CommError(self._silent)


def _work(jobs: SimpleQueue[_Job | None]) -> None:
    while (job := jobs.get()) is not None:
        done, call = job
        try:
            done.set_result(call())
        except BaseException as error:  # noqa: BLE001  # goes to the caller
            done.set_exception(error)
        del job, done, call  # keep nothing alive between two calls
