"""`flexpert bench structured`: pairs of rounds, and a schema that no answer comes to the end of."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from flexpert.bench.structured_overhead import endless_schema
from flexpert.engine.output_grammar import resolve
from flexpert.engine.request import StructuredOutputsParams


def test_its_schemas_are_different_and_can_be_served() -> None:
    schemas = {resolve(StructuredOutputsParams(json=endless_schema(n))).grammar for n in range(4)}
    assert len(schemas) == 4


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_short_run_has_the_same_number_of_tokens_with_and_without(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    command = [sys.executable, "-m", "flexpert", "bench", "structured", "--output", str(report)]
    command += ["--rounds", "2", "--num-prompts", "6", "--concurrency", "3", "--output-len", "20"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    found = json.loads(report.read_text())
    assert list(found["rounds"]) == ["plain", "any text", "schema"]
    rounds = [one for kind in found["rounds"].values() for one in kind]
    assert [one["figures"]["output_tokens"] for one in rounds] == [120] * 6
    assert all(one["cpu_ms"] > 0 for one in rounds)
    assert all(cost["tokens_per_s"] > 0 < cost["cpu"] for cost in found["costs"].values())
