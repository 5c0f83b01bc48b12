"""Whether proposed tokens pay, by what steps have cost so far. Pure.

On a GPU steps are padded to few sizes, and what a row costs depends on the model: next to nothing
where all weights are read anyway, as much as any other where each row reads experts of its own. So
it is measured while requests run: steps without proposed tokens, of each size, and with them. Steps
that are launched on top of one in flight and steps that wait for its tokens are told apart.
"""

from __future__ import annotations

from typing import Final

from flexpert.engine.step_plan import StepPlan
from flexpert.kernels.step_shapes import graph_size

_SAMPLES: Final = 4  # of a kind of step, until it is known
_WEIGHT: Final = 0.1  # of the latest time
_FAR: Final = 3.0  # times as long as usual: something else was the reason
_SHORTEST_PAUSE, _LONGEST_PAUSE = 32, 512  # steps
_TRIAL: Final = 8  # steps after a pause, in which it is seen anew what comes true


class StepCosts:
    """Times of steps that only decode, by rows and by the most tokens that the model proposed in
    them for a sequence."""

    def __init__(self) -> None:
        self._times: dict[tuple[bool, int, int], tuple[int, float]] = {}  # samples, seconds
        self._wait = 0  # steps until something is proposed again
        self._pause = _SHORTEST_PAUSE
        self._trial = 0  # steps for which nothing is decided
        self._published_at = 0.0

    def published(self, plan: StepPlan, now: float) -> None:
        """A step is over. now: seconds, by the clock of `StepPlan.at`."""
        ahead, proposed = plan.sources is not None, max(map(len, plan.drafts or ()), default=0)
        if not plan.chunks and (proposed or not any(plan.asks)):
            began = self._published_at if ahead else plan.at
            self.note(plan.tokens, proposed, now - began, ahead=ahead)
        self._published_at = now

    def note(self, rows: int, proposed: int, seconds: float, *, ahead: bool) -> None:
        """A step took so long. ahead: it was launched on top of the one before."""
        key = ahead, graph_size(rows), proposed
        count, usual = self._times.get(key, (0, seconds))
        if count >= _SAMPLES and seconds > _FAR * usual:
            return
        weight = max(_WEIGHT, 1 / (count + 1))
        self._times[key] = count + 1, usual + weight * (seconds - usual)

    def due(self, rows: int, *, ahead: bool) -> bool:
        """Whether something may be proposed for a step of so many rows, and behind it."""
        if self._wait:
            self._wait -= 1
            self._trial = _TRIAL
            return False
        return self._known(ahead, rows, 0) is not None

    def pays(self, rows: int, drafted: int, proposed: int, hoped: float, *, ahead: bool) -> bool:
        """Whether a step of so many rows is better computed with `drafted` more, of which `hoped`
        may come true. proposed: at most for a sequence."""
        without = self._known(ahead, rows, 0)
        together = self._known(ahead, rows + drafted, proposed)
        if self._trial:
            self._trial -= 1
            return True
        if without is None or together is None:
            return True
        if (rows + hoped) / together > rows / without:
            self._pause = _SHORTEST_PAUSE
            return True
        self._wait = self._pause
        self._pause = min(2 * self._pause, _LONGEST_PAUSE)
        return False

    def _known(self, ahead: bool, rows: int, proposed: int) -> float | None:
        count, seconds = self._times.get((ahead, graph_size(rows), proposed), (0, 0.0))
        return seconds if count >= _SAMPLES else None
