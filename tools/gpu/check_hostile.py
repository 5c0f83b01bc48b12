"""A model of real size on this GPU beside heavy bodies, and with a request that ends its rank.

    PYTHONPATH=src python tools/gpu/check_hostile.py [--layers 12]

Makes a random Qwen3-MoE (12 layers: 15 GB), serves it over HTTP on one rank, and compares the
tokens of 8 streams alone with those beside heavy bodies. Then a request ends every rank that takes
it (a planted fault): it must fail with a 500, and the streams beside it must be answered.

Exit status 1 if an answer is lost, a body gets a 5xx, or the rank does not come back.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from importlib import resources
from pathlib import Path

import httpx
import torch
from transformers import Qwen3MoeForCausalLM

from flexpert.bench.gpu.model import qwen3_30b_a3b
from flexpert.bench.hostile_bodies import HEAVY
from flexpert.engine.faults import VARIABLE, Fault

URL = "http://127.0.0.1:8124"
POISON = 4001
STREAMS = 8
TOKENS = 400
# made ahead: in a thread it would hold up those that read streams
BODIES = [(path, make(8 * 2**20)[: 8 * 2**20]) for path, make in HEAVY.values()]


def make_model(folder: Path, layers: int) -> None:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = Qwen3MoeForCausalLM(qwen3_30b_a3b(layers))
    model.save_pretrained(folder, max_shard_size="4GB")
    torch.set_default_dtype(torch.float32)
    tiny = Path(str(resources.files("flexpert.models").joinpath("tiny")))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tiny / name, folder / name)
    del model
    torch.cuda.empty_cache()
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"a model of {size / 1e9:.1f} GB", flush=True)


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


def streams(meanwhile) -> tuple[float, list[str]]:
    """Tokens per second of all streams while something else happens."""
    lines, failed = [0] * STREAMS, []
    threads = [threading.Thread(target=stream, args=(n, lines, failed)) for n in range(STREAMS)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    beside = threading.Thread(target=meanwhile, args=(threads,))
    beside.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - began
    beside.join()
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
        f"{struck} ranks ended: {answered.text[:200]}",
        flush=True,
    )
    assert answered.status_code == 500
    assert struck == 2, struck


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=12)
    layers = parser.parse_args().layers
    with tempfile.TemporaryDirectory() as place:
        model, faults = Path(place) / "model", Path(place) / "faults"
        model.mkdir()
        faults.mkdir()
        make_model(model, layers)
        command = [sys.executable, "-m", "flexpert", "serve", "--model", str(model)]
        command += ["--device", "cuda", "--ranks", "1", "--port", "8124"]
        service = subprocess.Popen(command, env={**os.environ, VARIABLE: str(faults)})
        try:
            began = time.perf_counter()
            while True:
                try:
                    if httpx.get(f"{URL}/health", timeout=120).status_code == 200:
                        break
                except httpx.ConnectError:
                    pass
                assert service.poll() is None, "the service has ended"
                time.sleep(0.2)
            print(f"up after {time.perf_counter() - began:.1f} s", flush=True)
            streams(lambda threads: None)  # first calls
            alone, failed = streams(lambda threads: None)
            beside, failed_too = streams(heavy)
            print(f"tokens/s alone {alone:.0f}, beside heavy bodies {beside:.0f}: "
                  f"{beside / alone:.2f}", flush=True)  # fmt: skip
            _, failed_three = streams(lambda threads: poison(faults))
            lost = [*failed, *failed_too, *failed_three]
            print("lost:", lost, json.loads(httpx.get(f"{URL}/health").text), flush=True)
            service.send_signal(signal.SIGINT)
            status = service.wait(60)
            return int(bool(lost) or status != 0)
        finally:
            service.kill()


if __name__ == "__main__":
    sys.exit(main())
