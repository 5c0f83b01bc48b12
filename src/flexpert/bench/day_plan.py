"""What `flexpert bench autoscale` is to do, and goals by what ranks take (pure)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec

from flexpert.bench.day_trace import EVENING, NOON

RunName = Literal["fixed", "autoscaler", "oracle", "killed"]

_FIRST_MS, _GAP_MS = 500.0, 50.0  # goals are not closer than these
_OF_GOAL = 0.5  # the autoscaler is given half of the clients' time to the first token


@dataclass(frozen=True, slots=True, kw_only=True)
class DayPlan:
    """seconds: of the day. peak: requests a second at noon; None: by what ranks can take. goals_ms:
    as for `bench serve`; {}: by what was measured. calibrate_s: for each number of ranks. most: the
    largest number of ranks. autoscale: the autoscaler's goals of latencies, as "ttft_p99=0.5s"; "":
    by those of the requests. settle_s, every_s: the autoscaler's. kills: of ranks, of one more
    service that scales itself. larger_model: a random one that is made for the time of the run,
    instead of the embedded one. flags: of all services, besides.
    """

    seconds: float
    most: int
    max_running: int
    input_tokens: int
    output_tokens: int
    peak: float | None
    goals_ms: Mapping[str, float]
    calibrate_s: float
    settle_s: float
    every_s: float
    autoscale: str = ""
    kills: int
    seed: int
    larger_model: bool = False
    flags: tuple[str, ...] = ()

    def service_flags(self) -> tuple[str, ...]:
        return (
            *("--max-ranks", str(self.most), "--max-running", str(self.max_running)),
            *("--deterministic", "--threads", "1", "--kv-memory", "32MiB"),
            *("--log-level", "warning", "--shutdown-timeout", "0"),
            *self.flags,
        )


class RanksCapacity(msgspec.Struct, frozen=True, kw_only=True):
    """What so many ranks did, each with as many requests as it may run."""

    ranks: int
    requests_per_s: float
    first_token_ms: float
    inter_token_p99_ms: float
    end_to_end_ms: float


class CapacityJob(msgspec.Struct, frozen=True, kw_only=True, tag="capacity"):
    """Measure what so many ranks take, one number after the other."""

    plan: DayPlan
    ranks: list[int]


class DayJob(msgspec.Struct, frozen=True, kw_only=True, tag="day"):
    """Serve the day. autoscale: goals, if the service scales itself. schedule: seconds after
    midnight and ranks, from midnight on. kills: seconds after midnight, when a rank is killed."""

    run: RunName
    plan: DayPlan
    peak: float
    goals_ms: dict[str, float]
    autoscale: str | None = None
    schedule: list[tuple[float, int]]
    kills: list[float] = []


Job = CapacityJob | DayJob


def goals_for(capacity: Sequence[RanksCapacity]) -> dict[str, float]:
    """Goals that a service that keeps up meets: a request may wait for as long as several answers
    take, and for its tokens three times as long as they took when all ranks were full."""
    full = capacity[-1]
    first_ms = max(_FIRST_MS, 4.0 * max(one.end_to_end_ms for one in capacity))
    return {
        "ttft": float(round(first_ms, -1)),
        "itl": float(round(max(_GAP_MS, 3.0 * full.inter_token_p99_ms))),
    }


def autoscale_goals(plan: DayPlan, goals_ms: Mapping[str, float]) -> str:
    """For `--autoscale`, unless the plan has them: half of the clients' time to the first token. Of
    gaps it is told only where that is all there is: on cores that ranks share, more of them make no
    gap shorter."""
    goals = plan.autoscale
    if not goals and "ttft" in goals_ms:
        goals = f"ttft_p99={goals_ms['ttft'] * _OF_GOAL:g}ms"
    elif not goals and "itl" in goals_ms:
        goals = f"itl_p99={goals_ms['itl']:g}ms"
    parts = ("min=1", f"max={plan.most}", goals, f"settle={plan.settle_s:g}s")
    return ",".join(filter(None, (*parts, f"every={plan.every_s:g}s")))


def kill_times(plan: DayPlan) -> list[float]:
    """One at noon, two also in the evening, more throughout the day."""
    if plan.kills <= 2:
        return [share * plan.seconds for share in (NOON, EVENING)[: plan.kills]]
    return [(number + 0.5) / plan.kills * plan.seconds for number in range(plan.kills)]
