"""Whether proposed tokens pay, by what steps take and say. Pure.

What a row costs depends on the device and the model: next to nothing where all weights are read
anyway, as much as any other where each row reads experts of its own. And a layer that proposes
costs what a layer costs. So nothing of it is assumed. Steps without either are timed, by how many
sequences decode; and of steps with them it is known how many tokens they said, and so how long
these would have taken without.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Final

import numpy as np

from flexpert.engine.step_plan import StepPlan
from flexpert.kernels.step_shapes import graph_size

_ENOUGH: Final = 12  # steps with proposed tokens, until something is said of them
_WEIGHT: Final = 0.2  # of the latest time without
_SAVED_WEIGHT: Final = 1 / 64  # of what the latest step has saved
_FAR: Final = 3.0  # times as long as usual: something else was the reason, and it counts as so much
_EACH: Final = 16  # sequences up to which each number is timed for itself

_SHORTEST: Final = 32  # steps in which tokens are proposed, and in which none are; the next time
_LONGEST: Final = 512  # it is twice as long, up to this
_TRIAL: Final = 24  # steps after a pause until it is decided again
_BASELINE: Final = 8  # steps without, in which these are timed


class DraftPhases:
    """Whether tokens are proposed at all, and the draft layer is computed: in turns, the one that
    pays for long and the other one for short, to see it anew.

    It depends on nothing but what all ranks of an epoch have told each other before each step, and
    so is the same on all of them.

    on: in the next step.
    """

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """A new epoch: nobody knows anything."""
        self.on = True
        self._age = 0  # steps of this phase
        self._left = self._stays = _SHORTEST  # steps of this phase; of the next one that pays
        self._pause = _SHORTEST

    def passed(self, saved: Iterable[float]) -> None:
        """A step has begun. saved: what each rank said before it, see `StepCosts.saved`."""
        known = [one for one in saved if not math.isnan(one)]
        self._age += 1
        self._left -= 1
        if not self.on:
            if self._left <= 0:
                self._turn(on=True, steps=self._stays)
        elif known and self._age >= _TRIAL and math.fsum(known) < 0:
            self._turn(on=False, steps=self._pause)
            self._pause = min(2 * self._pause, _LONGEST)
            self._stays = _SHORTEST
        elif self._left <= 0:
            self._turn(on=False, steps=_BASELINE)
            if known:
                self._pause = _SHORTEST
                self._stays = min(2 * self._stays, _LONGEST)

    def _turn(self, *, on: bool, steps: int) -> None:
        self.on, self._age, self._left = on, 0, steps


class StepCosts:
    """Times of one rank's steps that only decode."""

    def __init__(self, method: str) -> None:
        """method: by which tokens are proposed."""
        self._by_model = method == "mtp"
        self.begin()

    def begin(self) -> None:
        """A new epoch: with other ranks steps take another time."""
        self._usual: dict[int, float] = {}  # sequences → seconds of a step without
        self._counts: dict[int, int] = {}
        self._saved, self._count = 0.0, 0
        self._before: StepPlan | None = None
        self._published_at = 0.0

    def idle(self) -> None:
        """The next step does not follow the last one at once."""
        self._before = None

    @property
    def saved(self) -> float:
        """Seconds that the sequences of this rank were spared in a step, together, by proposed
        tokens, since these are proposed again; below 0 they were kept waiting. NaN: not known."""
        if self._count >= _ENOUGH:
            return self._saved
        return math.nan if self._by_model else 0.0  # of a text without repetition nothing is lost

    def published(self, plan: StepPlan, said: int, now: float) -> None:
        """A step is over. said: tokens of all its sequences. now: seconds, by any clock."""
        before, seconds = self._before, now - self._published_at
        self._before, self._published_at = plan, now
        if before is not None and plan.on and not before.on:
            self._saved, self._count = 0.0, 0
        if before is None or plan.chunks:
            return
        if plan.speculates:
            self.note(plan.decodes, seconds, said)
        elif not before.speculates:  # else it may have waited for that
            self.note(plan.decodes, seconds)

    def note(self, sequences: int, seconds: float, said: int | None = None) -> None:
        """A step of so many sequences took so long. said: tokens, where some might be proposed;
        None: none was, and each sequence got one."""
        if said is None:
            at = sequences if sequences <= _EACH else graph_size(sequences)
            usual, count = self._usual.get(at, seconds), self._counts.get(at, 0)
            weight = max(_WEIGHT, 1 / (count + 1))
            self._usual[at] = usual + weight * (min(seconds, _FAR * usual) - usual)
            self._counts[at] = count + 1
            return
        without = self._without(sequences)
        if without is not None:
            self._count += 1
            saved = said * without - sequences * min(seconds, _FAR * without)
            self._saved += max(_SAVED_WEIGHT, 1 / self._count) * (saved - self._saved)

    def _without(self, sequences: int) -> float | None:
        """Seconds of a step of so many without proposed tokens; between two numbers that were timed
        on the line from one to the other. None: not known."""
        at = sorted(self._usual)
        if not at or not at[0] <= sequences <= at[-1]:
            return None
        return float(np.interp(sequences, at, [self._usual[one] for one in at]))
