"""`flexpert bench start`, and what it measures: a head is small, and has no torch."""

from __future__ import annotations

import asyncio
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from flexpert.bench.load import call
from flexpert.bench.machine import this_machine
from flexpert.bench.service import own_service
from flexpert.bench.service_start import RoleCost, ServiceStart, StartReport, look
from flexpert.bench.start_report import start_text
from flexpert.forking.fork_server import MODULE

MIB = 2**20
PROMPT = {"model": "tiny", "prompt": "In the beginning", "max_tokens": 4, "logprobs": 1}


def test_medians_are_of_the_starts_and_the_spread_is_said() -> None:
    starts = [
        ServiceStart(
            ready_s,
            {"head": RoleCost(1, 1.0, 60 * MIB), "ranks": RoleCost(2, 2.0, size)},
            first_s=0.004,
            served_pss=90 * MIB,
        )
        for ready_s, size in ((2.0, 10 * MIB), (9.0, 20 * MIB), (3.0, 30 * MIB))
    ]
    console = Console(width=120)
    with console.capture() as captured:
        console.print(start_text(StartReport(this_machine(), ["--ranks", "2"], 0.5, starts)))
    text = captured.get()
    assert "ready after 3.00 s (2.00 to 9.00 s)" in text
    rows = [line.split() for line in text.splitlines()]
    assert ["ranks", "2", "2.00", "s", "20", "MiB"] in rows
    assert ["all", "3", "3.00", "s", "80", "MiB"] in rows
    assert ["all,", "after", "8", "requests", "90", "MiB"] in rows
    assert "medians of 3 starts of 'flexpert serve --ranks 2'; first answer" in text
    assert "of one token after 4 ms" in text


@pytest.mark.slow
def test_a_head_has_no_torch_and_answers_all_the_same() -> None:
    async def scenario() -> None:
        async with own_service(("--model", "tiny")) as service:
            head = psutil.Process(service.pid)
            (fork_server,) = head.children()
            assert MODULE in fork_server.cmdline()
            for kind in ("libtorch", "tokenizers"):
                assert kind not in Path(f"/proc/{head.pid}/maps").read_text()
                assert kind in Path(f"/proc/{fork_server.pid}/maps").read_text()
            roles = await look(service)
            counts = {role: cost.processes for role, cost in roles.items()}
            assert counts == {"head": 1, "fork server": 1, "ranks": 1, "other children": 1}
            assert roles["head"].processor_s > 0
            assert roles["head"].pss < 120 * MIB
            status, answer = await call(service.target, "POST", "/v1/completions", PROMPT)
            assert status == 200
            assert answer["choices"][0]["text"]
            assert "torch" not in Path(f"/proc/{head.pid}/maps").read_text()

    asyncio.run(scenario())
