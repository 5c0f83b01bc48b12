"""Which requests may be what terminates ranks, and when those are tried again (pure).

A rank that exits takes down with it whatever it was doing. If one request was the cause, that
request terminates the next rank too, and so on until none is left. So whoever was on board of a
rank that exited by a fault of its own (an error, a crash) is a suspect, until it says something; so
is who was, twice in a row, with a rank that a signal terminated before it had said anything.

Most suspects are innocent, they only shared a rank with the culprit. They are tried one by one:
while one has been given to a rank and has said nothing yet, nobody else is given to that rank, and
no other suspect to any. If its rank exits in a step that it takes part in, for the second time by a
fault of a rank's own, the request is failed. Signals may come from anybody, so two must meet it
there.
"""

from __future__ import annotations

from collections.abc import Iterable

SUSPECT_BY_SIGNALS = 2
CONVICTED_BY_SIGNALS = 2


class Quarantine:
    """By ids of sequences.

    trial: the suspect that a rank has been given and that has said nothing yet, if any.
    """

    def __init__(self) -> None:
        self.trial: str | None = None
        self._begun = False
        self._by_fault: set[str] = set()
        self._by_signals: dict[str, int] = {}  # trials that a signal has cut short
        self._signals: dict[str, int] = {}

    def suspects(self, name: str) -> bool:
        """Whether a sequence may only run alone."""
        return name in self._by_fault or name in self._by_signals

    def try_alone(self, name: str) -> None:
        """A suspect has been given to a rank."""
        self.trial, self._begun = name, False

    def begun(self, name: str) -> None:
        """The rank takes its first step with it now."""
        self._begun |= self.trial == name

    def exited(
        self, silent: Iterable[str], speaking: Iterable[str], *, own_fault: bool
    ) -> str | None:
        """A rank has exited unasked. Returns who must not be tried again.

        silent: the sequences it ran that had said nothing since it took them. speaking: the others.
        """
        silent = list(silent)
        tried = self.trial if self.trial in silent and self._begun else None
        if own_fault:
            again = tried if tried in self._by_fault else None
            self._by_fault.update(silent, speaking)
            return again
        for name in silent:
            count = self._signals[name] = self._signals.get(name, 0) + 1
            if count >= SUSPECT_BY_SIGNALS:
                self._by_signals.setdefault(name, 0)
        if tried is None:
            return None
        count = self._by_signals[tried] = self._by_signals.get(tried, 0) + 1
        return tried if count >= CONVICTED_BY_SIGNALS else None

    def over(self, name: str) -> bool:
        """No rank has it any more. Returns whether its trial is over with that."""
        if self.trial != name:
            return False
        self.trial = None
        return True

    def cleared(self, name: str) -> bool:
        """It has said something, or is finished. Returns whether its trial is over with that."""
        self._by_fault.discard(name)
        self._by_signals.pop(name, None)
        self._signals.pop(name, None)
        return self.over(name)
