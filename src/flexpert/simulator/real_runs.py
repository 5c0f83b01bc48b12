"""Short runs of a real service: what a cost model is fitted to, and what it is compared with."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter

from flexpert.bench.cluster_history import all_back, change_ranks, cluster_now
from flexpert.bench.load import ClientAnswer, LoadError, call
from flexpert.bench.offered_load import OfferedLoad, offer
from flexpert.bench.processor_time import processor_seconds
from flexpert.bench.service import Service
from flexpert.bench.timed_events import EventOutcome, EventRun, TimedEvent, kill_rank
from flexpert.cluster.views import OperationView
from flexpert.config import EngineConfig
from flexpert.errors import FlexpertError
from flexpert.simulator.cost_profile import ServedShape

_LOOK_S = 0.01
_QUIET_S = 0.2  # after a change, before something is measured


@dataclass(frozen=True, slots=True, kw_only=True)
class RealRun:
    """ranks: at the begin. answers: times are seconds from the first request on. head_cpu_s:
    processor time of the head."""

    load: OfferedLoad
    ranks: int
    answers: list[ClientAnswer]
    seconds: float
    head_cpu_s: float
    outcomes: list[EventOutcome]


def random_load(
    count: int,
    concurrency: int,
    input_tokens: int,
    output_tokens: int,
    seed: int,
    rate: float | None = None,
) -> OfferedLoad:
    """Requests of equal length."""
    return OfferedLoad(
        count=count,
        concurrency=concurrency,
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        request_rate=rate,
        warmup=0,
        seed=seed,
    )


async def real_run(
    service: Service, load: OfferedLoad, ranks: int, events: Sequence[TimedEvent] = ()
) -> RealRun:
    """A load on a service that has so many ranks by then.

    Raises: FlexpertError: a request or a change fails.
    """
    target = service.target
    if len((await cluster_now(target)).ranks) != ranks:
        done = await change_ranks(target, {"ranks": ranks})
        if done.state != "done":
            raise FlexpertError(f"{ranks} ranks could not be had: {done.error}")
        await asyncio.sleep(_QUIET_S)
    prompts = await load.asked(target, load.seed)
    before = processor_seconds(service.pid)
    run = EventRun(target, events)
    if events:
        await run.start()
    begin = perf_counter()
    outcomes: list[EventOutcome] = []
    try:
        answers = await offer(target, load, prompts)
        if events:
            outcomes = await run.finish(answers)
    finally:
        await run.cancel()
    head_cpu_s = processor_seconds(service.pid) - before
    failed = next((answer.error for answer in answers if answer.error), None)
    if failed is not None:
        raise FlexpertError(f"a request failed: {failed}")
    for answer in answers:
        answer.sent -= begin
        answer.ended -= begin
        answer.times[:] = [at - begin for at in answer.times]
    return RealRun(
        load=load,
        ranks=ranks,
        answers=answers,
        seconds=max(answer.ended for answer in answers),
        head_cpu_s=head_cpu_s,
        outcomes=outcomes,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class RealChanges:
    """Of changes under a load. Each view has its phases and its pause; seconds: from being asked
    for to its end, as the client sees it. detect_s, recover_s, restart_s: of a kill."""

    join: OperationView
    join_s: float
    leave: OperationView
    leave_s: float
    detect_s: float
    recover_s: float
    restart_s: float


async def real_changes(service: Service, ranks: int) -> RealChanges:
    """A rank joins, one is killed and comes back, one leaves. Raises: FlexpertError"""
    target = service.target
    begin = perf_counter()
    join = await _done(service, {"ranks": ranks + 1})
    join_s = perf_counter() - begin
    await asyncio.sleep(3.0)  # a rank that dies young is not restarted at once
    view = await cluster_now(target)
    victim = max(view.ranks, key=lambda rank: rank.id)
    begin = perf_counter()
    kill_rank(victim)
    detected = recovered = None
    while recovered is None:
        if perf_counter() - begin > 60:
            raise LoadError(f"rank {victim.id} was killed, and nothing came of it")
        view = await cluster_now(target)
        now = perf_counter()
        if victim.pid not in [rank.pid for rank in view.ranks if rank.state != "gone"]:
            detected = detected or now
            active = [rank for rank in view.ranks if rank.state == "active"]
            if len(active) >= ranks and not (
                view.operation and view.operation.purpose == "recovery"
            ):
                recovered = now
        await asyncio.sleep(_LOOK_S)
    await all_back(target)
    back = perf_counter()
    begin_leave = perf_counter()
    leave = await _done(service, {"ranks": ranks})
    assert detected is not None
    return RealChanges(
        join=join,
        join_s=join_s,
        leave=leave,
        leave_s=perf_counter() - begin_leave,
        detect_s=detected - begin,
        recover_s=recovered - detected,
        restart_s=back - recovered,
    )


async def _done(service: Service, body: dict[str, int]) -> OperationView:
    done = await change_ranks(service.target, body)
    if done.state != "done":
        raise FlexpertError(f"a change of {body} {done.state}: {done.error}")
    return done


async def served_shape(service: Service, flags: Sequence[str]) -> ServedShape:
    """What the service that runs has room for. flags: it was started with.

    Raises: FlexpertError: it does not say.
    """
    view = await cluster_now(service.target)
    _, models = await call(service.target, "GET", "/v1/models")
    status, text = await call(service.target, "GET", "/metrics")
    found = {}
    for line in str(text).splitlines():
        if line.startswith("flexpert_cache_config_info{"):
            parts = line[line.index("{") + 1 : line.rindex("}")].split(",")
            found = {name: value.strip('"') for name, _, value in (p.partition("=") for p in parts)}
    if status != 200 or "blocks_per_rank" not in found:
        raise FlexpertError("the service does not say how large its KV cache is")
    defaults = EngineConfig()

    def said(flag: str, default: int) -> int:
        for place, given in enumerate(flags):
            name, equals, value = given.partition("=")
            if name == flag:
                return int(value if equals else flags[place + 1])
        return default

    return ServedShape(
        model=view.model,
        device=found.get("device", "cpu"),
        max_running=said("--max-running", defaults.max_running),
        max_tokens_per_step=said("--max-tokens-per-step", defaults.max_tokens_per_step),
        max_model_len=models["data"][0]["max_model_len"],
        blocks=int(found["blocks_per_rank"]),
        block_size=int(found["block_size"]),
        prefix_cache=found.get("enable_prefix_caching") == "True",
        experts=view.placement.experts,
        layers=view.placement.layers,
    )
