"""A bench that is ended leaves nothing: no process, and no file."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from support.waiting import wait_until


@pytest.mark.slow
def test_sigterm_ends_one_in_order_that_has_started_a_service(tmp_path: Path) -> None:
    bench = subprocess.Popen(
        [sys.executable, "-m", "flexpert", "bench", "rebalance", "--ranks", "2"],
        env={**os.environ, "TMPDIR": str(tmp_path)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        process = psutil.Process(bench.pid)
        wait_until(lambda: len(process.children(recursive=True)) > 1, 60.0)
        started = process.children(recursive=True)
        assert list(tmp_path.glob("*/skewed"))
        bench.terminate()
        _, said = bench.communicate(timeout=60)
    finally:
        bench.kill()
    assert "Traceback" not in said
    assert bench.returncode == 130
    left = {one.name for one in tmp_path.iterdir()} - {"torchinductor_root"}  # torch's own
    assert not left
    _, alive = psutil.wait_procs(started, timeout=10)
    assert not alive
