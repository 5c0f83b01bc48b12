"""How much each expert has had to do lately, over all ranks (pure: the time comes in)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from flexpert.moe.load_snapshot import Counts

Loads = npt.NDArray[np.float64]

HALF_LIFE_S = 30.0


@dataclass(frozen=True, slots=True)
class RecentLoad:
    """choices: [layers, experts], tokens that chose each; of ranks' time, compute_s in experts'
    products. All in `seconds` that passed; older ones count less in each."""

    choices: Loads
    compute_s: float
    seconds: float

    @property
    def tokens(self) -> float:
        """All choices of all layers."""
        return float(self.choices.sum())


class LoadTracker:
    """Sums in which what is older by a half-life counts half."""

    def __init__(self, layers: int, experts: int, *, half_life_s: float = HALF_LIFE_S) -> None:
        self.layers, self.experts = layers, experts
        self._half_life_s = half_life_s
        self._choices: Loads = np.zeros((layers, experts))
        self._compute_s = 0.0
        self._seconds = 0.0
        self._at: float | None = None
        self._window: Counts = np.zeros((layers, experts), dtype=np.int64)

    def add(self, choices: Counts, compute_s: float, now: float) -> None:
        """A rank has reported. choices: [layers, experts]."""
        self._age(now)
        self._choices += choices
        self._window += choices
        self._compute_s += compute_s

    def recent(self, now: float) -> RecentLoad:
        self._age(now)
        return RecentLoad(self._choices.copy(), self._compute_s, self._seconds)

    def take_window(self) -> Counts:
        """[layers, experts], what has come since this was asked last."""
        window, self._window = self._window, np.zeros_like(self._window)
        return window

    def _age(self, now: float) -> None:
        if self._at is None:
            self._at = now
            return
        passed = max(0.0, now - self._at)
        factor = 0.5 ** (passed / self._half_life_s)
        self._choices *= factor
        self._compute_s *= factor
        # the middle of what has passed counts for all of it
        self._seconds = self._seconds * factor + passed * factor**0.5
        self._at = now
