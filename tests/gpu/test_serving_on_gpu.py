"""Services on GPUs against a CPU or another exchange: alone, elastic, killed, in fp8.

Most serve the embedded model in float32. NVIDIA's nixl_ep and fp8 take wide models only: there it
is a random one. Nothing may be lost, nearly all answers must be equal, no rank may capture a graph
again, and a killed rank must come back.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from flexpert import LLM, SamplingParams
from flexpert.cluster.views import OperationView
from flexpert.kernels.block_fp8 import quantize as quantise_weight
from flexpert.models.source import ModelSource

STARTS = ["In the beginning", "And it came to pass", "Blessed are", "The LORD said unto Moses"]
PROMPTS = [f"{start} {number}" for start in STARTS for number in range(16)]
Answers = list[list[int]]


@dataclass(frozen=True)
class Served:
    """enough: the share of answers that must be equal; where two tokens are almost equally likely,
    rounding decides. settings: of the service."""

    model: str
    tokens: int
    enough: float
    settings: dict[str, Any]

    def open(self, **settings: Any) -> LLM:
        return LLM(self.model, **{**self.settings, **settings})

    def generate(self, llm: LLM) -> Answers:
        greedy = SamplingParams(max_tokens=self.tokens, temperature=0.0)
        return [answer.token_ids for answer in llm.generate(PROMPTS, greedy)]

    def rate(self, llm: LLM) -> float:
        """Tokens a second of a round."""
        began = time.perf_counter()
        self.generate(llm)
        return len(PROMPTS) * self.tokens / (time.perf_counter() - began)

    def same(self, found: Answers, expected: Answers) -> bool:
        return _equal(found, expected) >= self.enough * len(found)


TINY = Served("tiny", 128, 0.9, {"model__dtype": "float32"})


@pytest.fixture(scope="module")
def on_a_cpu() -> Answers:
    return alone(TINY, "cpu")


def test_one_rank(on_a_cpu: Answers) -> None:
    assert TINY.same(alone(TINY, "cuda", on_a_cpu), on_a_cpu)


@pytest.mark.usefixtures("shared_gpu")
def test_ranks_join_and_leave_under_load(on_a_cpu: Answers) -> None:
    assert elastic(TINY, on_a_cpu, [scaled(4), scaled(2)])


def test_killed_ranks_come_back(on_a_cpu: Answers) -> None:
    """On one GPU without MPS, under which a killed rank takes the others down."""
    assert elastic(TINY, on_a_cpu, [killed, killed])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_kernels_of_nvidia(tmp_path: Path) -> None:
    pytest.importorskip("nixl_ep")
    served = wide(tmp_path)
    two = {"engine__device": "cuda", "ranks": 2, "max_ranks": 2}
    with served.open(**two) as llm:
        expected = served.generate(llm)
    settings = {**served.settings, **two, "engine__all2all": "nixl_ep"}
    theirs = replace(served, settings={**settings, "cluster__exchange_timeout": 10.0})
    assert elastic(theirs, expected, [scaled(1), scaled(2), killed])


def test_an_fp8_checkpoint_answers_as_its_dequantized_weights(tmp_path: Path) -> None:
    served = wide(tmp_path)
    quantise(tmp_path)
    settings = {**served.settings, "model__quantization": "none"}
    expected = alone(replace(served, settings=settings), "cuda")
    assert served.same(alone(served, "cuda", expected), expected)


def quantise(folder: Path) -> None:
    """Make a checkpoint's projections fp8 with scales of blocks."""
    state = load_file(folder / "model.safetensors")
    for key in [key for key in state if "_proj" in key]:
        state[key], state[f"{key}_scale_inv"] = quantise_weight(state[key])
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps(config))


def wide(folder: Path) -> Served:
    """A random model of 2,048 channels, with the tokens of the embedded one."""
    tokenizer = ModelSource.open("tiny").tokenizer()
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=2048,
        intermediate_size=512,
        moe_intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=16,
        num_key_value_heads=2,
        head_dim=128,
        num_experts=16,
        num_experts_per_tok=4,
        max_position_embeddings=512,
        dtype="bfloat16",
    )
    Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return Served(str(folder), 8, 0.6, {"engine__max_tokens_per_step": 64})


def alone(served: Served, device: str, expected: Answers | None = None) -> Answers:
    """The answers of one rank."""
    began = time.perf_counter()
    with served.open(engine__device=device) as llm:
        started = time.perf_counter() - began
        answers = served.generate(llm)
        compared = "" if expected is None else f", {share(answers, expected)}"
        print(
            f"one rank on {device}: started in {started:.1f} s, "
            f"{served.rate(llm):,.0f} tokens/s{compared}",
            flush=True,
        )
        return answers


def elastic(served: Served, expected: Answers, events: list[Callable[[LLM], str]]) -> bool:
    """Two ranks of at most four; each event happens under load."""
    good = True
    generate, same = served.generate, served.same
    with served.open(
        **{"ranks": 2, "max_ranks": 4, "engine__device": "cuda", **served.settings}
    ) as llm:
        undisturbed = generate(llm)
        print(
            f"two ranks: {served.rate(llm):,.0f} tokens/s, {share(undisturbed, expected)}",
            flush=True,
        )
        good &= same(undisturbed, expected)
        captures = llm.cluster().ranks[0].graphs > 0
        for event in events:
            before = {rank.pid: rank.graphs for rank in llm.cluster().ranks}
            happened = ""

            def happen(event: Callable[[LLM], str] = event) -> None:
                nonlocal happened
                happened = event(llm)

            timer = threading.Timer(0.3, happen)
            timer.start()
            began = time.perf_counter()
            answers: Answers = []
            while timer.is_alive():  # the load goes on until it has happened
                answers += generate(llm)
            took = time.perf_counter() - began
            ranks = llm.cluster().ranks
            again = [r.id for r in ranks if r.graphs != before.get(r.pid, r.graphs)]
            print(
                f"{happened or 'it did not happen'}: {len(answers)} requests in {took:.1f} s, "
                f"{share(answers, expected)}; "
                f"ranks {[r.id for r in ranks]}, captured again: {again or 'none'}",
                flush=True,
            )
            good &= bool(happened) and same(answers, expected) and not again
            good &= all((rank.graphs > 0) == captures for rank in ranks)
    return good


def scaled(ranks: int) -> Callable[[LLM], str]:
    def scale(llm: LLM) -> str:
        done: OperationView = llm.scale(ranks)
        return (
            f"scaled to {ranks} ({sum(done.phases.values()):.1f} s, pause {done.pause_ms} ms, "
            f"{done.copied_experts} of {done.moved_experts} experts from peers, "
            f"{done.moved_with_kv} of {done.moved_requests} requests moved with KV)"
        )

    return scale


def killed(llm: LLM) -> str:
    victim = llm.cluster().ranks[-1]
    os.kill(victim.pid, signal.SIGKILL)
    began = time.perf_counter()
    while (
        victim.pid in {rank.pid for rank in llm.cluster().ranks}
        or any(rank.state != "active" for rank in llm.cluster().ranks)
        or len(llm.cluster().ranks) < 2
    ):
        if time.perf_counter() - began > 120:
            raise TimeoutError(f"rank {victim.id} was killed, and was not replaced in 120 s")
        time.sleep(0.01)
    return f"killed rank {victim.id}, all are back after {time.perf_counter() - began:.1f} s"


def share(found: Answers, expected: Answers) -> str:
    return f"{_equal(found, expected)} of {len(found)} answers are as expected"


def _equal(found: Answers, expected: Answers) -> int:
    """Of some rounds of all prompts."""
    rounds = expected * (len(found) // len(expected))
    return sum(a == b for a, b in zip(found, rounds, strict=True))
