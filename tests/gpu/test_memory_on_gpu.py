"""What a rank of 15 GB says of a GPU's memory, against what the driver says is in use.

Plan, status, `GET /cluster`, metrics and NVML must agree within 10 %: one rank and two (on GPUs of
their own), experts in bf16 and fp8. All figures are printed.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch
from support.large_model import make_model

from flexpert.cluster.processes.model_opening import open_source
from flexpert.config import load_config
from flexpert.engine.device_memory_plan import planned_device_memory
from flexpert.engine.gpu_driver import GpuDriver, open_driver

PORT = "8126"
URL = f"http://127.0.0.1:{PORT}"
LAYERS = 12
MIB = 2**20
PLAN = re.compile(r"rank (\d+) \(pid \d+\): (GPU .* = ([\d.]+) MiB, host .*)")
METRIC = re.compile(r'^flexpert_rank_device_memory_bytes\{rank="(\d+)"\} (\S+)$', re.MULTILINE)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("large")
    make_model(folder, LAYERS)
    return folder


@pytest.fixture(scope="module")
def driver() -> GpuDriver:
    driver = open_driver()
    if driver is None:
        pytest.skip("NVML does not say how much memory is in use")
    return driver


def used(driver: GpuDriver, gpu: int) -> int:
    memory = driver.memory(gpu)
    assert memory is not None
    return memory.used


@contextlib.contextmanager
def served(model: Path, ranks: int, quantization: str, log: Path) -> Iterator[str]:
    """A service that has answered; what it said at its start."""
    command = [sys.executable, "-m", "flexpert", "serve", "--model", str(model), "--port", PORT]
    command += ["--device", "cuda", "--ranks", str(ranks), "--max-ranks", str(ranks)]
    command += ["--quantization", quantization]
    with log.open("w") as out:
        service = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
    try:
        while not ready():
            assert service.poll() is None, log.read_text()
            time.sleep(0.2)
        answer()
        time.sleep(2.5)  # memory is measured every second
        yield log.read_text()
        service.send_signal(signal.SIGINT)
        assert service.wait(60) == 0
    finally:
        service.kill()
        service.wait()


def ready() -> bool:
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(f"{URL}/health/ready", timeout=60).status_code == 200
    return False


def answer() -> None:
    for length in (10, 3000):
        body = {"prompt": [7] * length, "max_tokens": 16, "temperature": 0, "ignore_eos": True}
        assert httpx.post(f"{URL}/v1/completions", json=body, timeout=120).status_code == 200


def estimate(model: Path, ranks: int, quantization: str) -> int:
    """What the head expects a rank to need before any has started, bytes."""
    config = load_config(
        environment={},
        overrides={
            "model.model": str(model),
            "model.quantization": quantization,
            "engine.device": "cuda",
            "cluster.ranks": ranks,
            "cluster.max_ranks": ranks,
        },
    )
    source = open_source(config)
    experts = source.info.experts * source.info.moe_layers // ranks
    return planned_device_memory(source, config.engine, ranks, experts).total


@pytest.mark.parametrize("quantization", ["none", "fp8"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_plan_status_metrics_and_driver_agree(
    model: Path, driver: GpuDriver, ranks: int, quantization: str, tmp_path: Path
) -> None:
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"there are no {ranks} GPUs")
    before = [used(driver, gpu) for gpu in range(ranks)]
    with served(model, ranks, quantization, tmp_path / "log") as said:
        taken = [used(driver, gpu) - before[gpu] for gpu in range(ranks)]
        views = httpx.get(f"{URL}/cluster", timeout=60).json()["ranks"]
        metrics = httpx.get(f"{URL}/metrics", timeout=60).text
        status = subprocess.run(
            [sys.executable, "-m", "flexpert", "status", "--url", URL],
            env={**os.environ, "COLUMNS": "200"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    print(status)
    plans = {int(rank): (line, float(size) * MIB) for rank, line, size in PLAN.findall(said)}
    shown = {int(rank): float(size) for rank, size in METRIC.findall(metrics)}
    expected = estimate(model, ranks, quantization)
    print(f"{ranks} ranks, {quantization}: MiB by driver, GET /cluster, metrics, plan, estimate")
    for rank, view in enumerate(views):
        line, planned = plans[rank]
        measured = view["device_memory_bytes"]
        figures = (taken[rank], measured, shown[rank], planned, expected)
        print(f"  rank {rank}:", *(f"{figure / MIB:,.0f}" for figure in figures))
        print(f"  {line}")
        print(
            f"  host: {view['memory_bytes'] / MIB:,.0f}, planned {view['planned_bytes'] / MIB:,.0f}"
        )
        assert f"{measured / MIB:.0f} MiB" in status
        for figure in (measured, shown[rank], planned, view["device_planned_bytes"]):
            assert figure == pytest.approx(taken[rank], rel=0.1), json.dumps(view)
        assert expected == pytest.approx(taken[rank], rel=0.2)


def test_what_does_not_fit_is_refused_before_anything_opens_a_gpu(
    driver: GpuDriver, tmp_path: Path
) -> None:
    before = highest = used(driver, 0)
    command = [sys.executable, "-m", "flexpert", "serve", "--device", "cuda", "--port", PORT]
    log = tmp_path / "log"
    with log.open("w") as out:
        service = subprocess.Popen(
            [*command, "--kv-memory", "2000GiB"], stdout=out, stderr=subprocess.STDOUT
        )
        while service.poll() is None:
            highest = max(highest, used(driver, 0))
            time.sleep(0.02)
    said = log.read_text()
    print(said)
    assert service.returncode != 0
    assert re.search(r"GPU 0 has [\d,]+ MiB of its [\d,]+ MiB free, and rank 0 needs", said)
    assert highest <= before + 64 * MIB  # a context takes hundreds


def test_the_head_opens_no_gpu() -> None:
    script = """
import torch
from flexpert.config import load_config
from flexpert.engine.device_profile import check_device
from flexpert.engine.gpu_driver import open_driver
check_device(load_config(environment={}, overrides={"engine.device": "cuda"}).engine)
driver = open_driver()
assert driver is None or driver.memory(0) is not None
assert not torch.cuda.is_initialized()
assert not torch._C._cuda_hasPrimaryContext(0)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
