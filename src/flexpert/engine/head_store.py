"""The store through which ranks of different machines meet: kept by the head, asked over the rank's
connection to it, so that nobody else can read or write it."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from flexpert.comm.bounded import StoreKeys
from flexpert.comm.host.links import this_machine
from flexpert.config import EngineConfig
from flexpert.engine.rank_protocol import StoreAnswer, StoreOperation, StoreRequest

_LOOK_S = 0.02


@dataclass(frozen=True, slots=True)
class HeadMeeting:
    """Where a rank meets those of other machines, and the name of its own. several: there may be
    such."""

    store: StoreKeys
    machine: str
    several: bool


def machine_name(config: EngineConfig, rank: int) -> str:
    """Equal on ranks that can open each other's memory, and shall."""
    name = config.machine or this_machine()
    return f"{name}#{rank}" if config.transport == "nixl" else name


class HeadStore:
    """See `flexpert.comm.bounded.StoreKeys`. Any thread may call; each call waits for the head.

    Raises, from every call: RuntimeError: the meeting was cancelled.
    """

    def __init__(self, ask: Callable[[StoreRequest], None]) -> None:
        self._ask = ask
        self._numbers = itertools.count()
        self._answers: dict[int, str | None] = {}  # None: it is waited for
        self._changed = threading.Condition()
        self._cancelled = threading.Event()

    @contextlib.contextmanager
    def until(self, cancelled: threading.Event) -> Iterator[None]:
        """Meetings of this block end when that is set."""
        before, self._cancelled = self._cancelled, cancelled
        try:
            yield
        finally:
            self._cancelled = before

    def answer(self, answer: StoreAnswer) -> None:
        """What the head says; from the thread that hears it."""
        with self._changed:
            if answer.number in self._answers:
                self._answers[answer.number] = answer.value
                self._changed.notify_all()

    def set(self, key: str, value: str, /) -> None:
        self._call("set", key, value)

    def compare_set(self, key: str, expected: str, desired: str, /) -> bytes:
        return self._call("compare_set", key, desired, expected).encode()

    def delete_key(self, key: str, /) -> bool:
        self._call("delete", key)
        return True

    def _call(
        self, operation: StoreOperation, key: str, value: str = "", expected: str = ""
    ) -> str:
        number = next(self._numbers)
        with self._changed:
            self._answers[number] = None
        try:
            self._ask(StoreRequest(number, operation, key, value, expected))
            with self._changed:
                while (answer := self._answers[number]) is None:
                    if self._cancelled.is_set():
                        raise RuntimeError("cancelled")
                    self._changed.wait(_LOOK_S)
                return answer
        finally:
            with self._changed:
                del self._answers[number]
