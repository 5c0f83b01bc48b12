"""`flexpert bench state-dir`: what it costs that the head could be resumed, in one run with what it
is without.

Two services run, one with a state directory, and have the same load in turn; the one that waits
sleeps.
"""

from __future__ import annotations

import asyncio
import tempfile
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

from flexpert.bench.cost_rounds import (
    WITH,
    WITHOUT,
    CostComparison,
    CostLoad,
    CostReport,
    Note,
    always,
    compare,
    cost_report,
)
from flexpert.bench.service import own_service


@dataclass(frozen=True, slots=True, kw_only=True)
class StateDirPlan:
    """What is measured. folder: where the directory is made; None: the system's for temporary
    files. flags: of both services."""

    load: CostLoad
    folder: Path | None = None
    flags: tuple[str, ...] = ()


def run_state_dir(plan: StateDirPlan, note: Note) -> CostReport:
    """Raises: FlexpertError"""
    with tempfile.TemporaryDirectory(prefix="flexpert-", dir=plan.folder) as folder:
        costs = asyncio.run(_measure(plan, Path(folder, "state"), note))
    return cost_report("a state directory", plan.flags, plan.load, costs)


async def _measure(plan: StateDirPlan, folder: Path, note: Note) -> list[CostComparison]:
    async with AsyncExitStack() as stack:
        services = {
            kind: await stack.enter_async_context(own_service((*plan.flags, *more), report=note))
            for kind, more in ((WITHOUT, ()), (WITH, ("--state-dir", str(folder))))
        }
        return await compare(
            plan.load, {kind: always(service) for kind, service in services.items()}, note
        )
