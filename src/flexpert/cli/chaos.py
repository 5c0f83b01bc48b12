"""`flexpert chaos`: ranks are killed, stopped and starved under traffic; every answer counts."""

from __future__ import annotations

import asyncio
import itertools
import random
import signal
import socket
import sys
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
from rich.table import Table

from flexpert.bench.load import Answer, LoadError, Target, call, closed_loop, complete
from flexpert.bench.machine import this_machine
from flexpert.bench.service import own_service
from flexpert.cli.chaos_report import (
    BIN_S,
    LETHAL,
    ChaosResult,
    Fault,
    Held,
    Seen,
    counts,
    rates,
    sparkline,
    times_of,
)
from flexpert.cli.demo import demo_requests, same
from flexpert.cli.demo_report import Plan
from flexpert.cluster.views import ClusterView, OperationView, RankView
from flexpert.errors import ConfigError, FlexpertError

KINDS = ("kill", "stop", "slow", "oom")

EXIT_OK = 0
EXIT_BAD = 1
EXIT_INTERRUPTED = 130

SERVE = (
    *("--model", "tiny", "--deterministic", "--kv-memory", "32MiB"),
    *("--shutdown-timeout-s", "0", "--log-level", "error"),
)
_STALL_S = 60.0
_BACK_S = 60.0  # until all ranks must be back after the last fault
_SLOW_S, _SLOW_STEP_S = 1.0, 0.05  # a slow rank: stopped half of the time
_STARVED_S = 1.0
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


def parse_faults(text: str) -> tuple[str, ...]:
    """Raises: ConfigError: an unknown kind, with the reason if it is one that is not offered."""
    kinds = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if "partition" in kinds:
        raise ConfigError(
            "--faults partition: ranks of one machine share its memory, so there is no network to "
            "cut between them; tests/comm/test_namespaces.py cuts one between two machines"
        )
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or not kinds:
        named = f"unknown fault {unknown[0]!r}" if unknown else "no fault is named"
        raise ConfigError(f"--faults: {named}; choose from {', '.join(KINDS)}")
    return kinds


def run_chaos(plan: ChaosPlan, *, console: Console, output: Path | None) -> int:
    """The whole run; the exit status."""
    try:
        result, seen = asyncio.run(_run(plan, console))
    except KeyboardInterrupt:
        console.print("interrupted; the service is stopped")
        return EXIT_INTERRUPTED
    _show(console, result, seen)
    if output:
        output.write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=2))
    if plan.plot:
        draw(plan, seen, result, plan.plot)
    return EXIT_OK if result.good else EXIT_BAD


async def _run(plan: ChaosPlan, console: Console) -> tuple[ChaosResult, Seen]:
    if plan.url:
        target = Target.parse(plan.url, plan.key)
        return await _disturb(plan, target, console)
    room = plan.ranks + (2 if plan.scaling else 0)
    size = ("--ranks", str(plan.ranks), "--max-ranks", str(room))
    with console.status("starting the service"):
        service = own_service((*SERVE, *size, *plan.flags))
        made = await service.__aenter__()
    try:
        return await _disturb(plan, made.target, console)
    finally:
        await service.__aexit__(*sys.exc_info())


async def _disturb(plan: ChaosPlan, target: Target, console: Console) -> tuple[ChaosResult, Seen]:
    demo = Plan(clients=plan.clients, requests=plan.requests, max_tokens=plan.max_tokens)
    requests = [target.message("POST", "/v1/completions", body) for body in demo_requests(demo)]
    first = await _cluster(target)
    _check_local(first)
    with console.status("undisturbed run"):
        expected: dict[int, Answer] = {}

        async def ask(number: int) -> None:
            expected[number] = await complete(target, requests[number], stall_s=_STALL_S)

        await closed_loop(ask, len(requests), plan.clients)
    broken = next((answer.error for answer in expected.values() if answer.error), None)
    if broken:
        raise FlexpertError(f"the undisturbed run failed already: {broken}")

    head = _head_of(first.ranks[0].pid)
    before = _held(head)
    seen = Seen(began=time.time())
    answers: list[tuple[int, Answer]] = []
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

        async with _listening(target, seen, len(first.ranks)), asyncio.TaskGroup() as group:
            telling = group.create_task(tell())
            load = group.create_task(closed_loop(send, jobs(), plan.clients))
            scaling = group.create_task(_scale(plan, target, changes)) if plan.scaling else None
            await _inject(plan, target, seen)
            if scaling:
                scaling.cancel()
                await asyncio.wait([scaling])
            back = await _all_back(target, len(first.ranks) if not plan.scaling else None)
            await asyncio.sleep(1.0)
            over.set()
            await load
            telling.cancel()

    ended = time.time()
    lost = [answer for _, answer in answers if not answer.whole]
    altered = [n for n, answer in answers if answer.whole and not same(answer, expected[n])]
    unfelt = sum(fault.kind in LETHAL and fault.gone is None for fault in seen.faults)
    return (
        ChaosResult(
            good=not lost and not altered and back and bool(answers),
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
            after=_held(head),
            back=back,
            errors=list(dict.fromkeys(a.error for a in lost if a.error))[:5],
        ),
        seen,
    )


# ---- the service ---------------------------------------------------------------------------------


async def _cluster(target: Target) -> ClusterView:
    status, answer = await call(target, "GET", "/cluster")
    if status != 200:
        raise LoadError(f"/cluster answered {status}")
    return msgspec.convert(answer, ClusterView)


def _check_local(cluster: ClusterView) -> None:
    """Raises: ConfigError: its processes are not here."""
    for rank in cluster.ranks:
        if rank.host != socket.gethostname() or not psutil.pid_exists(rank.pid):
            raise ConfigError(
                f"rank {rank.id} runs on {rank.host}; chaos signals processes, so run it there"
            )


def _head_of(pid: int) -> psutil.Process:
    """The process that serves: a rank's parent is the fork server, whose parent is the head."""
    server = psutil.Process(pid).parent()
    head = server.parent() if server else None
    if head is None:
        raise FlexpertError(f"process {pid} is no rank of a running service")
    return head


def _held(head: psutil.Process) -> Held:
    return Held(
        round(head.memory_info().rss / 2**20, 1),
        head.num_fds(),
        len(head.children(recursive=True)),
    )


@asynccontextmanager
async def _listening(target: Target, seen: Seen, wanted: int) -> Any:
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
                    _note(seen, msgspec.json.decode(line[6:]), wanted)

    task = asyncio.create_task(listen())
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError, httpx.HTTPError):
            await task


def _note(seen: Seen, event: dict[str, Any], wanted: int) -> None:
    data, at = event.get("data", {}), event.get("time", 0.0)
    match event.get("kind"):
        case "rank" if data.get("state") == "gone":
            seen.on_gone(data["id"], at)
        case "epoch":
            seen.on_epoch(data["ranks"], at, wanted)
        case "warning":
            seen.warnings.append(str(data.get("error")))


async def _all_back(target: Target, wanted: int | None) -> bool:
    """Until the ranks that are wanted are active and nothing is under way."""
    deadline = time.monotonic() + _BACK_S
    while time.monotonic() < deadline:
        with suppress(LoadError):
            cluster = await _cluster(target)
            active = sorted(rank.id for rank in cluster.ranks if rank.state == "active")
            enough = wanted is None or len(active) == wanted
            if cluster.operation is None and active == cluster.wanted and enough:
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


# ---- faults --------------------------------------------------------------------------------------


async def _inject(plan: ChaosPlan, target: Target, seen: Seen) -> None:
    """By seed: when, what and, of those that are up then, whom."""
    draw = random.Random(plan.seed)
    under_way: set[asyncio.Task[None]] = set()
    end = seen.began + plan.duration_s
    try:
        while True:
            await asyncio.sleep(draw.uniform(0.5, 1.5) / plan.rate)
            if time.time() >= end:
                break
            kind = draw.choice(plan.faults)
            with suppress(LoadError):
                up = [rank for rank in (await _cluster(target)).ranks if rank.pid]
                for rank in draw.sample(up, min(len(up), 2 if plan.pairs else 1)):
                    task = asyncio.create_task(_strike(kind, rank, seen))
                    under_way.add(task)
                    task.add_done_callback(under_way.discard)
    finally:
        if under_way:
            await asyncio.wait(under_way)


async def _strike(kind: str, rank: RankView, seen: Seen) -> None:
    """One fault. psutil signals only the very process that was looked up."""
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(rank.pid)
        seen.faults.append(Fault(kind, rank.id, time.time()))
        if kind == "kill":
            process.send_signal(signal.SIGKILL)
        elif kind == "stop":
            process.send_signal(signal.SIGSTOP)
        elif kind == "slow":
            for _ in range(int(_SLOW_S / _SLOW_STEP_S / 2)):
                process.send_signal(signal.SIGSTOP)
                try:
                    await asyncio.sleep(_SLOW_STEP_S)
                finally:
                    process.send_signal(signal.SIGCONT)
                await asyncio.sleep(_SLOW_STEP_S)
        else:
            free = process.rlimit(psutil.RLIMIT_AS)
            process.rlimit(psutil.RLIMIT_AS, (process.memory_info().vms, free[1]))
            try:
                await asyncio.sleep(_STARVED_S)
            finally:
                process.rlimit(psutil.RLIMIT_AS, free)


# ---- for people ----------------------------------------------------------------------------------


def _show(console: Console, result: ChaosResult, seen: Seen) -> None:
    named = ", ".join(f"{count} {kind}" for kind, count in result.faults.items()) or "none"
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_row("faults", named)
    if result.without_effect:
        table.add_row("of them without effect", str(result.without_effect))
    if result.changes:
        table.add_row("changes", ", ".join(f"{n} {state}" for state, n in result.changes.items()))
    table.add_row("requests sent", str(result.sent))
    table.add_row("answered", str(result.answered))
    table.add_row("lost", str(result.lost))
    table.add_row("altered", str(result.altered))
    table.add_row("tokens a second", f"{result.tokens_per_s:,.0f}")
    for name, before, after in (
        ("memory of the head, MiB", result.before.resident_mib, result.after.resident_mib),
        ("descriptors of the head", result.before.descriptors, result.after.descriptors),
        ("processes", result.before.processes, result.after.processes),
    ):
        table.add_row(name, f"{before} → {after}")
    console.print(table)
    if result.times:
        times = Table(title="ms after the fault: median, 90 %, longest", box=None, pad_edge=False)
        for column in ("", "detected", "next epoch", "first good step", "full capacity"):
            times.add_column(column, justify="right" if column else "left")
        for kind, found in result.times.items():
            cells = [
                "" if s is None else f"{s.median_ms:,.0f}  {s.p90_ms:,.0f}  {s.longest_ms:,.0f}"
                for s in (found.detect, found.epoch, found.first_good_step, found.full_capacity)
            ]
            times.add_row(kind, *cells)
        console.print(times)
    console.print("tokens a second over time")
    console.print(sparkline(rates(seen, seen.began + result.duration_s)))
    for error in result.errors:
        console.print(f"lost: {error}", markup=False)
    if not result.back:
        console.print("not all ranks came back; see flexpert status and the service's log")
    console.print("PASS" if result.good else f"FAIL (seed {result.seed})")


def draw(plan: ChaosPlan, seen: Seen, result: ChaosResult, path: Path) -> None:
    """Tokens a second over time, with the faults.

    Raises: FlexpertError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    axes = figure.add_subplot()
    values = rates(seen, seen.began + result.duration_s)
    axes.step([at * BIN_S for at in range(len(values))], values, where="post", linewidth=1.2)
    colours = {"kill": "#a50f15", "stop": "#d94801", "slow": "#756bb1", "oom": "#006d2c"}
    shown: set[str] = set()
    for fault in seen.faults:
        axes.axvline(
            fault.at - seen.began,
            color=colours[fault.kind],
            linewidth=1.0,
            label=None if fault.kind in shown else fault.kind,
        )
        shown.add(fault.kind)
    axes.set_xlabel("seconds")
    axes.set_ylabel(f"tokens a second, in {BIN_S:g} s")
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    if shown:
        axes.legend(loc="lower right")
    axes.set_title(
        f"{result.ranks} ranks, {result.clients} clients, {len(seen.faults)} faults, "
        f"{result.lost} lost, {result.altered} altered\n{result.machine.line()}",
        fontsize=9,
    )
    try:
        figure.savefig(path, dpi=110)
    except OSError as error:
        raise FlexpertError(f"cannot write {path}: {error.strerror}") from None


def check_flags(flags: Sequence[str] | None, url: str | None) -> tuple[str, ...]:
    """Raises: ConfigError: flags for a service that runs already."""
    if flags and url:
        raise ConfigError("flags after -- are for our own service; leave out --url")
    return tuple(flags or ())
