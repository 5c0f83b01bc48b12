"""From what runs took to what a step costs: least squares without negative costs (pure).

A run's duration is the sum of its steps, and which steps it has is what the simulation says. So the
fit goes round a few times: simulate the runs, fit the steps' costs to their durations, again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flexpert.simulator.cost_profile import StepCost, rank_features

_SHARES = [index / 20 for index in range(31)]  # of `StepCost.shared`


def non_negative(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """x ≥ 0 with the least |a x - b| (Lawson and Hanson's active sets).

    a: [rows, columns], b: [rows] float64.
    """
    columns = a.shape[1]
    scale = np.linalg.norm(a, axis=0)
    scale[scale == 0] = 1.0
    scaled = a / scale
    x = np.zeros(columns)
    free = np.zeros(columns, dtype=bool)
    for _ in range(10 * columns):
        slope = scaled.T @ (b - scaled @ x)
        slope[free] = 0.0
        best = int(slope.argmax())
        if slope[best] <= 1e-10 * max(1.0, float(np.abs(b).max())):
            break
        free[best] = True
        while True:
            tried = np.zeros(columns)
            tried[free] = np.linalg.lstsq(scaled[:, free], b, rcond=None)[0]
            below = free & (tried <= 0)
            if not below.any():
                x = tried
                break
            share = float((x[below] / (x[below] - tried[below])).min())
            x = x + share * (tried - x)
            free &= x > 1e-15
            x[~free] = 0.0
            if not free.any():
                break
    return np.asarray(x / scale)


@dataclass(slots=True)
class StepSums:
    """The steps of a run, as the fit needs them. slowest, others: [knots + 2] float64, features of
    the rank that a step waits for, and of the others. further: ranks beyond one, over the steps."""

    slowest: NDArray[np.float64]
    others: NDArray[np.float64]
    further: float = 0.0

    @classmethod
    def none(cls, knots: Sequence[int]) -> StepSums:
        return cls(np.zeros(len(knots) + 2), np.zeros(len(knots) + 2))

    def add(self, work: NDArray[np.float64], ranks: int, cost: StepCost, slowdown: float) -> None:
        """A step; see `StepCost.seconds`."""
        each = rank_features(work, cost.knots)
        first = int((each @ cost.per_rank).argmax())
        self.slowest += slowdown * each[first]
        self.others += slowdown * (each.sum(axis=0) - each[first])
        self.further += slowdown * max(0, ranks - 1)


def fit_steps(
    sums: Sequence[StepSums], seconds: Sequence[float], knots: Sequence[int]
) -> tuple[StepCost, list[float]]:
    """The costs with the smallest squares of relative errors, and what they make of each run.

    seconds: in which the steps of each run were computed.
    """
    measured = np.array(seconds)
    several = any(one.further for one in sums)
    found: tuple[float, StepCost, list[float]] | None = None
    for shared in _SHARES if several else [0.0]:
        rows = np.array([[*(one.slowest + shared * one.others), one.further] for one in sums])
        x = non_negative(rows / measured[:, None], np.ones(len(measured)))
        fitted = rows @ x
        error = float(((fitted / measured - 1) ** 2).sum())
        if found is None or error < found[0]:
            cost = StepCost(
                knots=list(knots),
                steps_s=[float(value) for value in x[: len(knots)]],
                context_s=float(x[-3]),
                pair_s=float(x[-2]),
                rank_s=float(x[-1]),
                shared=shared,
            )
            found = error, cost, [float(value) for value in fitted]
    assert found is not None
    return found[1], found[2]
