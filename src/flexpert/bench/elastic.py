"""`flexpert bench elastic`: what streams feel of ranks that join, leave and are killed.

One service is measured undisturbed, then through planned changes between two numbers of ranks, then
through kills, always under the same streaming clients. The baseline is the undisturbed part of the
same run.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import re
import signal
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime
from time import perf_counter
from typing import Any

import msgspec
import numpy as np

from flexpert.bench.cluster_history import cluster_now, events_since
from flexpert.bench.elastic_events import (
    ElasticEvent,
    ElasticTimeline,
    EventLabel,
    change_event,
    loss_event,
)
from flexpert.bench.load import ClientAnswer, LoadError, Target, call, complete, completion_body
from flexpert.bench.load_timeline import step_for, timeline
from flexpert.bench.machine import Machine, this_machine
from flexpert.bench.service import Service, own_service
from flexpert.bench.timed_events import EventOutcome, after_kill
from flexpert.cluster.views import OperationView
from flexpert.errors import FlexpertError

_SETTLE_S = 1.0
_LOOK_S = 0.02
_SILENCE_S = 0.5  # after a kill, in which its silence begins
_AFTER_S = 5.0  # that a kill is watched at least
_WINDOW_S = 0.5  # of throughput
_BACK = 0.95
_STEPS = 3  # of silence
_OPERATION_S = 600.0
PROMPT = 32
_POINTS = 600  # of the load over time, at most
_DETERMINISTIC = "--deterministic"
_KEPT_LINES = re.compile("WARNING|ERROR|DEBUG flexpert: rank")

Note = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class ElasticPlan:
    """low, high: numbers of ranks between which changes go, one after the other. kills: how often a
    rank is killed (SIGKILL); all_killed: how often, besides, all ranks at once; stops: how often
    one is stopped (SIGSTOP). swaps: changes in which a rank joins and another leaves, on `low`;
    rebalances: on `high`. path: in place of `changes`, the numbers of ranks to go to one after the
    other, from `low` and at the end to `high`. prompt, tokens: of a request and of its answer.
    settle_s: rest after a change. flags: of the service, besides.
    """

    clients: int = 64
    prompt: int = PROMPT
    tokens: int = 400
    undisturbed_s: float = 10.0
    changes: int = 10
    settle_s: float = 1.0
    low: int = 1
    high: int = 2
    kills: int = 0
    all_killed: int = 0
    swaps: int = 0
    rebalances: int = 0
    stops: int = 0
    path: tuple[int, ...] = ()
    flags: tuple[str, ...] = ()


class ElasticSteady(msgspec.Struct, frozen=True, kw_only=True):
    """Undisturbed. Gaps are between two pieces of one answer."""

    ranks: int
    tokens_per_s: float
    median_gap_ms: float
    longest_gap_ms: float


class ElasticChange(msgspec.Struct, frozen=True, kw_only=True):
    """One planned change. label: what it was. pause_ms: as the service measures it. gap_at_s:
    seconds from its begin to the begin of the longest gap. phases: seconds in each."""

    ranks: int
    state: str
    seconds: float
    pause_ms: float | None
    longest_gap_ms: float
    gap_at_s: float
    phases: dict[str, float]
    copied_experts: int = 0
    moved_requests: int = 0
    moved_with_kv: int = 0
    error: str | None = None
    label: EventLabel = "up"


class ElasticKill(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds after a SIGKILL, or (label "stop") a SIGSTOP.

    first_token_s: until the first token of any stream after the first silence of several steps.
    silence_s: the longest silence of all streams. back_s: until throughput stays at 95 % of the
    undisturbed one. whole_s: until all ranks are there again.
    """

    killed: list[int]
    first_token_s: float
    silence_s: float
    back_s: float | None
    whole_s: float
    label: EventLabel = "kill"


class ElasticReport(msgspec.Struct, frozen=True, kw_only=True):
    """start_s: until the service was ready. lost: answers that were not whole, with the reason.
    altered: whole answers that differ from the first to the same prompt; None: without
    `--deterministic` they may.
    memory_mib: of all the service's processes and of the GPUs, before and after, in MiB. log: what
    the service warned of, and with `--log-level debug` what ranks took their time for."""

    start_s: float
    steady: list[ElasticSteady]
    changes: list[ElasticChange]
    kills: list[ElasticKill]
    answers: int
    lost: list[str]
    altered: int | None
    timeline: ElasticTimeline
    memory_mib: dict[str, tuple[float, float]]
    log: list[str]
    flags: list[str]
    clients: int
    machine: Machine

    @property
    def failed_changes(self) -> int:
        return sum(change.state != "done" for change in self.changes)


def run_elastic(plan: ElasticPlan, note: Note) -> ElasticReport:
    """Raises: FlexpertError: the service does not start, or stops answering."""
    return asyncio.run(_run(plan, note))


@dataclass(slots=True)
class ElasticStreams:
    """The clients, and when something came to any of them."""

    target: Target
    plan: ElasticPlan
    arrivals: list[float] = field(default_factory=list)
    answers: list[ClientAnswer] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    altered: int = 0
    _texts: dict[int, str] = field(default_factory=dict)
    _stop: bool = False

    async def client(self, number: int) -> None:
        body = completion_body(
            [(number * 37 + place * 11) % 200 + 10 for place in range(self.plan.prompt)],
            max_tokens=self.plan.tokens,
            temperature=0,
            ignore_eos=True,
        )
        request = self.target.message("POST", "/v1/completions", body)
        while not self._stop:
            answer = await complete(
                self.target,
                request,
                stall_s=120.0,
                on_tokens=lambda _: self.arrivals.append(perf_counter()),
            )
            self.answers.append(answer)
            if answer.error is not None:
                self.lost.append(answer.error)
                await asyncio.sleep(_LOOK_S)  # a service that refuses is not asked in a loop
            elif answer.tokens != self.plan.tokens:
                self.lost.append(f"{answer.tokens} of {self.plan.tokens} tokens")
            else:
                self.altered += self._texts.setdefault(number, answer.text) != answer.text

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """While the block runs, and until the last answer is whole."""
        self._stop = False
        tasks = [asyncio.create_task(self.client(n)) for n in range(self.plan.clients)]
        try:
            yield
            self._stop = True
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def longest_gap_s(self, begin: float, end: float) -> tuple[float, float]:
        """(length, begin) of any stream's, overlapping that time. Answers under way are not in it
        yet."""
        return max(self._gaps(begin, end), default=(0.0, begin))

    def median_gap_s(self, begin: float, end: float) -> float:
        gaps = [gap for gap, _ in self._gaps(begin, end)]
        return float(np.median(gaps)) if gaps else 0.0

    def _gaps(self, begin: float, end: float) -> list[tuple[float, float]]:
        found: list[tuple[float, float]] = []
        for answer in self.answers:
            times = np.array(answer.times)
            if len(times) > 1 and times[-1] > begin and times[0] < end:
                within = (times[1:] > begin) & (times[:-1] < end)
                gaps, begins = np.diff(times)[within].tolist(), times[:-1][within].tolist()
                found += zip(gaps, begins, strict=True)
        return found

    def rate(self, begin: float, end: float) -> float:
        """Pieces a second, which are tokens where each has a text."""
        times = np.array(self.arrivals)
        return float(((times >= begin) & (times < end)).sum() / (end - begin))


def silences_after(
    arrivals: Sequence[float], at: float, *, within_s: float, step_s: float
) -> tuple[float, float]:
    """(seconds from `at` to the end of the first silence that is longer than three steps, or to the
    first arrival if there is none; length of the longest), of those that begin within that time
    after it. Both are infinite if nothing came any more."""
    times = [at, *sorted(time for time in arrivals if time > at)]
    pairs = [(a, b) for a, b in itertools.pairwise(times) if a < at + within_s]
    if not pairs:
        return float("inf"), float("inf")
    first = next((b for a, b in pairs if b - a > _STEPS * step_s), pairs[0][1])
    return first - at, max(b - a for a, b in pairs)


def back_s(arrivals: Sequence[float], at: float, end: float, desired: float) -> float | None:
    """Seconds from `at` until the rate of the following windows is at least `desired` on average;
    None: never before `end`."""
    times = np.array(arrivals)
    begin = at
    while begin + 2 * _WINDOW_S <= end:
        rate = ((times >= begin) & (times < begin + 2 * _WINDOW_S)).sum() / (2 * _WINDOW_S)
        if rate >= desired:
            return begin - at
        begin += _WINDOW_S / 5
    return None


async def _run(plan: ElasticPlan, note: Note) -> ElasticReport:
    began = perf_counter()
    async with own_service(plan.flags, report=note, start_timeout_s=600.0) as service:
        start_s = perf_counter() - began
        note(f"ready after {start_s:.1f} s")
        run = _ElasticRun(service, plan, note)
        await run.measure()
        return ElasticReport(
            start_s=start_s,
            steady=run.steady,
            changes=run.changes,
            kills=run.kills,
            answers=len(run.streams.answers),
            lost=run.streams.lost,
            altered=run.streams.altered if _DETERMINISTIC in plan.flags else None,
            timeline=run.timeline(),
            memory_mib=run.memory,
            log=[line for line in service.output if _KEPT_LINES.search(line)],
            flags=list(plan.flags),
            clients=plan.clients,
            machine=this_machine(),
        )


class _ElasticRun:
    def __init__(self, service: Service, plan: ElasticPlan, note: Note) -> None:
        self.service = service
        self.plan = plan
        self.note = note
        self.streams = ElasticStreams(service.target, plan)
        self.steady: list[ElasticSteady] = []
        self.changes: list[ElasticChange] = []
        self.kills: list[ElasticKill] = []
        self.memory: dict[str, tuple[float, float]] = {}
        self._pending: list[tuple[EventLabel, float, float, dict[str, Any]]] = []
        self._begin = perf_counter()
        self._undisturbed_spans: list[tuple[float, float]] = []
        self._events: list[ElasticEvent] = []

    def timeline(self) -> ElasticTimeline:
        """When all is measured."""
        end = max((answer.ended for answer in self.streams.answers), default=self._begin)
        step_s = step_for(end - self._begin, _POINTS)
        return ElasticTimeline(
            step_s=step_s,
            points=timeline(self.streams.answers, self._begin, end, step_s),
            undisturbed=self._undisturbed_spans,
            events=self._events,
        )

    async def measure(self) -> None:
        plan = self.plan
        async with self.streams.running():  # what is slow once
            await asyncio.sleep(_SETTLE_S)
        before = await self._memory()
        self._begin = perf_counter()
        await self._undisturbed()
        if plan.changes or plan.path or plan.swaps or plan.rebalances:
            await self._scale_to(plan.low)
            async with self.streams.running():
                await asyncio.sleep(_SETTLE_S)
                await self._changes()
            self._close_changes()
        if plan.kills or plan.all_killed or plan.stops:
            await self._scale_to(plan.high)
            await self._undisturbed()
            every = max(1, (plan.kills + plan.all_killed) // max(1, plan.all_killed))
            for number in range(plan.kills + plan.all_killed):
                all_at_once = plan.all_killed and number % every == every - 1
                await self._kill(everybody=bool(all_at_once))
            for _ in range(plan.stops):
                await self._kill(everybody=False, label="stop")
        after = await self._memory()
        self.memory = {name: (before[name], after[name]) for name in before if name in after}

    async def _undisturbed(self) -> None:
        ranks = len(await self._ranks())
        async with self.streams.running():
            await asyncio.sleep(_SETTLE_S)
            begin = perf_counter()
            await asyncio.sleep(self.plan.undisturbed_s)
            self._note_steady(ranks, begin, perf_counter())

    def _note_steady(self, ranks: int, begin: float, end: float) -> None:
        """Nothing has disturbed the streams meanwhile."""
        self._undisturbed_spans.append((begin - self._begin, end - self._begin))
        steady = ElasticSteady(
            ranks=ranks,
            tokens_per_s=self.streams.rate(begin, end),
            median_gap_ms=self.streams.median_gap_s(begin, end) * 1e3,
            longest_gap_ms=self.streams.longest_gap_s(begin, end)[0] * 1e3,
        )
        self.note(
            f"undisturbed on {ranks} ranks: {steady.tokens_per_s:,.0f} tokens/s, gaps "
            f"{steady.median_gap_ms:.1f} ms (median), {steady.longest_gap_ms:.1f} (longest)"
        )
        self.steady.append(steady)

    async def _changes(self) -> None:
        """One after the other."""
        plan = self.plan
        path = plan.path or (plan.high, plan.low) * (plan.changes // 2 + 1)
        before = plan.low
        for ranks in path if plan.path else path[: plan.changes]:
            up = ranks > before
            await self._change("up" if up else "down", {"ranks": ranks}, plan.changes or len(path))
            if plan.path and all(steady.ranks != ranks for steady in self.steady):
                begin = perf_counter()
                await asyncio.sleep(plan.undisturbed_s)
                self._note_steady(ranks, begin, perf_counter())
            before = ranks
        if plan.swaps and plan.changes % 2:
            await self._scale_to(plan.low)
        for _ in range(plan.swaps):
            leaver = (await self._ranks())[0]["id"]
            await self._change("swap", {"add": 1, "remove": [leaver]}, plan.swaps)
        if plan.rebalances:
            await self._scale_to(plan.high)
        for _ in range(plan.rebalances):
            await self._change("rebalance", {"rebalance": True}, plan.rebalances)

    async def _change(self, label: EventLabel, body: dict[str, Any], count: int) -> None:
        begin = perf_counter()
        done = await self._operation(body)
        end = perf_counter()
        self._pending.append((label, begin, end, done))
        pause = done.get("pause_ms")
        self.note(
            f"{label}, {count} in all: {len(done['target'])} ranks, {done['state']} in "
            f"{end - begin:.2f} s, pause {pause if pause is None else round(pause, 1)} ms"
            f"{': ' + done['error'][:200] if done.get('error') else ''}"
        )
        await asyncio.sleep(self.plan.settle_s)

    def _close_changes(self) -> None:
        """When the answers that were under way are there, their gaps are known."""
        for label, begin, end, done in self._pending:
            gap_s, gap_begin = self.streams.longest_gap_s(begin, end + 0.5)
            view = msgspec.convert(done, OperationView)
            at_s = begin - self._begin
            self._events.append(change_event(label, at_s, end - begin, gap_s, view))
            self.changes.append(
                ElasticChange(
                    ranks=len(done["target"]),
                    state=done["state"],
                    seconds=end - begin,
                    pause_ms=done.get("pause_ms"),
                    longest_gap_ms=gap_s * 1e3,
                    gap_at_s=gap_begin - begin,
                    phases=done["phases"],
                    copied_experts=done["copied_experts"],
                    moved_requests=done["moved_requests"],
                    moved_with_kv=done["moved_with_kv"],
                    error=done.get("error"),
                    label=label,
                )
            )
        self._pending.clear()

    async def _kill(self, *, everybody: bool, label: EventLabel = "kill") -> None:
        plan = self.plan
        number = signal.SIGSTOP if label == "stop" else signal.SIGKILL
        ranks = await self._whole(plan.high)
        victims = ranks if everybody else [ranks[-1 if len(self.kills) % 2 else 0]]
        desired = _BACK * self.steady[-1].tokens_per_s
        async with self.streams.running():
            await asyncio.sleep(2 * _SETTLE_S)
            cursor = (await cluster_now(self.service.target)).cursor
            clock, at = datetime.now().astimezone(), perf_counter()
            for victim in victims:
                os.kill(victim["pid"], number)
            dead = {victim["pid"] for victim in victims}
            while {rank["pid"] for rank in await self._ranks()} & dead:
                await asyncio.sleep(_LOOK_S)
            await self._whole(plan.high)
            whole = perf_counter()
            await asyncio.sleep(max(2 * _SETTLE_S, at + _AFTER_S - whole))
            end = perf_counter()
        arrivals = self.streams.arrivals
        step_s = self.steady[-1].median_gap_ms / 1e3
        first_s, silence_s = silences_after(arrivals, at, within_s=_SILENCE_S, step_s=step_s)
        history = await events_since(self.service.target, cursor)
        outcome = EventOutcome(at_s=0.0, what=label, state="failed", begun_s=0.0)
        outcome = after_kill(outcome, victims[0]["id"], history, clock.timestamp())
        gap_s, _ = self.streams.longest_gap_s(at, end)
        self._events.append(loss_event(label, at - self._begin, whole - at, gap_s, outcome))
        kill = ElasticKill(
            killed=[victim["id"] for victim in victims],
            first_token_s=first_s,
            silence_s=silence_s,
            back_s=back_s(arrivals, at, end, desired),
            whole_s=whole - at,
            label=label,
        )
        self.note(
            f"{'stopped' if label == 'stop' else 'killed'} {kill.killed} at {clock:%H:%M:%S.%f}: "
            f"first token after {kill.first_token_s:.3f} s, "
            f"longest silence {kill.silence_s:.3f} s, 95 % after "
            f"{'-' if kill.back_s is None else round(kill.back_s, 1)} s, "
            f"all ranks after {kill.whole_s:.1f} s"
        )
        self.kills.append(kill)

    # ---- the service ------------------------------------------------------------------------

    async def _call(self, method: str, path: str, body: object = None) -> Any:
        status, answer = await call(self.service.target, method, path, body, timeout_s=60.0)
        if status >= 300:
            raise FlexpertError(f"{method} {path}: HTTP {status}: {answer}")
        return answer

    async def _ranks(self) -> list[dict[str, Any]]:
        ranks: list[dict[str, Any]] = (await self._call("GET", "/cluster"))["ranks"]
        return sorted(ranks, key=lambda rank: int(rank["id"]))

    async def _whole(self, count: int) -> list[dict[str, Any]]:
        """When so many ranks serve. Raises: FlexpertError: never."""
        limit = perf_counter() + _OPERATION_S
        while perf_counter() < limit:
            try:
                ranks = await self._ranks()
            except LoadError as error:
                raise FlexpertError(f"the service does not answer: {error}") from error
            if len(ranks) == count and all(rank["state"] == "active" for rank in ranks):
                return ranks
            await asyncio.sleep(_LOOK_S)
        raise FlexpertError(f"{count} ranks were not there again within {_OPERATION_S:.0f} s")

    async def _scale_to(self, ranks: int) -> dict[str, Any]:
        return await self._operation({"ranks": ranks})

    async def _operation(self, body: dict[str, Any]) -> dict[str, Any]:
        operation: dict[str, Any] = await self._call("POST", "/cluster/operations", body)
        while operation["state"] in ("preparing", "committing"):
            await asyncio.sleep(_LOOK_S)
            operation = await self._call("GET", f"/cluster/operations/{operation['id']}")
        return operation

    async def _memory(self) -> dict[str, float]:
        cluster = await self._call("GET", "/cluster")
        found = {"ranks": sum(rank["memory_bytes"] for rank in cluster["ranks"]) / 2**20}
        found |= await _gpu_memory_mib()
        return found


async def _gpu_memory_mib() -> dict[str, float]:
    """Used memory of each GPU as its driver says; {} where there is none."""
    try:
        process = await asyncio.create_subprocess_exec(
            *("nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
    except OSError:
        return {}
    out, _ = await process.communicate()
    try:
        used = [float(line) for line in out.decode().splitlines()]
    except ValueError:
        return {}
    return {f"GPU {index}": mib for index, mib in enumerate(used)}
