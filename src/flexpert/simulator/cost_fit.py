"""From what runs took to what a step costs: least squares without negative costs (pure).

A run's duration is the sum of its steps; its mean time to a first token that of the steps while
requests wait, each counted once for every one of these; its mean gap that of the steps in which
sequences decode. Which steps those are is what the simulation says. So the fit goes round a few
times: simulate the runs, fit the costs of the steps to what was measured, again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flexpert.simulator.cost_profile import StepCost, rank_features

_SHARES = [index / 10 for index in range(16)]  # of `StepCost.shared`
_FAR = 0.1  # off by so much, relative: from there on errors count as they are, not squared (Huber)
_REWEIGHTED = 4
_LEAST_S = 1e-7


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
    """Steps, as the fit needs them, each counted so often. slowest, others: [knots + 4] float64,
    features of the rank that a step waits for, and of the others. further: ranks beyond one.
    seconds: by the costs that they were simulated with.
    """

    slowest: NDArray[np.float64]
    others: NDArray[np.float64]
    further: float = 0.0
    seconds: float = 0.0

    @classmethod
    def none(cls, knots: Sequence[int]) -> StepSums:
        return cls(np.zeros(len(knots) + 4), np.zeros(len(knots) + 4))

    def add(self, work: NDArray[np.float64], ranks: int, cost: StepCost, times: float) -> None:
        """A step, so often; see `StepCost.seconds`."""
        each = rank_features(work, cost.knots)
        first = int((each @ cost.per_rank).argmax())
        self.slowest += times * each[first]
        self.others += times * (each.sum(axis=0) - each[first])
        self.further += times * max(0, ranks - 1)
        self.seconds += times * cost.seconds(work, ranks)


@dataclass(frozen=True, slots=True)
class Observation:
    """Something that was measured, and the steps that it consists of.

    seconds: measured, less what was simulated of it besides steps and latencies. latencies: how
    many of a request's it has. noise_s: what it tells nothing below.
    """

    sums: StepSums
    seconds: float
    latencies: float
    noise_s: float


def fit_steps(seen: Sequence[Observation], knots: Sequence[int]) -> tuple[StepCost, float]:
    """The costs with the smallest squares of relative errors, and the latency of a request in
    seconds. What is far off, because the machine did something else meanwhile, counts less."""
    measured = np.array([one.seconds for one in seen])
    scale = measured + np.array([one.noise_s for one in seen])
    found: tuple[float, StepCost, float] | None = None
    for shared in _SHARES if any(one.sums.further for one in seen) else [0.0]:
        rows = np.array(
            [
                [*(one.sums.slowest + shared * one.sums.others), one.sums.further, one.latencies]
                for one in seen
            ]
        )
        a, b = rows / scale[:, None], measured / scale
        weights = np.ones(len(measured))
        for _ in range(_REWEIGHTED):
            x = non_negative(a * weights[:, None], b * weights)
            off = np.abs(a @ x - b)
            weights = np.sqrt(_FAR / np.maximum(off, _FAR))
        error = float(np.where(off < _FAR, off**2, _FAR * (2 * off - _FAR)).sum())
        if found is None or error < found[0]:
            found = error, _cost_of(x[:-1], knots, shared), float(x[-1])
    assert found is not None
    return found[1], found[2]


def _cost_of(x: NDArray[np.float64], knots: Sequence[int], shared: float) -> StepCost:
    base, *decode, prompt, context, pair, rank = (float(value) for value in x)
    return StepCost(
        base_s=max(base, _LEAST_S),
        knots=list(knots),
        decode_s=decode,
        prompt_token_s=prompt,
        context_s=context,
        pair_s=pair,
        rank_s=rank,
        shared=shared,
    )
