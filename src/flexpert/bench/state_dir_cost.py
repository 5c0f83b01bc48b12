"""`flexpert bench state-dir`: what it costs that the head could be resumed, in one run with what it
is without.

Two services run, one with a state directory, and have the same load in turn; the one that waits
sleeps. Which has it first changes from round to round, since a machine is not the same from one
minute to the next.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import msgspec
import psutil

from flexpert.bench.load import closed_loop, complete, completion_body
from flexpert.bench.machine import Machine, this_machine
from flexpert.bench.prompts import random_prompts, token_pool
from flexpert.bench.service import Service, own_service
from flexpert.bench.statistics import Figures, figures
from flexpert.errors import FlexpertError

STALL_S = 120.0
WITHOUT, WITH = "without", "with"

Note = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class StateDirPlan:
    """What is measured. concurrencies: one after the other. rounds: at each, of each service.
    answers: of each client in a round. folder: where the directory is made; None: the system's for
    temporary files. flags: of both services."""

    concurrencies: Sequence[int]
    rounds: int
    answers: int
    input_tokens: int
    output_tokens: int
    seed: int
    folder: Path | None = None
    flags: tuple[str, ...] = ()


class StateDirRound(msgspec.Struct, frozen=True, kw_only=True):
    """Processor time for a token, in microseconds: of the head, and of it and all below it."""

    figures: Figures
    head_us: float
    service_us: float


class StateDirCost(msgspec.Struct, frozen=True, kw_only=True):
    """At one concurrency. rounds: without and with. tokens_ratio: tokens/s with over without;
    head_us, service_us: more processor time for a token; service_share: of what it is without.
    Each is the median over pairs of rounds."""

    concurrency: int
    rounds: dict[str, list[StateDirRound]]
    tokens_ratio: float
    head_us: float
    service_us: float
    service_share: float

    @classmethod
    def of(cls, concurrency: int, rounds: dict[str, list[StateDirRound]]) -> StateDirCost:
        pairs = list(zip(rounds[WITH], rounds[WITHOUT], strict=True))
        return cls(
            concurrency=concurrency,
            rounds=rounds,
            tokens_ratio=median(
                one.figures.output_tokens_per_s / other.figures.output_tokens_per_s
                for one, other in pairs
            ),
            head_us=median(one.head_us - other.head_us for one, other in pairs),
            service_us=median(one.service_us - other.service_us for one, other in pairs),
            service_share=median(one.service_us / other.service_us - 1 for one, other in pairs),
        )


class StateDirReport(msgspec.Struct, frozen=True, kw_only=True):
    command: str
    machine: Machine
    flags: list[str]
    output_tokens: int
    costs: list[StateDirCost]

    @property
    def failed(self) -> int:
        """Requests."""
        rounds = [one for cost in self.costs for kind in cost.rounds.values() for one in kind]
        return sum(one.figures.failed for one in rounds)


def run_state_dir(plan: StateDirPlan, note: Note) -> StateDirReport:
    """Raises: FlexpertError"""
    with tempfile.TemporaryDirectory(prefix="flexpert-", dir=plan.folder) as folder:
        costs = asyncio.run(_measure(plan, Path(folder, "state"), note))
    return StateDirReport(
        command=" ".join(["flexpert", *sys.argv[1:]]),
        machine=this_machine(),
        flags=list(plan.flags),
        output_tokens=plan.output_tokens,
        costs=costs,
    )


async def _measure(plan: StateDirPlan, folder: Path, note: Note) -> list[StateDirCost]:
    costs = []
    async with AsyncExitStack() as stack:
        services = {
            kind: await stack.enter_async_context(own_service((*plan.flags, *more), report=note))
            for kind, more in ((WITHOUT, ()), (WITH, ("--state-dir", str(folder))))
        }
        pool = await token_pool(services[WITHOUT].target)
        for concurrency in plan.concurrencies:
            rounds: dict[str, list[StateDirRound]] = {kind: [] for kind in services}
            for number in range(plan.rounds + 1):
                # other prompts each time, which the prefix cache does not know
                seed, count = plan.seed + number, plan.answers * concurrency
                prompts = random_prompts(pool, plan.input_tokens, count, seed)
                order = list(services)[:: -1 if number % 2 else 1]
                for kind in order:
                    one = await _round(services[kind], plan, prompts, concurrency)
                    what = "warming up" if number == 0 else f"round {number}"
                    speed = f"{one.figures.output_tokens_per_s:,.0f} tokens/s"
                    cpu = f"{one.head_us:.0f} µs of CPU in the head"
                    note(f"{concurrency} at once, {what}, {kind}: {speed}, {cpu}")
                    if number:
                        rounds[kind].append(one)
            costs.append(StateDirCost.of(concurrency, rounds))
    return costs


async def _round(
    service: Service, plan: StateDirPlan, prompts: Sequence[Any], concurrency: int
) -> StateDirRound:
    requests = [
        service.target.message(
            "POST",
            "/v1/completions",
            completion_body(
                prompt, max_tokens=plan.output_tokens, temperature=0.0, ignore_eos=True
            ),
        )
        for prompt in prompts
    ]

    async def send(number: int) -> Any:
        return await complete(service.target, requests[number], stall_s=STALL_S)

    before = _cpu_s(service.pid)
    found = figures(await closed_loop(send, len(requests), concurrency))
    spent = [after - then for after, then in zip(_cpu_s(service.pid), before, strict=True)]
    if found.failed == found.requests:
        raise FlexpertError(f"the service does not answer: {found.errors[0]}")
    head_us, service_us = (1e6 * seconds / found.output_tokens for seconds in spent)
    return StateDirRound(figures=found, head_us=head_us, service_us=service_us)


def _cpu_s(pid: int) -> tuple[float, float]:
    """Processor time of a process, and of it and all below it."""
    head = psutil.Process(pid)
    own = total = _seconds(head)
    for process in head.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            total += _seconds(process)
    return own, total


def _seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)
