"""`flexpert bench head`: the processor time that a streamed token takes of head, ranks and client.

Of /proc, as the system counts it; with another checkout of flexpert its head has the same load in
turn, and which comes first changes from round to round.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import msgspec
import psutil
import uvloop
from rich.table import Table

from flexpert.bench.cost_rounds import CostLoad, CostRound, Note, cost_round
from flexpert.bench.machine import Machine, this_machine
from flexpert.bench.prompts import random_prompts, token_pool
from flexpert.bench.service import own_service
from flexpert.errors import ConfigError

THIS = "this"
BEFORE = "before"


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadCostPlan:
    """before: another checkout to compare with. flags: of the service."""

    load: CostLoad
    before: Path | None = None
    flags: tuple[str, ...] = ()

    @property
    def sources(self) -> dict[str, dict[str, str]]:
        """Which code → the environment of a service of it.

        Raises: ConfigError: there is no such checkout.
        """
        if self.before is None:
            return {THIS: {}}
        source = self.before.resolve() / "src"
        if not (source / "flexpert" / "__init__.py").is_file():
            raise ConfigError(f"{self.before} is no checkout of flexpert")
        return {BEFORE: {"PYTHONPATH": str(source)}, THIS: {}}


class HeadCost(msgspec.Struct, frozen=True, kw_only=True):
    """At so many streams at once. rounds: by the code that was measured."""

    streams: int
    rounds: dict[str, list[CostRound]]


class HeadCostReport(msgspec.Struct, frozen=True, kw_only=True):
    """load_average: of the last minute, at the end."""

    command: str
    machine: Machine
    load_average: float
    output_tokens: int
    costs: list[HeadCost]

    @property
    def failed(self) -> int:
        """Requests."""
        rounds = [one for cost in self.costs for kind in cost.rounds.values() for one in kind]
        return sum(one.figures.failed for one in rounds)


def run_head_cost(plan: HeadCostPlan, note: Note) -> HeadCostReport:
    """Raises: FlexpertError"""
    costs = uvloop.run(_measure(plan, note))
    return HeadCostReport(
        command=" ".join(["flexpert", *sys.argv[1:]]),
        machine=this_machine(),
        load_average=psutil.getloadavg()[0],
        output_tokens=plan.load.output_tokens,
        costs=costs,
    )


async def _measure(plan: HeadCostPlan, note: Note) -> list[HeadCost]:
    load = plan.load
    async with AsyncExitStack() as stack:
        services = {
            name: await stack.enter_async_context(
                own_service(plan.flags, environment=environment, report=note)
            )
            for name, environment in plan.sources.items()
        }
        pool = await token_pool(services[THIS].target)
        costs = []
        for streams in load.concurrencies:
            rounds: dict[str, list[CostRound]] = {name: [] for name in services}
            for number in range(load.rounds + 1):
                count, seed = load.answers * streams, load.seed + number
                prompts = random_prompts(pool, load.input_tokens, count, seed)
                for name in list(services)[:: -1 if number % 2 else 1]:
                    one = await cost_round(services[name], load, prompts, streams)
                    what = "warming up" if number == 0 else f"round {number}"
                    note(f"{streams} streams, {what}, {name}: {_in_words(one)}")
                    if number:
                        rounds[name].append(one)
            costs.append(HeadCost(streams=streams, rounds=rounds))
    return costs


def _in_words(one: CostRound) -> str:
    speed = f"{one.figures.output_tokens_per_s:,.0f} tokens/s"
    return f"{speed}; head {one.head_us:.1f} µs, client {one.client_us:.1f} µs a token"


def head_cost_text(report: HeadCostReport) -> Table:
    """Medians of the rounds; of the head's time the least and the most, too."""
    table = Table(
        title=f"processor time for a token, µs; {report.output_tokens} tokens a stream",
        caption=f"{report.machine.line()}; load average {report.load_average:.1f}",
    )
    table.add_column("", no_wrap=True)
    for name in ("tokens/s", "head", "least", "most", "ranks and helpers", "client"):
        table.add_column(name, justify="right")
    for cost in report.costs:
        for name, rounds in cost.rounds.items():
            head = [one.head_us for one in rounds]
            table.add_row(
                f"{cost.streams} streams" + (f", {name}" if len(cost.rounds) > 1 else ""),
                f"{median(one.figures.output_tokens_per_s for one in rounds):,.0f}",
                *(f"{value:.1f}" for value in (median(head), min(head), max(head))),
                f"{_median_of_ranks(rounds):.1f}",
                f"{median(one.client_us for one in rounds):.1f}",
            )
    if report.failed:
        table.add_row("failed requests", str(report.failed))
    return table


def _median_of_ranks(rounds: Sequence[CostRound]) -> float:
    return median(one.service_us - one.head_us for one in rounds)
