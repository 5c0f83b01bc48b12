"""`flexpert chaos`: ranks are killed, stopped and starved under traffic; every answer counts."""

from __future__ import annotations

import asyncio
import itertools
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import msgspec
import psutil
from rich.console import Console

from flexpert.bench.cluster_history import cluster_now
from flexpert.bench.load import ClientAnswer, LoadError, Target, call, closed_loop, complete
from flexpert.bench.machine import this_machine
from flexpert.bench.service import own_service
from flexpert.cluster.views import OperationView
from flexpert.display.output import write_report
from flexpert.engine.faults import VARIABLE
from flexpert.errors import ConfigError, FlexpertError
from flexpert.trials.chaos_processes import BY_ITSELF, Family, find_family, strike
from flexpert.trials.chaos_report import (
    LETHAL,
    ChaosFault,
    ChaosResult,
    Seen,
    counts,
    growth,
    times_of,
)
from flexpert.trials.chaos_view import draw, show
from flexpert.trials.demo import demo_requests, same
from flexpert.trials.demo_report import DemoPlan

KINDS = ("kill", "stop", "slow", "oom", "partition")

EXIT_OK = 0
EXIT_BAD = 1
EXIT_INTERRUPTED = 130

SERVE = (
    *("--model", "tiny", "--deterministic", "--kv-memory", "32MiB"),
    *("--shutdown-timeout", "0", "--log-level", "error"),
)
_STALL_S = 60.0
_SHOWN_LINES = 30  # of what a service printed before a bad end
_BACK_S = 60.0  # until all ranks must be back after the last fault
_CUT_S = (0.5, 3.0)  # a partition: shorter and longer than the stall timeout
_SCALE_EVERY_S = 3.0


@dataclass(frozen=True, slots=True)
class ChaosPlan:
    """rate: faults a second. pairs: each strikes two ranks at once. scaling: ranks come and go."""

    faults: tuple[str, ...] = KINDS
    rate: float = 0.5
    duration_s: float = 30.0
    seed: int = 0
    ranks: int = 4
    clients: int = 16
    requests: int = 64
    max_tokens: int = 64
    pairs: bool = False
    scaling: bool = False
    plot: Path | None = None
    flags: tuple[str, ...] = ()
    url: str | None = None
    key: str | None = None


def parse_faults(text: str | None, *, own: bool) -> tuple[str, ...]:
    """Without a text: all, or with a service of somebody else those that signals can do.

    Raises: ConfigError: an unknown kind, or none.
    """
    if text is None:
        return tuple(kind for kind in KINDS if own or kind not in BY_ITSELF)
    kinds = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or not kinds:
        named = f"unknown fault {unknown[0]!r}" if unknown else "no fault is named"
        raise ConfigError(f"--faults: {named}; choose from {', '.join(KINDS)}")
    return kinds


def run_chaos(
    plan: ChaosPlan, *, console: Console, as_json: bool = False, output: Path | None = None
) -> int:
    """The whole run, told on `console`, with its result as in `write_report`; the exit status."""
    try:
        result, seen = asyncio.run(_run(plan, console))
    except KeyboardInterrupt:
        console.print("interrupted; the service is stopped")
        return EXIT_INTERRUPTED
    show(console, result, seen)
    write_report(result, as_json=as_json, output=output)
    if plan.plot:
        draw(seen, result, plan.plot)
    return EXIT_OK if result.good else EXIT_BAD


async def _run(plan: ChaosPlan, console: Console) -> tuple[ChaosResult, Seen]:
    if plan.url:
        target = Target.parse(plan.url, plan.key)
        return await _disturb(plan, target, console)
    room = plan.ranks + (2 if plan.scaling else 0)
    size = ("--ranks", str(plan.ranks), "--max-ranks", str(room))
    with console.status("starting the service"):
        folder = tempfile.TemporaryDirectory(prefix="flexpert-faults-")
        environment = {VARIABLE: folder.name} if set(plan.faults) & set(BY_ITSELF) else {}
        service = own_service((*SERVE, *size, *plan.flags), environment=environment)
        made = await service.__aenter__()
    try:
        result, seen = await _disturb(plan, made.target, console)
        seen.last_lines = () if result.good else tuple(made.output)[-_SHOWN_LINES:]
        return result, seen
    finally:
        await service.__aexit__(*sys.exc_info())
        folder.cleanup()


async def _disturb(plan: ChaosPlan, target: Target, console: Console) -> tuple[ChaosResult, Seen]:
    demo = DemoPlan(clients=plan.clients, requests=plan.requests, max_tokens=plan.max_tokens)
    requests = [target.message("POST", "/v1/completions", body) for body in demo_requests(demo)]
    first = await cluster_now(target)
    family = find_family(first.ranks, target.port)
    by_itself = [kind for kind in plan.faults if kind in BY_ITSELF]
    if by_itself and family.folder is None:
        raise ConfigError(
            f"--faults {by_itself[0]}: ranks do that themselves, and only in a service that was "
            f"started with {VARIABLE}=FOLDER in its environment"
        )
    with console.status("undisturbed run"):
        expected: dict[int, ClientAnswer] = {}

        async def ask(number: int) -> None:
            expected[number] = await complete(target, requests[number], stall_s=_STALL_S)

        await closed_loop(ask, len(requests), plan.clients)
    broken = next((answer.error for answer in expected.values() if answer.error), None)
    if broken:
        raise FlexpertError(f"the undisturbed run failed already: {broken}")

    before = family.held(first.ranks)
    seen = Seen(began=time.time())
    answers: list[tuple[int, ClientAnswer]] = []
    changes: Counter[str] = Counter()
    over = asyncio.Event()

    async def send(number: int) -> None:
        place = number % len(requests)
        answer = await complete(
            target,
            requests[place],
            stall_s=_STALL_S,
            on_tokens=lambda count: seen.on_tokens(time.time(), count),
        )
        answers.append((place, answer))

    def jobs() -> Iterator[int]:
        for number in itertools.count():
            if over.is_set():
                return
            yield number

    with console.status("") as status:

        async def tell() -> None:
            while True:
                wrong = sum(not a.whole or not same(a, expected[n]) for n, a in answers)
                status.update(
                    f"{time.time() - seen.began:.0f} s: {len(seen.faults)} faults, "
                    f"{len(answers)} answers, {wrong} lost or altered"
                )
                await asyncio.sleep(0.5)

        async with _listening(target, seen), asyncio.TaskGroup() as group:
            telling = group.create_task(tell())
            load = group.create_task(closed_loop(send, jobs(), plan.clients))
            scaling = group.create_task(_scale(plan, target, changes)) if plan.scaling else None
            await _inject(plan, target, family, seen)
            if scaling:
                scaling.cancel()
                await asyncio.wait([scaling])
                await _scale_back(target, len(first.ranks))
            back = await _all_back(target, len(first.ranks))
            await asyncio.sleep(1.0)
            over.set()
            await load
            telling.cancel()

    ended = time.time()
    after = family.held((await cluster_now(target)).ranks)
    grown = growth(before, after)
    lost = [answer for _, answer in answers if not answer.whole]
    altered = [n for n, answer in answers if answer.whole and not same(answer, expected[n])]
    unfelt = sum(fault.kind in LETHAL and fault.gone is None for fault in seen.faults)
    return (
        ChaosResult(
            good=back and bool(answers) and not (lost or altered or grown or seen.unharmed),
            machine=this_machine(),
            seed=plan.seed,
            ranks=len(first.ranks),
            clients=plan.clients,
            duration_s=round(ended - seen.began, 2),
            faults=counts(seen.faults),
            without_effect=unfelt,
            sent=len(answers),
            answered=len(answers) - len(lost),
            lost=len(lost),
            altered=len(altered),
            tokens_per_s=round(sum(a.tokens for _, a in answers) / (ended - seen.began), 1),
            changes=dict(changes),
            times=times_of(seen.faults),
            before=before,
            after=after,
            back=back,
            unharmed=seen.unharmed,
            grown=grown,
            errors=list(dict.fromkeys(a.error for a in lost if a.error))[:5],
        ),
        seen,
    )


# ---- the service ---------------------------------------------------------------------------------


@asynccontextmanager
async def _listening(target: Target, seen: Seen) -> Any:
    """Notes what the head tells while the block lasts."""

    async def listen() -> None:
        headers = {"authorization": f"Bearer {target.key}"} if target.key else {}
        scheme = "https" if target.tls else "http"
        url = f"{scheme}://{target.host}:{target.port}{target.prefix}/cluster/events"
        async with (
            httpx.AsyncClient(headers=headers, timeout=httpx.Timeout(None, connect=5.0)) as client,
            client.stream("GET", url) as stream,
        ):
            async for line in stream.aiter_lines():
                if line.startswith("data: "):
                    _note(seen, msgspec.json.decode(line[6:]))

    task = asyncio.create_task(listen())
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError, httpx.HTTPError):
            await task


def _note(seen: Seen, event: dict[str, Any]) -> None:
    data, at = event.get("data", {}), event.get("time", 0.0)
    match event.get("kind"):
        case "rank" if data.get("state") == "gone":
            by_itself = data["evicted"] or data["status"] > 0
            reason = data["reason"]
            seen.on_gone(data["id"], data["pid"], at, unasked=by_itself, reason=reason)
        case "epoch":
            seen.on_epoch(data["ranks"], data["desired"], at)
        case "warning":
            seen.warnings.append(str(data.get("error")))
        case "overrun":
            raise LoadError("the service said more than this could note; faults would be missed")


async def _all_back(target: Target, desired: int) -> bool:
    """Until so many ranks are active, those that are desired, and nothing is under way."""
    deadline = time.monotonic() + _BACK_S
    while time.monotonic() < deadline:
        with suppress(LoadError):
            cluster = await cluster_now(target)
            active = sorted(rank.id for rank in cluster.ranks if rank.state == "active")
            if cluster.operation is None and active == cluster.desired and len(active) == desired:
                return True
        await asyncio.sleep(0.1)
    return False


async def _scale(plan: ChaosPlan, target: Target, changes: Counter[str]) -> None:
    """Up by two, down again, for ever; a change that a loss interrupts may fail."""
    for number in itertools.count():
        await asyncio.sleep(_SCALE_EVERY_S)
        body = {"ranks": plan.ranks + (0 if number % 2 else 2)}
        with suppress(LoadError):
            status, answer = await call(target, "POST", "/cluster/operations", body)
            if status != 202:
                changes["refused"] += 1
                continue
            operation = msgspec.convert(answer, OperationView)
            while operation.state in ("preparing", "committing"):
                await asyncio.sleep(0.05)
                path = f"/cluster/operations/{operation.id}"
                operation = msgspec.convert((await call(target, "GET", path))[1], OperationView)
            changes[operation.state] += 1


async def _scale_back(target: Target, ranks: int) -> None:
    """To as many as there were; once more if a loss interrupts it, until `_BACK_S` are over."""
    deadline = time.monotonic() + _BACK_S
    while time.monotonic() < deadline:
        with suppress(LoadError):
            cluster = await cluster_now(target)
            if cluster.operation is None:
                if len(cluster.desired) == ranks:
                    return
                await call(target, "POST", "/cluster/operations", {"ranks": ranks})
        await asyncio.sleep(0.1)


# ---- faults --------------------------------------------------------------------------------------


async def _inject(plan: ChaosPlan, target: Target, family: Family, seen: Seen) -> None:
    """Drawn by seed: when, what, and whom among the ranks that are up then."""
    draw, whom = random.Random(plan.seed), random.Random(f"whom {plan.seed}")
    under_way: set[asyncio.Task[None]] = set()
    end = seen.began + plan.duration_s
    try:
        while True:
            await asyncio.sleep(draw.uniform(0.5, 1.5) / plan.rate)
            if time.time() >= end:
                break
            kind, seconds = draw.choice(plan.faults), draw.uniform(*_CUT_S)
            with suppress(LoadError):
                up = [rank for rank in (await cluster_now(target)).ranks if rank.pid]
                for rank in whom.sample(up, min(len(up), 2 if plan.pairs else 1)):
                    fault = ChaosFault(kind, rank.id, rank.pid, time.time())
                    fault.seconds = seconds if kind == "partition" else 0.0
                    fault.serving = rank.state not in ("starting", "preparing", "ready")
                    task = asyncio.create_task(_strike(family, fault, seen))
                    under_way.add(task)
                    task.add_done_callback(under_way.discard)
    finally:
        if under_way:
            await asyncio.wait(under_way)


async def _strike(family: Family, fault: ChaosFault, seen: Seen) -> None:
    seen.faults.append(fault)
    try:
        await strike(family, fault)
    except psutil.NoSuchProcess:  # another fault was quicker, or it has left
        if fault.kind not in ("slow", "partition"):
            seen.faults.remove(fault)


def check_flags(flags: Sequence[str] | None, url: str | None) -> tuple[str, ...]:
    """Raises: ConfigError: flags for a service that runs already."""
    if flags and url:
        raise ConfigError("flags after -- are for our own service; leave out --url")
    return tuple(flags or ())
