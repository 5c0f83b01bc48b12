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

_MOST_BYTES = 1 << 24


class StepCost(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds of a step, by the work of each rank: sequences that decode, tokens of prompts, tokens
    of context that decoding sequences attend to, pairs of tokens within chunks of prompts.

    base_s: of a rank that computes anything. knots: numbers of decoding sequences, ascending;
    decode_s: what is added on the way from one knot to the next, at first from none; the last goes
    on beyond its knot. prompt_token_s, context_s, pair_s: for each. rank_s: for each further rank
    of the exchange. shared: how much of the work of other ranks the slowest waits for: 0, each has
    processors of its own; 1, all have one.
    """

    base_s: float
    knots: list[int]
    decode_s: list[float]
    prompt_token_s: float = 0.0
    context_s: float = 0.0
    pair_s: float = 0.0
    rank_s: float = 0.0
    shared: float = 0.0

    @property
    def per_rank(self) -> NDArray[np.float64]:
        """[knots + 4] float64: what `rank_features` are multiplied with."""
        more = (self.prompt_token_s, self.context_s, self.pair_s)
        return np.array([self.base_s, *self.decode_s, *more])

    def seconds(self, work: NDArray[np.float64], ranks: int) -> float:
        """Of a step. work: [ranks that compute, 4] float64, at least one; ranks: that take part."""
        each = rank_features(work, self.knots) @ self.per_rank
        longest = each.max()
        return float(
            longest + self.shared * (each.sum() - longest) + self.rank_s * max(0, ranks - 1)
        )


def rank_features(work: NDArray[np.float64], knots: Sequence[int]) -> NDArray[np.float64]:
    """[ranks, knots + 4] float64: 1, how far each rank is on the way to each knot, then its tokens
    of prompts, context and pairs. work: [ranks, 4] float64."""
    found = np.ones((len(work), len(knots) + 4))
    for index, (low, high) in enumerate(zip([0, *knots], knots, strict=False)):
        on = np.maximum(0.0, (work[:, 0] - low) / (high - low))
        found[:, 1 + index] = on if index == len(knots) - 1 else np.minimum(on, 1.0)
    found[:, -3:] = work[:, 1:]
    return found


class HeadTimes(msgspec.Struct, frozen=True, kw_only=True):
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
    head: HeadTimes
    change: ChangeCost
    flags: list[str] = []
    runs: list[FittedRun] = []


def read_profile(file: Path) -> CostProfile:
    """Raises: ConfigError: it cannot be read, or is none."""
    text = read_text(file, "the profile", most=_MOST_BYTES)
    try:
        profile = msgspec.json.decode(text, type=CostProfile)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise ConfigError(
            f"{file} is no profile of `flexpert simulate calibrate`: {error}"
        ) from None
    check_profile(profile, str(file))
    return profile


def check_profile(profile: CostProfile, name: str) -> None:
    """Raises: ConfigError: something costs less than nothing, or the knots are none."""
    step = profile.step
    numbers = [*step.per_rank, step.rank_s, step.shared]
    numbers += [value for cost in (profile.head, profile.change) for value in _values(cost)]
    if any(not 0 <= number < 1e6 for number in numbers):
        raise ConfigError(f"{name}: costs are seconds, none below 0")
    rising = all(low < high for low, high in zip([0, *step.knots], step.knots, strict=False))
    if not step.knots or len(step.knots) != len(step.decode_s) or not rising:
        raise ConfigError(f"{name}: knots rise, each with its seconds")
    if not step.base_s > 0:
        raise ConfigError(f"{name}: a step takes time (base_s)")


def _values(cost: HeadTimes | ChangeCost) -> list[float]:
    return list(msgspec.structs.astuple(cost))
