"""`flexpert simulate run` from a profile and a trace to its JSON."""

import json
from pathlib import Path

import msgspec
from simulator.test_virtual_services import PROFILE
from typer.testing import CliRunner

from flexpert.cli.main import app


def test_a_trace_is_simulated(tmp_path: Path) -> None:
    profile, trace = tmp_path / "profile.json", tmp_path / "trace.jsonl"
    profile.write_bytes(msgspec.json.encode(PROFILE))
    lines = [
        {"timestamp": 100 * n, "input_length": 600, "output_length": 8, "hash_ids": [0, n + 1]}
        for n in range(20)
    ]
    trace.write_text("\n".join(json.dumps(line) for line in lines))
    arguments = ["simulate", "run", "--profile", str(profile), "--trace", str(trace)]
    arguments += ["--ranks", "2", "--event", "t=0.5 scale 3", "--goodput", "ttft:500", "itl:50"]
    done = CliRunner().invoke(app, [*arguments, "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["figures"]["requests"] == 20
    assert found["figures"]["output_tokens"] == 160
    assert found["cached_tokens"] >= 512 * 10
    assert [one["change"]["state"] for one in found["changes"]] == ["done"]
    shown = CliRunner().invoke(app, arguments)
    assert "changes" in shown.output
    assert "goodput" in shown.output
