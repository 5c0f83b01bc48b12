"""Phases with and without proposed tokens that do not depend on what steps take."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from flexpert.engine.step_costs import DraftPhases


def in_turns(on: int, off: int) -> Callable[[DraftPhases, Iterable[float]], None]:
    """In the place of `DraftPhases.passed`: for so many steps they are proposed, then for so many
    they are not."""

    def passed(self: DraftPhases, saved: Iterable[float]) -> None:
        self._age += 1
        self.on = self._age % (on + off) < on

    return passed
