"""`flexpert bench transport`: both services are measured in turn, and the ratio is of medians."""

from __future__ import annotations

import importlib.util
import io
from typing import Any

import pytest
from rich.console import Console

from flexpert.bench.offered_load import OfferedLoad
from flexpert.bench.transport_comparison import TransportPlan, run_transport, transport_text

LOAD = OfferedLoad(
    prompts=None,
    count=4,
    input_tokens=8,
    output_tokens=8,
    concurrency=4,
    request_rate=None,
    warmup=0,
    seed=0,
)


@pytest.mark.slow
@pytest.mark.skipif(
    not any(map(importlib.util.find_spec, ("nixl_cu13", "nixl_cu12"))),
    reason="pip install 'flexpert[nixl]' to test it",
)
def test_both_are_measured_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UCX_TLS", "tcp")
    notes: list[str] = []
    plan = TransportPlan(ranks=2, rounds=2, load=LOAD, flags=("--kv-memory", "32MiB"))
    report = run_transport(plan, notes.append)
    order = [note.split("--transport ")[1].split(":")[0] for note in notes if "/2: " in note]
    assert order == ["nixl", "auto", "auto", "nixl"]
    medians: dict[str, Any] = {
        one.transport: sum(one.output_tokens_per_s) / 2 for one in report.figures
    }
    assert report.ratio == pytest.approx(medians["nixl"] / medians["auto"])
    text = io.StringIO()
    Console(file=text, width=200).print(transport_text(report))
    assert f"{report.ratio:.2f}" in text.getvalue()
    assert "shared memory" in text.getvalue()
