"""A random Qwen3-MoE of 16 GB, served over HTTP: heavy bodies cost its streams little, and a
request that crashes every rank that takes it is failed while all others are answered.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from support.large_model import make_model

from flexpert.bench.hostile_bodies import HEAVY
from flexpert.engine.faults import VARIABLE, Fault

PORT = "8124"
URL = f"http://127.0.0.1:{PORT}"
LAYERS = 12
POISON = 4001
STREAMS = 8
TOKENS = 400
# made ahead: in a thread it would hold up those that read streams
BODIES = [(path, make(8 * 2**20)[: 8 * 2**20]) for path, make in HEAVY.values()]


def stream(number: int, lines: list[int], failed: list[str]) -> None:
    body = {
        "prompt": [number + 10] * 20,
        "max_tokens": TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    try:
        with httpx.stream("POST", f"{URL}/v1/completions", json=body, timeout=300) as answer:
            events = [line for line in answer.iter_lines() if line.startswith("data: {")]
        lines[number] = len(events)
        if any('"error"' in event for event in events):
            failed.append(events[-1])
    except httpx.HTTPError as error:
        failed.append(repr(error))


def streams(meanwhile: Callable[[list[threading.Thread]], None]) -> tuple[float, list[str]]:
    """Tokens per second of all streams while something else happens."""
    lines = [0] * STREAMS
    failed: list[str] = []
    threads = [threading.Thread(target=stream, args=(n, lines, failed)) for n in range(STREAMS)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    other = threading.Thread(target=meanwhile, args=(threads,))
    other.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - began
    other.join()
    return STREAMS * TOKENS / seconds, failed


def heavy(threads: list[threading.Thread]) -> None:
    statuses: dict[int, int] = {}
    while any(thread.is_alive() for thread in threads):
        for path, body in BODIES:
            answered = httpx.post(URL + path, content=body, timeout=60)
            statuses[answered.status_code] = statuses.get(answered.status_code, 0) + 1
    print("heavy bodies were answered with", statuses, flush=True)
    assert max(statuses) < 500, statuses


def poison(folder: Path) -> None:
    for _ in range(6):
        Fault(0, "forward", action="fail", token=POISON).plant(folder)
    began = time.perf_counter()
    body = {"prompt": [POISON], "max_tokens": 4}
    answered = httpx.post(f"{URL}/v1/completions", json=body, timeout=300)
    struck = 6 - len(list(folder.glob("*.json")))
    print(
        f"poison: {answered.status_code} after {time.perf_counter() - began:.1f} s, "
        f"{struck} ranks exited: {answered.text[:200]}",
        flush=True,
    )
    assert answered.status_code == 500
    assert struck == 2, struck


@pytest.mark.timeout(900)
def test_streams_outlast_heavy_bodies_and_a_poisonous_request(tmp_path: Path) -> None:
    model, faults = tmp_path / "model", tmp_path / "faults"
    model.mkdir()
    faults.mkdir()
    make_model(model, LAYERS)
    command = [sys.executable, "-m", "flexpert", "serve", "--model", str(model)]
    command += ["--device", "cuda", "--ranks", "1", "--port", PORT]
    service = subprocess.Popen(command, env={**os.environ, VARIABLE: str(faults)})
    try:
        wait_until_ready(service)
        streams(lambda threads: None)  # first calls
        alone, failed = streams(lambda threads: None)
        disturbed, failed_too = streams(heavy)
        print(f"tokens/s alone {alone:.0f}, with heavy bodies {disturbed:.0f}", flush=True)
        _, failed_three = streams(lambda threads: poison(faults))
        assert not [*failed, *failed_too, *failed_three]
        service.send_signal(signal.SIGINT)
        assert service.wait(60) == 0
    finally:
        service.kill()


def wait_until_ready(service: subprocess.Popen[bytes]) -> None:
    while True:
        with contextlib.suppress(httpx.ConnectError):
            if httpx.get(f"{URL}/health/ready", timeout=120).status_code == 200:
                return
        assert service.poll() is None, "the service has ended"
        time.sleep(0.2)
