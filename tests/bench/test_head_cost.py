"""`flexpert bench head`: the processor time of a token, of head, ranks and client apart."""

from __future__ import annotations

import asyncio
import os
from collections import deque
from pathlib import Path

import pytest
from rich.console import Console
from support.served_head import Running

from flexpert.bench.cost_rounds import CostLoad, CostRound, cost_round
from flexpert.bench.head_cost import HeadCost, HeadCostPlan, HeadCostReport, head_cost_text
from flexpert.bench.load import Target
from flexpert.bench.machine import this_machine
from flexpert.bench.service import Service
from flexpert.config import ServerConfig
from flexpert.errors import ConfigError

LOAD = CostLoad(concurrencies=(4,), rounds=1, answers=1, input_tokens=1, output_tokens=60, seed=0)


def measured() -> CostRound:
    """Of a head in this process."""
    running = Running(ServerConfig())
    try:
        service = Service(Target.parse(running.url), os.getpid(), deque())
        return asyncio.run(cost_round(service, LOAD, [[1]] * 4, 4))
    finally:
        running.close()


@pytest.mark.slow
def test_each_has_its_share_for_a_token() -> None:
    one = measured()
    assert one.figures.output_tokens == 4 * 60
    assert one.head_us > 0
    assert one.client_us > 0
    report = HeadCostReport(
        command="",
        machine=this_machine(),
        load_average=0.5,
        output_tokens=60,
        costs=[HeadCost(streams=4, rounds={"before": [one], "this": [one]})],
    )
    console = Console(width=160)
    with console.capture() as shown:
        console.print(head_cost_text(report))
    (line,) = [line for line in shown.get().splitlines() if "4 streams, this" in line]
    cells = [cell.strip() for cell in line.strip("│").split("│")]
    assert cells[2:5] == [f"{one.head_us:.1f}"] * 3
    assert cells[6] == f"{one.client_us:.1f}"


def test_another_checkout_has_its_own_source(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no checkout of flexpert"):
        _ = HeadCostPlan(load=LOAD, before=tmp_path).sources
    (tmp_path / "src" / "flexpert").mkdir(parents=True)
    (tmp_path / "src" / "flexpert" / "__init__.py").touch()
    sources = HeadCostPlan(load=LOAD, before=tmp_path).sources
    assert sources == {"before": {"PYTHONPATH": str(tmp_path / "src")}, "this": {}}
