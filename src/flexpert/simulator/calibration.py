"""`flexpert simulate calibrate`: a real service is measured, and the costs are fitted to that."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import msgspec
import numpy as np
import psutil
from numpy.typing import NDArray

from flexpert.bench.load import ClientAnswer
from flexpert.bench.machine import this_machine
from flexpert.bench.offered_load import offer
from flexpert.bench.service import Service, own_service
from flexpert.engine.engine_limits import EngineLimits
from flexpert.simulator.cost_fit import Observation, StepSums, fit_steps, non_negative
from flexpert.simulator.cost_profile import (
    ChangeCost,
    CostProfile,
    FittedRun,
    HeadTimes,
    ServedShape,
    StepCost,
)
from flexpert.simulator.real_runs import (
    RealChanges,
    RealRun,
    random_load,
    real_changes,
    real_run,
    served_shape,
)
from flexpert.simulator.simulated_service import OnStep, SimulatedSettings
from flexpert.simulator.simulation import SimulationResult, simulate

Note = Callable[[str], None]

_TURNS = 4  # of simulating and fitting
_NOISE_S = (0.1, 0.005, 0.0005)  # of a run's duration, first tokens and gaps
_BURST = 16  # requests at once
_CONTENTION = (1.0, 1.5, 2.0, 3.0, 4.0)
_CHANGE_STREAMS = 8
_CHANGE_TOKENS = 100

# (requests, at once on one rank, tokens of prompts, of answers)
REFERENCE = (32, 16, 24, 48)  # `prediction_check` runs it, too
LOADS = (
    (2, 1, 16, 48),
    (8, 1, 16, 2),
    (12, 4, 32, 40),
    (24, 8, 200, 16),
    REFERENCE,
    (24, 12, 700, 12),
    (96, 48, 16, 40),
    (64, 32, 130, 32),
    (4, 1, 1200, 4),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationPlan:
    """ranks: the most. rounds: of all loads, on each number of ranks. flags: of the service."""

    ranks: int = 2
    rounds: int = 2
    seed: int = 0
    flags: tuple[str, ...] = ()

    def service_flags(self) -> tuple[str, ...]:
        """Of the real service."""
        return (
            *("--ranks", "1", "--max-ranks", str(self.ranks + 1), "--threads", "1"),
            *("--log-level", "warning", "--shutdown-timeout", "0", "--kv-memory", "64MiB"),
            *self.flags,
        )


def limits_of(shape: ServedShape) -> EngineLimits:
    """Of each rank of a service that was measured."""
    return EngineLimits(
        max_tokens_per_step=shape.max_tokens_per_step,
        max_running=shape.max_running,
        max_model_len=shape.max_model_len,
        blocks=shape.blocks,
        block_size=shape.block_size,
        prefix_cache=shape.prefix_cache,
    )


def settings_of(shape: ServedShape, ranks: int, capacity: int, **more: Any) -> SimulatedSettings:
    """As that service had them. more: of `SimulatedSettings`."""
    return SimulatedSettings(
        ranks=ranks,
        capacity=capacity,
        limits=limits_of(shape),
        experts=shape.experts,
        layers=shape.layers,
        **more,
    )


def run_calibration(plan: CalibrationPlan, note: Note) -> CostProfile:
    """Raises: FlexpertError: the service does not start, or a request or a change fails."""
    return asyncio.run(_measure(plan, note))


async def _measure(plan: CalibrationPlan, note: Note) -> CostProfile:
    runs: list[RealRun] = []
    async with own_service(plan.service_flags(), start_timeout_s=300.0) as service:
        shape = await served_shape(service, plan.service_flags())
        fitting = [
            load for load in LOADS if load[2] + load[3] < min(shape.max_model_len, _room(shape))
        ]
        seeds = itertools.count(plan.seed * 1000 + 1)
        for ranks in range(1, plan.ranks + 1):
            warm = random_load(8, 8, 64, 32, next(seeds))
            await real_run(service, warm, ranks)
            order = [load for _ in range(plan.rounds) for load in fitting]
            random.Random(plan.seed).shuffle(order)
            for count, at_once, prompt, answer in order:
                scale = 1 if at_once == 1 else ranks
                load = random_load(count * scale, at_once * scale, prompt, answer, next(seeds))
                runs.append(await real_run(service, load, ranks))
                note(f"{ranks} ranks: {load.describe()}: {runs[-1].seconds:.2f} s")
        note("a rank joins, is killed, comes back and leaves")
        await real_run(service, random_load(4, 4, 16, 8, next(seeds)), 1)
        changes, slowdown = await _changes(service, next(seeds))
    profile = fit_profile(runs, shape, _change_cost(changes, slowdown), plan)
    for run in profile.runs:
        off = run.fitted_s / run.measured_s - 1
        note(f"{run.ranks} ranks: {run.load}: {run.measured_s:.2f} s, fitted {off:+.0%}")
    return profile


def _room(shape: ServedShape) -> int:
    return shape.blocks * shape.block_size


async def _changes(service: Service, seed: int) -> tuple[RealChanges, float]:
    """Under a load without a pause; and by how much steps are longer while a rank joins."""
    load = random_load(_CHANGE_STREAMS, _CHANGE_STREAMS, 16, _CHANGE_TOKENS, seed)
    alone = await real_run(service, load, 1)
    gaps = [gap for answer in alone.answers for gap in answer.gaps_s]
    prompts = await load.asked(service.target, seed)
    longer: list[float] = []

    async def streams() -> None:
        while True:
            answers = await offer(service.target, load, prompts)
            if not longer:  # those during the join come first
                longer.extend(gap for answer in answers for gap in answer.gaps_s)

    task = asyncio.create_task(streams())
    try:
        await asyncio.sleep(0.1)
        changes = await real_changes(service, 1)
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
    return changes, max(1.0, fmean(longer) / fmean(gaps)) if longer else 1.0


def _change_cost(found: RealChanges, slowdown: float) -> ChangeCost:
    return ChangeCost(
        join_s=found.join_s,
        join_pause_s=(found.join.pause_ms or 0.0) / 1e3,
        leave_s=found.leave_s,
        leave_pause_s=(found.leave.pause_ms or 0.0) / 1e3,
        detect_s=found.detect_s,
        recover_s=found.recover_s,
        restart_s=found.restart_s,
        slowdown=slowdown,
    )


# ---- the fit (pure) -----------------------------------------------------------------------------


def fit_profile(
    runs: Sequence[RealRun], shape: ServedShape, change: ChangeCost, plan: CalibrationPlan
) -> CostProfile:
    """The profile that explains what the runs took."""
    most = shape.max_running
    knots = [*(knot for knot in (1, 4, 16) if knot < most), most]
    profile = CostProfile(
        command=" ".join(["flexpert", *sys.argv[1:]]),
        machine=this_machine(),
        load_average=psutil.getloadavg()[0],
        ranks=max(run.ranks for run in runs),
        shape=shape,
        # where to begin hardly matters: which steps a run has depends on their lengths a little
        step=StepCost(base_s=0.005, knots=knots, decode_s=[0.001] * len(knots)),
        head=_fit_head(runs),
        change=change,
        flags=list(plan.flags),
    )
    processor = profile.head
    for _ in range(_TURNS):
        seen = [one for run in runs for one in _observations(run, profile)]
        step, latency_s = fit_steps(seen, knots)
        head = msgspec.structs.replace(profile.head, latency_s=latency_s)
        profile = msgspec.structs.replace(profile, step=step, head=head)
        profile = _with_contention(runs, profile, processor)
    fitted = [_replay(run, profile).seconds for run in runs]
    return msgspec.structs.replace(
        profile,
        runs=[
            FittedRun(
                load=run.load.describe(), ranks=run.ranks, measured_s=run.seconds, fitted_s=seconds
            )
            for run, seconds in zip(runs, fitted, strict=True)
        ],
    )


def _replay(run: RealRun, profile: CostProfile, on_step: OnStep | None = None) -> SimulationResult:
    settings = settings_of(profile.shape, run.ranks, run.ranks)
    return simulate(run.load, settings, profile, on_step=on_step)


def _observations(run: RealRun, profile: CostProfile) -> list[Observation]:
    """Its duration, its mean time to a first token and its mean gap."""
    step, latency_s = profile.step, profile.head.latency_s
    requests = run.load.count
    gaps = requests * (run.load.output_tokens - 1)
    sums = [StepSums.none(step.knots) for _ in range(3)]

    def on_step(work: NDArray[np.float64], ranks: int, slowdown: float, unfinished: int) -> None:
        decoding = float(work[:, 0].sum())
        times = (1.0, (unfinished - decoding) / requests, decoding / gaps)
        for one, count in zip(sums, times, strict=True):
            one.add(work, ranks, step, slowdown * count)

    result = _replay(run, profile, on_step)
    alone = requests if run.load.concurrency == 1 else 0
    measured = (run.seconds, *_latencies(run.answers))
    simulated = (result.seconds, *_latencies(result.answers))
    return [
        Observation(
            sums=one,
            seconds=max(0.1 * real, real - (here - one.seconds - count * latency_s)),
            latencies=count,
            noise_s=noise_s,
        )
        for one, real, here, count, noise_s in zip(
            sums, measured, simulated, (alone, 1.0, 0.0), _NOISE_S, strict=True
        )
    ]


def _with_contention(
    runs: Sequence[RealRun], profile: CostProfile, processor: HeadTimes
) -> CostProfile:
    """The head waits for processors that ranks and clients use as well, so its work takes longer
    than its processor time: so many times as long as explains the first tokens of bursts."""
    bursts = [run for run in runs if run.load.concurrency >= _BURST]
    found = []
    for times in _CONTENTION if bursts else ():
        head = msgspec.structs.replace(
            profile.head,
            request_s=times * processor.request_s,
            prompt_token_s=times * processor.prompt_token_s,
            token_s=times * processor.token_s,
        )
        tried = msgspec.structs.replace(profile, head=head)
        off = [
            abs(math.log(_latencies(_replay(run, tried).answers)[0] / _latencies(run.answers)[0]))
            for run in bursts
        ]
        found.append((fmean(off), times, tried))
    return min(found)[2] if found else profile


def _latencies(answers: Sequence[ClientAnswer]) -> tuple[float, float]:
    """Mean time to a first token and mean gap, in seconds."""
    firsts = [first for answer in answers if (first := answer.first_token_s) is not None]
    return fmean(firsts), fmean(gap for answer in answers for gap in answer.gaps_s)


def _fit_head(runs: Sequence[RealRun]) -> HeadTimes:
    """By its processor time, which the system counts in hundredths of a second."""
    rows = np.array(
        [
            [
                run.load.count,
                run.load.count * run.load.input_tokens,
                run.load.count * run.load.output_tokens,
            ]
            for run in runs
        ],
        dtype=np.float64,
    )
    x = non_negative(rows, np.array([run.head_cpu_s for run in runs]))
    return HeadTimes(request_s=float(x[0]), prompt_token_s=float(x[1]), token_s=float(x[2]))
