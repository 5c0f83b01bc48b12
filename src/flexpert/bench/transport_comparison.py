"""`flexpert bench transport`: what it costs to serve through NIXL in place of shared memory.

Two services of one machine, in all else equal, are there at the same time and measured in turn. The
one through shared memory is the baseline.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Final

import msgspec
from rich import box
from rich.console import RenderableType
from rich.table import Table

from flexpert.bench.machine import Machine, this_machine
from flexpert.bench.offered_load import OfferedLoad
from flexpert.bench.serve import ServeMeasured, measure
from flexpert.bench.service import own_service
from flexpert.bench.statistics import figures
from flexpert.errors import FlexpertError

BASELINE: Final = "auto"
TRANSPORTS: Final = (BASELINE, "nixl")

Note = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class TransportPlan:
    """rounds: how often each is measured. flags: of both services, besides."""

    ranks: int
    rounds: int
    load: OfferedLoad
    flags: tuple[str, ...] = ()


class TransportFigures(msgspec.Struct, frozen=True, kw_only=True):
    """Of one transport, a value for each round. inter_token_ms: means."""

    transport: str
    output_tokens_per_s: list[float]
    inter_token_ms: list[float]


class TransportReport(msgspec.Struct, frozen=True, kw_only=True):
    """ratio: output tokens/s over NIXL over those through shared memory, medians of the rounds."""

    command: str
    machine: Machine
    ranks: int
    figures: list[TransportFigures]
    ratio: float


def run_transport(plan: TransportPlan, note: Note) -> TransportReport:
    """Raises: FlexpertError: a service does not start, or a request fails."""
    return asyncio.run(_run(plan, note))


async def _run(plan: TransportPlan, note: Note) -> TransportReport:
    flags = ("--ranks", str(plan.ranks), "--max-ranks", str(plan.ranks), *plan.flags)
    found = {
        name: TransportFigures(transport=name, output_tokens_per_s=[], inter_token_ms=[])
        for name in TRANSPORTS
    }
    async with AsyncExitStack() as stack:
        urls: dict[str, str] = {}
        for name in TRANSPORTS:
            arguments = ("--transport", name, "--log-level", "warning", *flags)
            service = await stack.enter_async_context(own_service(arguments, report=note))
            urls[name] = f"http://{service.target.host}:{service.target.port}"
        for number in range(plan.rounds):
            for name in TRANSPORTS if number % 2 else TRANSPORTS[::-1]:
                run = await measure(plan.load, ServeMeasured(url=urls[name]), lambda line: None)
                result = figures(run.answers)
                if result.failed or result.inter_token_ms is None:
                    raise FlexpertError(f"--transport {name}: {result.failed} requests failed")
                found[name].output_tokens_per_s.append(result.output_tokens_per_s)
                found[name].inter_token_ms.append(result.inter_token_ms.mean)
                note(
                    f"{number + 1}/{plan.rounds}: --transport {name}: "
                    f"{result.output_tokens_per_s:,.0f} output tokens/s"
                )
    medians = {n: statistics.median(f.output_tokens_per_s) for n, f in found.items()}
    return TransportReport(
        command=" ".join(["flexpert", *sys.argv[1:]]),
        machine=this_machine(),
        ranks=plan.ranks,
        figures=list(found.values()),
        ratio=medians["nixl"] / medians[BASELINE],
    )


def transport_text(report: TransportReport) -> RenderableType:
    """For people."""
    table = Table(box=box.SIMPLE, title=f"{report.ranks} ranks of one machine")
    for name in ("transport", "output tokens/s", "inter-token ms", "of the baseline"):
        table.add_column(name, justify="left" if name == "transport" else "right")
    for one in report.figures:
        baseline = one.transport == BASELINE
        table.add_row(
            "shared memory" if baseline else "NIXL",
            _spread(one.output_tokens_per_s, 0),
            _spread(one.inter_token_ms, 2),
            "" if baseline else f"{report.ratio:.2f}",
        )
    table.caption = f"medians (least to most of the rounds); {report.machine.line()}"
    return table


def _spread(values: list[float], digits: int) -> str:
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:,.{digits}f} ({low:,.{digits}f} to {high:,.{digits}f})"
