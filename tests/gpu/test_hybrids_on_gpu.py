"""Layers that keep a state of each sequence, on a GPU: transformers' logits and tokens."""

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
from support.state_cases import delta_case, delta_result, space_case, space_result
from transformers import CONFIG_MAPPING
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

from flexpert import LLM, SamplingParams
from flexpert.kernels.cuda.delta_rule import gated_delta_rule
from flexpert.kernels.cuda.state_space import state_space
from flexpert.kernels.state_steps import StateRows
from flexpert.models.source import ModelSource
from flexpert.models.state_view import CACHE
from flexpert.models.step_graphs import GraphShape

FAMILIES = (
    "qwen3_next",
    "qwen3_5_moe_text",
    "granitemoehybrid",
    "nemotron_h",
    "jamba",
    "lfm2_moe",
    "minimax",
    "zaya",
    "kimi_linear",
    "bailing_hybrid",
    "lara_mini",
)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    """Of transformers on the host, which computes tiny models: many would wait for each other."""
    torch.set_num_threads(1)


def known(family: str) -> str:
    layer = inspect.signature(Qwen3NextGatedDeltaNet.forward).parameters
    if family not in CONFIG_MAPPING or CACHE not in layer:
        pytest.skip("not in this version of transformers")
    return family


@pytest.mark.parametrize("rows", [1, 3, 64])
def test_kernels_update_states_as_torch_does(rows: int) -> None:
    """At Qwen3-Next's and Granite-4's sizes, in bf16."""
    torch.manual_seed(rows)
    inputs, of_rule, before = delta_case(rows)
    case = before.clone()
    out = gated_delta_rule(inputs, of_rule, case.convolved, case.states, case.rows)
    for row in range(rows):
        result, _, state = delta_result(inputs, of_rule, before, row)
        assert relative(out[row], result) < 2e-2
        assert relative(case.states[case.targets[row]], state) < 1e-2
    projected, of_space, before = space_case(rows)
    case = before.clone()
    out = state_space(projected, of_space, case.convolved, case.states, case.rows)
    for row in range(rows):
        result, _, state = space_result(projected, of_space, before, row)
        assert relative(out[row], result) < 2e-2
        assert relative(case.states[case.targets[row]], state) < 1e-2


def test_kernels_take_the_tokens_of_prompts_as_torch_does() -> None:
    """One that begins and one behind a state; as before."""
    torch.manual_seed(0)
    starts = torch.tensor([0, 200, 300], device="cuda")
    begins = starts[:-1].repeat_interleave(starts.diff())
    sources = torch.where(begins == 0, -1, 3)
    targets = torch.full_like(begins, -1)
    targets[150], targets[199], targets[299] = 5, 6, 7
    rows = StateRows(sources, targets, begins, starts)
    inputs, of_rule, ruled = delta_case(300, slots=8)
    projected, of_space, spaced = space_case(300, slots=8)
    for before, ours, result_of in (
        (
            ruled,
            lambda case: gated_delta_rule(inputs, of_rule, case.convolved, case.states, rows),
            lambda alone, row: delta_result(inputs, of_rule, alone, row),
        ),
        (
            spaced,
            lambda case: state_space(projected, of_space, case.convolved, case.states, rows),
            lambda alone, row: space_result(projected, of_space, alone, row),
        ),
    ):
        case = before.clone()
        out = ours(case)
        for begin, end in ((0, 200), (200, 300)):
            alone = before.alone(int(sources[begin]))
            for row in range(begin, end):
                result, alone.convolved[0], alone.states[0] = result_of(alone, row)
                assert relative(out[row], result) < 2e-2
                if (slot := int(targets[row])) >= 0:
                    assert relative(case.states[slot], alone.states[0]) < 1e-2
                    assert torch.equal(case.convolved[slot], alone.convolved[0])


def relative(ours: torch.Tensor, expected: torch.Tensor) -> float:
    return float((ours.float() - expected).norm() / expected.norm())


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_chunks_and_decodes_give_the_logits_of_transformers(
    family: str, tmp_path: Path
) -> None:
    """Steps with prompts module by module, those that decode as graphs of four sequences."""
    path = make_checkpoint(known(family), tmp_path)
    prompts = {"a": prompt_of(70, seed=1), "b": prompt_of(41, seed=2)}
    sequences = device_runner(path, torch.device("cuda"))
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
        expected = reference_logits(path, prompts[name][: at[name]])
        torch.testing.assert_close(torch.cat(logits), expected, atol=5e-3, rtol=5e-3)


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the tokens of the embedded model."""
    tokenizer = ModelSource.open("tiny").tokenizer()
    known("qwen3_next")
    folder = tmp_path_factory.mktemp("hybrid")
    path = make_checkpoint("qwen3_next", folder, vocab_size=len(tokenizer))
    tokenizer.save_pretrained(path)
    return path


PROMPTS = [prompt_of(length, seed=length) for length in (3, 28, 45, 110)]
GREEDY = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)


def service(model: Path, **settings: object) -> LLM:
    usual: dict[str, Any] = {
        "engine__device": "cuda",
        "model__dtype": "float32",
        "engine__max_tokens_per_step": 64,
        "engine__max_running": 8,
        "engine__kv_memory": "4MiB",
    }
    return LLM(str(model), **{**usual, **settings})


def tokens(llm: LLM, prompts: list[list[int]]) -> list[list[int]]:
    return [answer.token_ids for answer in llm.generate(prompts, GREEDY)]


def during(llm: LLM, event: Callable[[], object]) -> list[list[int]]:
    """The answers to all prompts, while something happens."""
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
    found = tokens(llm, PROMPTS * 4)
    thread.join(timeout=120)
    assert met, "nothing happened"
    return found


@pytest.fixture(scope="module")
def expected(hybrid: Path) -> list[list[int]]:
    """Of a CPU, which are transformers' own."""
    with service(hybrid, engine__device="cpu") as llm:
        answers = tokens(llm, PROMPTS)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        logits = reference_logits(hybrid, [*prompt, *answer])
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == answer
    return answers


def test_a_service_gives_the_tokens_of_transformers(
    hybrid: Path, expected: list[list[int]]
) -> None:
    """In chunks of 64, from the prefix cache, and with a KV cache that is too small for all."""
    with service(hybrid) as llm:
        assert tokens(llm, PROMPTS) == expected
        assert llm.cluster().ranks[0].cached_blocks > 0
        assert tokens(llm, PROMPTS) == expected
        assert llm.cluster().ranks[0].graphs > 0
    with service(hybrid, engine__kv_memory="72KiB") as llm:
        assert tokens(llm, PROMPTS * 4) == expected * 4
        assert llm.cluster().ranks[0].preemptions > 0


@pytest.mark.usefixtures("shared_gpu")
def test_states_move_with_the_sequences_of_a_leaver(
    hybrid: Path, expected: list[list[int]]
) -> None:
    with service(hybrid, ranks=2, max_ranks=2) as llm:
        done: list[Any] = []
        assert during(llm, lambda: done.append(llm.scale(1))) == expected * 4
        assert done[0].moved_requests > 0
        assert done[0].recomputed_tokens == 0


def test_a_killed_rank_costs_no_token(hybrid: Path, expected: list[list[int]]) -> None:
    with service(hybrid, ranks=2, max_ranks=2) as llm:
        pid = llm.cluster().ranks[0].pid
        assert during(llm, lambda: os.kill(pid, signal.SIGKILL)) == expected * 4
