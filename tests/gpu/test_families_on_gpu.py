"""Families with states, chunked attention and indexers on a GPU: logits are those of transformers,
and each token that is served is the likeliest by these, through prefix hits, preemption, a leaver
and a kill."""

from __future__ import annotations

import inspect
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import make_checkpoint, prompt_of, reference_logits
from support.device_runner import device_runner
from support.small_configs import VARIANTS
from transformers import CONFIG_MAPPING
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

from flexpert import LLM, SamplingParams
from flexpert.models.source import ModelSource
from flexpert.models.state_view import CACHE
from flexpert.models.step_graphs import GraphShape

FAMILIES = (
    "qwen3_next",
    "deepseek_v32",
    "glm_moe_dsa",
    "llama4_text",
    "granitemoehybrid",
    "nemotron_h",
    "kimi_linear",
    "minimax",
    "jamba",
    "lfm2_moe",
    "qwen3_5_moe_text",
    "glm_moe_dsa, shared choices",
    "zaya",
    "bailing_hybrid",
    "lara_mini",
)
PROMPTS = [prompt_of(length, seed=length) for length in (3, 28, 45, 110)]
GREEDY = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
BLOCK = 16
TIE = 2e-3
"""Logits that are closer are those of a tie, which rounding decides."""


class Served:
    """A small model of a family with the tokens of the embedded model, in float32."""

    def __init__(self, case: str, folder: Path) -> None:
        family, changes = VARIANTS.get(case, (case, {}))
        tokenizer = ModelSource.open("tiny").tokenizer()
        self.path = make_checkpoint(family, folder, vocab_size=len(tokenizer), **changes)
        tokenizer.save_pretrained(self.path)
        self._known: set[tuple[int, ...]] = set()

    def blocks(self, count: int) -> int:
        """Bytes of so many KV blocks."""
        info = ModelSource.open(str(self.path), dtype="float32", latent_cache=True).info
        return count * BLOCK * info.kv_bytes_per_token()

    def open(self, **settings: Any) -> LLM:
        usual: dict[str, Any] = {
            "engine__device": "cuda",
            "model__dtype": "float32",
            "engine__max_tokens_per_step": 64,
            "engine__max_running": 8,
            "engine__kv_block_size": BLOCK,
            "engine__kv_memory": self.blocks(256),
        }
        return LLM(str(self.path), **{**usual, **settings})

    def check(self, llm: LLM, times: int = 1) -> None:
        """Asks for all prompts at once, each so many times."""
        prompts = PROMPTS * times
        for prompt, answer in zip(prompts, llm.generate(prompts, GREEDY), strict=True):
            whole = (*prompt, *answer.token_ids)
            assert len(whole) == len(prompt) + 24
            if whole in self._known:
                continue
            logits = reference_logits(self.path, whole)[len(prompt) - 1 : -1]
            chosen = logits.gather(1, torch.tensor(answer.token_ids)[:, None])[:, 0]
            assert (logits.amax(-1) - chosen).max() < TIE
            self._known.add(whole)

    def check_during(self, llm: LLM, event: Callable[[], object]) -> None:
        """The same, while something happens."""
        met: list[object] = []

        def happen() -> None:
            until = time.monotonic() + 60
            while not any(rank.running for rank in llm.cluster().ranks):
                if time.monotonic() > until:
                    return
                threading.Event().wait(0.005)
            met.append(event())

        thread = threading.Thread(target=happen, daemon=True)
        thread.start()
        self.check(llm, times=4)
        thread.join(timeout=120)
        assert met, "nothing happened"


@pytest.fixture(scope="module", params=FAMILIES)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Served:
    layer = inspect.signature(Qwen3NextGatedDeltaNet.forward).parameters
    if VARIANTS.get(request.param, (request.param,))[0] not in CONFIG_MAPPING or CACHE not in layer:
        pytest.skip("not in this version of transformers")
    return Served(request.param, tmp_path_factory.mktemp("model"))


def counted(llm: LLM, name: str, **labels: str) -> float:
    return llm._head.registry.get_sample_value(f"flexpert_{name}_total", labels) or 0.0


def test_prompts_chunks_and_decodes_give_the_logits_of_transformers(
    served: Served,
) -> None:
    """Steps with prompts module by module, those that decode as graphs of four sequences."""
    prompts = {"a": prompt_of(70, seed=1), "b": prompt_of(41, seed=2)}
    sequences = device_runner(served.path, torch.device("cuda"))
    steps = [{"a": 40, "b": 30}, {"a": 20, "b": 1}, {"a": 1, "b": 1}, {"a": 1, "b": 1}]
    at = dict.fromkeys(prompts, 0)
    found: dict[str, list[torch.Tensor]] = {name: [] for name in prompts}

    def step(work: dict[str, int]) -> None:
        cut = {name: prompts[name][at[name] : at[name] + count] for name, count in work.items()}
        for name, logits in sequences.step(cut).items():
            found[name].append(logits.float().cpu())
            at[name] += work[name]

    for work in steps:
        step(work)
    sequences.runner.capture([GraphShape(4, 4), GraphShape(1, 1)], max_blocks=5)
    assert sequences.runner.graphs is not None
    assert sequences.runner.graphs.captures == 2
    for work in (*[{"a": 1, "b": 1}] * 6, {"a": 1}, {"b": 1}, {"a": 1}):
        step(work)
    for name, logits in found.items():
        expected = reference_logits(served.path, prompts[name][: at[name]])
        torch.testing.assert_close(torch.cat(logits), expected, atol=5e-3, rtol=5e-3)


def test_one_rank(served: Served) -> None:
    """In chunks of 64, captured, from the prefix cache, and with KV blocks for few."""
    with served.open() as llm:
        served.check(llm)
        before = counted(llm, "cached_prompt_tokens")
        served.check(llm)
        assert counted(llm, "cached_prompt_tokens") > before
        assert llm.cluster().ranks[0].graphs > 0
    with served.open(engine__kv_memory=served.blocks(12)) as llm:
        served.check(llm, times=4)
        assert llm.cluster().ranks[0].preemptions > 0


def test_a_leaver_and_a_kill(served: Served) -> None:
    """On one GPU without MPS, under which a killed rank takes the others down."""
    with served.open(ranks=2, max_ranks=2) as llm:
        done: list[Any] = []
        served.check_during(llm, lambda: done.append(llm.scale(1)))
        assert done[0].moved_requests > 0
        assert done[0].moved_with_kv > 0
        assert done[0].recomputed_tokens == 0
        llm.scale(2)
        pid = llm.cluster().ranks[0].pid
        served.check_during(llm, lambda: os.kill(pid, signal.SIGKILL))
        assert counted(llm, "faults", kind="killed") == 1
