"""What things cost a service on one kind of hardware: a file that `simulate calibrate` writes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from flexpert.bench.machine import Machine
from flexpert.errors import ConfigError
from flexpert.reading import read_text

WORK = 3  # columns of an array of work: tokens, context, pairs
_MOST_BYTES = 1 << 24


class StepCost(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds of a step, by the work of each rank: tokens it computes, tokens of context that its
    decoding sequences attend to, pairs of tokens in its chunks of prompts.

    knots: numbers of tokens, ascending, the first is 1; steps_s: what is added on the way from one
    knot to the next, the first of them by any token at all; the last goes on beyond its knot.
    context_s, pair_s: for each. rank_s: for each further rank of the exchange. shared: how much of
    the work of other ranks the slowest waits for: 0, each has processors of its own; 1, all have
    one.
    """

    knots: list[int]
    steps_s: list[float]
    context_s: float = 0.0
    pair_s: float = 0.0
    rank_s: float = 0.0
    shared: float = 0.0

    @property
    def per_rank(self) -> NDArray[np.float64]:
        """[knots + 2] float64: what `rank_features` are multiplied with."""
        return np.array([*self.steps_s, self.context_s, self.pair_s])

    def seconds(self, work: NDArray[np.float64], ranks: int) -> float:
        """Of a step. work: [ranks that compute, 3] float64, at least one; ranks: that take part."""
        each = rank_features(work, self.knots) @ self.per_rank
        longest = each.max()
        return float(
            longest + self.shared * (each.sum() - longest) + self.rank_s * max(0, ranks - 1)
        )


def rank_features(work: NDArray[np.float64], knots: Sequence[int]) -> NDArray[np.float64]:
    """[ranks, knots + 2] float64: how far each rank's tokens are on the way to each knot, then its
    context and pairs. work: [ranks, 3] float64."""
    tokens = work[:, 0]
    found = np.empty((len(work), len(knots) + 2))
    found[:, 0] = np.minimum(tokens, 1.0)
    for index in range(1, len(knots)):
        low, high = knots[index - 1], knots[index]
        on = np.maximum(0.0, (tokens - low) / (high - low))
        found[:, index] = on if index == len(knots) - 1 else np.minimum(on, 1.0)
    found[:, -2:] = work[:, 1:]
    return found


class HeadCost(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds. latency_s: on the way of a request through HTTP and preprocessing, beside the head's
    own work; request_s, prompt_token_s, token_s: its work, which is done one after the other."""

    latency_s: float = 0.0
    request_s: float = 0.0
    prompt_token_s: float = 0.0
    token_s: float = 0.0


class ChangeCost(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds. join_s, leave_s: from being asked for to the switch; join_more_s: for each further
    rank that joins. join_pause_s, leave_pause_s: the switch. detect_s: from a kill until the head
    knows. recover_s: from there until the survivors go on. restart_s: from there until the rank is
    back. slowdown: of steps while ranks join.
    """

    join_s: float
    join_more_s: float = 0.0
    join_pause_s: float = 0.0
    leave_s: float = 0.0
    leave_pause_s: float = 0.0
    detect_s: float = 0.0
    recover_s: float = 0.0
    restart_s: float = 0.0
    slowdown: float = 1.0


class ServedShape(msgspec.Struct, frozen=True, kw_only=True):
    """The settings of the service that was measured, as far as they decide what a step computes;
    see `EngineLimits`. experts: of each MoE layer."""

    model: str = ""
    device: str = "cpu"
    max_running: int = 64
    max_tokens_per_step: int = 256
    max_model_len: int = 2048
    blocks: int = 2048
    block_size: int = 16
    prefix_cache: bool = True
    experts: int = 16
    layers: int = 4


class FittedRun(msgspec.Struct, frozen=True, kw_only=True):
    """A run that was fitted to: its load in words, and what the fit makes of its duration."""

    load: str
    ranks: int
    measured_s: float
    fitted_s: float


class CostProfile(msgspec.Struct, frozen=True, kw_only=True):
    """The JSON of `flexpert simulate calibrate`. ranks: the most that were measured."""

    command: str
    machine: Machine
    load_average: float
    ranks: int
    shape: ServedShape
    step: StepCost
    head: HeadCost
    change: ChangeCost
    flags: list[str] = []
    runs: list[FittedRun] = []


def read_profile(file: Path) -> CostProfile:
    """Raises: ConfigError: it cannot be read, or is none."""
    text = read_text(file, "the profile", most=_MOST_BYTES)
    try:
        profile = msgspec.json.decode(text, type=CostProfile)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise ConfigError(f"{file} is no profile of `flexpert simulate calibrate`: {error}") from None
    check_profile(profile, str(file))
    return profile


def check_profile(profile: CostProfile, name: str) -> None:
    """Raises: ConfigError: something costs less than nothing, or the knots are none."""
    step = profile.step
    numbers = [*step.steps_s, step.context_s, step.pair_s, step.rank_s, step.shared]
    numbers += [value for cost in (profile.head, profile.change) for value in _values(cost)]
    if any(not 0 <= number < 1e6 for number in numbers):
        raise ConfigError(f"{name}: costs are seconds, none below 0")
    rising = all(low < high for low, high in zip(step.knots, step.knots[1:], strict=False))
    if len(step.knots) != len(step.steps_s) or step.knots[:1] != [1] or not rising:
        raise ConfigError(f"{name}: knots rise from 1, each with its seconds")
    if not sum(step.steps_s) > 0:
        raise ConfigError(f"{name}: a step takes time")


def _values(cost: HeadCost | ChangeCost) -> list[float]:
    return list(msgspec.structs.astuple(cost))
