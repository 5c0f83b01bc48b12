"""What is done to a service at given times of a load: ranks change, or one is killed.

t=20 scale 4        as `flexpert scale 4`
t=40s remove 1 3    as `flexpert scale --remove 1 3`
t=1m rebalance      as `flexpert rebalance`
t=70 kill 0         SIGKILL for rank 0, which must run on this machine
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import msgspec
import psutil

from flexpert.bench.cluster_history import all_back, change_ranks, cluster_now, events_since
from flexpert.bench.load import ClientAnswer, LoadError, Target
from flexpert.bench.statistics import longest_gap
from flexpert.cluster.views import ClusterEvent, ClusterView, OperationView, RankView
from flexpert.config import parse_duration
from flexpert.errors import ConfigError
from flexpert.reading import shown

EVENT_EXAMPLE = "t=20 scale 4"
_FORK_SERVER = "flexpert.forking.fork_server"
_AFTER_S = 0.5  # in which a gap may begin that a change has caused


@dataclass(frozen=True, slots=True)
class TimedEvent:
    """at: seconds from the begin of the load. body: of the change; None: `killed` is."""

    at: float
    text: str
    body: dict[str, Any] | None = None
    killed: int | None = None


def parse_event(text: str) -> TimedEvent:
    """From "t=20 scale 4". Raises: ConfigError"""
    when, *words = text.split() or [""]
    if not when.startswith("t="):
        raise _malformed(text)
    try:
        at = parse_duration(when.removeprefix("t="))
    except ValueError:
        raise _malformed(text) from None
    if not isinstance(at, float) or not 0 <= at <= 86400:
        raise _malformed(text)
    spelled = " ".join(words)
    numbers = [int(word) for word in words[1:] if re.fullmatch(r"\d{1,6}", word)]
    match words[:1], len(numbers) == len(words) - 1, len(numbers):
        case ["scale"], True, 1 if numbers[0] > 0:
            return TimedEvent(at, spelled, body={"ranks": numbers[0]})
        case ["remove"], True, count if count > 0:
            return TimedEvent(at, spelled, body={"add": 0, "remove": sorted(set(numbers))})
        case ["rebalance"], True, 0:
            return TimedEvent(at, spelled, body={"rebalance": True})
        case ["kill"], True, 1:
            return TimedEvent(at, spelled, killed=numbers[0])
    raise _malformed(text)


def _malformed(text: str) -> ConfigError:
    return ConfigError(
        f"--event {shown(text)}: write t=SECONDS and scale N, remove ID..., kill ID or rebalance, "
        f"for example {EVENT_EXAMPLE!r}"
    )


class EventOutcome(msgspec.Struct, frozen=True, kw_only=True):
    """What became of an event. Times are seconds from the begin of the load.

    state: of its operation; of a kill "done" when all ranks that are desired were there again;
    "refused"; "not reached": the load was over before. detected_s: of a kill, when the head knew.
    operations: the one that was asked for, or after a kill those that the service began by itself.
    longest_gap_ms: in any stream, of those that touch the time from its begin until half a second
    after its end.
    """

    at_s: float
    what: str
    state: str
    begun_s: float | None = None
    detected_s: float | None = None
    ended_s: float | None = None
    operations: list[OperationView] = []
    longest_gap_ms: float | None = None
    error: str | None = None

    @property
    def failed(self) -> bool:
        return self.state != "done"


def check_events(events: Sequence[TimedEvent], view: ClusterView) -> None:
    """Whether they can happen to this service, as far as is known before.

    Raises: ConfigError
    """
    for event in events:
        wanted = (event.body or {}).get("ranks", 0)
        if wanted > view.max_ranks:
            raise ConfigError(
                f"--event '{event.text}': the service has room for {view.max_ranks} ranks; start "
                "it with a larger --max-ranks"
            )
        elsewhere = {rank.host for rank in view.ranks} - {socket.gethostname()}
        if event.killed is not None and elsewhere:
            raise ConfigError(
                f"--event '{event.text}': ranks run on {', '.join(sorted(elsewhere))}; a process "
                "can be killed only where it runs"
            )


def kill_rank(rank: RankView) -> None:
    """SIGKILL, if it is a process that flexpert has started on this machine.

    Raises: LoadError: it is not.
    """
    try:
        parent = psutil.Process(rank.pid).parent()
        ours = rank.host == socket.gethostname() and parent and _FORK_SERVER in parent.cmdline()
        if not ours:
            raise LoadError(
                f"rank {rank.id}: process {rank.pid} is none that flexpert started here"
            )
        os.kill(rank.pid, signal.SIGKILL)
    except (psutil.Error, OSError) as error:
        raise LoadError(f"rank {rank.id} could not be killed: {error}") from None


@dataclass(slots=True)
class EventRun:
    """The events of one load. begin: of the load, on `perf_counter`."""

    target: Target
    events: Sequence[TimedEvent]
    begin: float = field(default_factory=perf_counter)
    _cursor: int = 0
    _done: dict[int, EventOutcome] = field(default_factory=dict)
    _tasks: list[asyncio.Task[None]] = field(default_factory=list)

    async def start(self) -> None:
        """At the begin of the load. Raises: LoadError"""
        self._cursor = (await cluster_now(self.target)).cursor
        self.begin = perf_counter()
        self._tasks = [
            asyncio.create_task(self._one(number, event))
            for number, event in enumerate(self.events)
        ]

    async def cancel(self) -> None:
        """If the load fails."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def finish(self, answers: Sequence[ClientAnswer]) -> list[EventOutcome]:
        """When the load is over: what has not begun will not; what has is waited for.

        Raises: LoadError
        """
        now = perf_counter() - self.begin
        for number, event in enumerate(self.events):
            if number not in self._done and event.at > now:
                self._tasks[number].cancel()
                self._done[number] = EventOutcome(
                    at_s=event.at, what=event.text, state="not reached"
                )
        await asyncio.gather(*self._tasks, return_exceptions=True)
        kills = [n for n, event in enumerate(self.events) if event.killed is not None]
        if any(self._done[n].begun_s is not None for n in kills):
            await all_back(self.target)
        history = await events_since(self.target, self._cursor)
        wall = time.time() - perf_counter() + self.begin  # of the load's begin
        for number in kills:
            done, rank = self._done[number], self.events[number].killed
            if done.begun_s is not None and done.error is None and rank is not None:
                self._done[number] = after_kill(done, rank, history, wall)
        return [self._with_gap(self._done[n], answers) for n in range(len(self.events))]

    async def _one(self, number: int, event: TimedEvent) -> None:
        while (left := self.begin + event.at - perf_counter()) > 0:
            await asyncio.sleep(left)  # uvloop's timers are whole milliseconds, and may be early
        begun = perf_counter() - self.begin
        told = EventOutcome(at_s=event.at, what=event.text, state="refused", begun_s=begun)
        self._done[number] = told
        try:
            if event.body is not None:
                operation = await change_ranks(self.target, event.body)
                self._done[number] = msgspec.structs.replace(
                    told,
                    state=operation.state,
                    ended_s=perf_counter() - self.begin,
                    operations=[operation],
                    error=operation.error,
                )
                return
            ranks = {rank.id: rank for rank in (await cluster_now(self.target)).ranks}
            if event.killed not in ranks:
                raise LoadError(f"there is no rank {event.killed}")
            kill_rank(ranks[event.killed])
            self._done[number] = msgspec.structs.replace(told, state="failed")
        except LoadError as error:
            self._done[number] = msgspec.structs.replace(told, error=str(error))

    def _with_gap(self, done: EventOutcome, answers: Sequence[ClientAnswer]) -> EventOutcome:
        if done.begun_s is None:
            return done
        end = done.begun_s if done.ended_s is None else done.ended_s
        begin = self.begin + done.begun_s
        gap_s, _ = longest_gap(answers, begin, self.begin + end + _AFTER_S)
        return msgspec.structs.replace(done, longest_gap_ms=gap_s * 1e3)


def after_kill(
    done: EventOutcome, rank: int, history: Sequence[ClusterEvent], wall: float
) -> EventOutcome:
    """With what the service did about it. wall: seconds since 1970 at the begin of the load."""
    killed = wall + (done.begun_s or 0.0)
    found: dict[str, OperationView] = {}
    detected: float | None = None
    whole: float | None = None
    for event in history:
        data = event.data
        if event.time < killed:
            continue
        if event.kind == "rank" and data.get("id") == rank and data.get("state") == "gone":
            detected = detected or event.time
        elif event.kind == "operation":
            view = msgspec.convert(data, OperationView)
            caused = view.purpose in ("recovery", "restart") and view.created >= killed
            if caused and rank in (*view.add, *view.remove):
                found[view.id] = view
        elif event.kind == "epoch" and detected and set(data["ranks"]) >= set(data["desired"]):
            whole = whole or event.time
    return msgspec.structs.replace(
        done,
        state="done" if whole is not None else "failed",
        detected_s=None if detected is None else detected - wall,
        ended_s=None if whole is None else whole - wall,
        operations=list(found.values()),
        error=None if whole is not None else "not all ranks were there again",
    )
