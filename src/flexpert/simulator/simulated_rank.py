"""A rank whose steps take no time: the real scheduler, and what a step of it computes (pure)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from flexpert.engine.engine_limits import EngineLimits
from flexpert.engine.request import BlockChanges, TokenEvent
from flexpert.engine.scheduler import Scheduler
from flexpert.engine.sequence import Sampled
from flexpert.engine.step_plan import StepPlan

_TOKEN = 1  # what every step samples; with ignore_eos nothing depends on it


class ModelledRank:
    """dead: its process has ended; the head may not know yet."""

    def __init__(self, id: int, limits: EngineLimits) -> None:
        self.id = id
        self.dead = False
        self.scheduler = Scheduler(limits, clock=lambda: 0.0)
        self._plan: StepPlan | None = None

    def begin(self) -> NDArray[np.float64] | None:
        """Plan a step. [4] float64, its work (`StepCost`); None: there is nothing to compute."""
        if not self.scheduler.has_work:
            return None
        plan = self.scheduler.plan()
        if plan.tokens == 0:
            self.scheduler.rollback(plan)
            return None
        self._plan = plan
        ends = plan.context_len[plan.decodes :].astype(np.float64)
        lengths = np.diff(plan.query_start[plan.decodes :]).astype(np.float64)
        return np.array(
            [
                plan.decodes,
                lengths.sum(),
                plan.context_len[: plan.decodes].sum(dtype=np.float64),
                (lengths * (ends - lengths / 2)).sum(),
            ]
        )

    def end(self) -> tuple[list[TokenEvent], BlockChanges | None]:
        """The step was whole: its tokens, and what became of the prefix cache."""
        plan, self._plan = self._plan, None
        assert plan is not None
        count = len(plan.samples)
        events = self.scheduler.commit(plan, Sampled([_TOKEN] * count, [None] * count))
        return events, self.scheduler.cache_changes()

    def broken(self) -> None:
        """The step, if there is one, comes to nothing."""
        if self._plan is not None:
            self.scheduler.rollback(self._plan)
            self._plan = None
