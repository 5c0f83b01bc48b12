"""`--device cuda` with several ranks: as on a CPU, through joins, leaves and a kill.

Without a GPU in Triton's interpreter: the same processes, epochs, windows and migrations, only
slower.
"""

from __future__ import annotations

import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.agreeing import agreeing_model
from support.waiting import wait_until
from transformers import AutoConfig, AutoModelForCausalLM

from flexpert import LLM, SamplingParams
from flexpert.models.source import ModelSource

pytest.importorskip("triton", reason="the GPU kernels need the package triton")

GREEDY = SamplingParams(max_tokens=10, temperature=0.0, seed=1, ignore_eos=True)
PROMPTS = [[5, 9, 40, 41], [60, 61, 62], [7, 8, 9, 10, 11, 12]]


def saved(path: Path, family: str, **settings: Any) -> str:
    """Two layers, four experts, few tokens: the interpreter takes milliseconds for each piece of a
    product."""
    tokenizer = ModelSource.open("tiny").tokenizer()
    config = AutoConfig.for_model(
        family,
        vocab_size=128,
        hidden_size=32,
        intermediate_size=32,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_experts_per_tok=2,
        max_position_embeddings=128,
        **settings,
    )
    torch.manual_seed(3)  # without near ties, which rounding of other company would turn
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("small")
    return saved(path, "qwen3_moe", num_key_value_heads=1, head_dim=16, num_experts=4)


def opened(model: str, device: str, **settings: Any) -> LLM:
    usual: dict[str, Any] = {
        "ranks": 2,
        "max_ranks": 3,
        "engine__max_tokens_per_step": 16,
        "engine__max_running": 3,
        "engine__kv_memory": "64k",
        "engine__kv_block_size": 4,
        "model__dtype": "float32",
        "cluster__exchange_timeout": 60.0,
        "cluster__stall_timeout": 30.0,
    }
    return LLM(model, engine__device=device, **{**usual, **settings})


def tokens(llm: LLM) -> list[list[int]]:
    return [answer.token_ids for answer in llm.generate(PROMPTS, GREEDY)]


def bits(llm: LLM) -> list[Any]:
    """Tokens and log probabilities: of the likeliest, of drawn ones and of the prompt."""
    drawn = {"temperature": 1.0, "top_p": 0.9, "logprobs": 2, "max_tokens": 5, "ignore_eos": True}
    params = [
        SamplingParams(temperature=0.0, logprobs=0, max_tokens=5, ignore_eos=True),
        SamplingParams(seed=1, prompt_logprobs=1, **drawn),
        SamplingParams(seed=2, frequency_penalty=0.5, **drawn),
    ]
    return [
        (answer.token_ids, answer.outputs[0].logprobs, answer.prompt_logprobs)
        for answer in llm.generate([*PROMPTS[:2], [*range(5, 25)]], params)  # the last in pieces
    ]


@pytest.fixture(scope="module")
def expected(model: str) -> list[list[int]]:
    with opened(model, "cpu") as llm:
        return tokens(llm)


@pytest.fixture(scope="module")
def llm(model: str) -> Iterator[LLM]:
    with opened(model, "cuda") as made:
        yield made


class Answers(threading.Thread):
    """Those to the prompts, while something else happens."""

    def __init__(self, llm: LLM, generate: Callable[[LLM], list[Any]] = tokens) -> None:
        super().__init__(daemon=True)  # a failed test must not keep the process
        self.llm = llm
        self.generate = generate
        self.found: list[Any] = []
        self.start()

    def run(self) -> None:
        self.found = self.generate(self.llm)

    def wait_until_some_run(self) -> None:
        while not any(rank.running for rank in self.llm.cluster().ranks):
            assert self.is_alive()
            threading.Event().wait(0.02)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_answers_are_those_of_the_cpu_through_joins_and_leaves(
    llm: LLM, expected: list[list[int]]
) -> None:
    answers = Answers(llm)
    answers.wait_until_some_run()
    grown = llm.scale(3)
    answers.join()
    assert answers.found == expected
    assert grown.copied_experts == grown.moved_experts > 0  # from its peers' memory
    captured = {rank.id: rank.graphs for rank in llm.cluster().ranks}
    answers = Answers(llm)
    answers.wait_until_some_run()
    shrunk = llm.scale(remove=[0])
    answers.join()
    assert answers.found == expected
    assert (shrunk.moved_requests > 0) == (shrunk.moved_with_kv > 0)
    assert shrunk.recomputed_tokens == 0
    assert {rank.id: rank.graphs for rank in llm.cluster().ranks} == {
        1: captured[1],
        2: captured[2],
    }
    assert all(captured.values())


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_killed_rank_costs_no_answer(llm: LLM, expected: list[list[int]]) -> None:
    answers = Answers(llm)
    answers.wait_until_some_run()
    victim = llm.cluster().ranks[0]
    os.kill(victim.pid, signal.SIGKILL)
    answers.join()
    assert answers.found == expected


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_deterministic_answers_have_the_same_bits_alone_and_through_changes(model: str) -> None:
    """The interpreter's arithmetic is not a GPU's: what is seen is that nothing depends on company.
    tests/gpu/test_deterministic_on_gpu.py is about the bits of a GPU."""
    mode: dict[str, Any] = {"engine__deterministic": True}
    # no exchange, and one request at a time
    alone = {"ranks": 1, "max_ranks": 1, "engine__max_running": 1}
    with opened(model, "cuda", **mode, **alone) as llm:
        expected = bits(llm)
    with opened(model, "cuda", **mode) as llm:
        answers = Answers(llm, bits)
        answers.wait_until_some_run()
        llm.scale(3)
        llm.scale(remove=[0])
        os.kill(llm.cluster().ranks[0].pid, signal.SIGKILL)
        answers.join()
        assert answers.found == expected


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_model_proposes_tokens_through_a_leave_and_a_kill(tmp_path: Path) -> None:
    path = agreeing_model(tmp_path)
    ModelSource.open("tiny").tokenizer().save_pretrained(path)
    few = {"engine__max_running": 2, "engine__kv_memory": "48k"}

    def drawn(llm: LLM) -> list[list[int]]:
        ways = [{"temperature": 0.0}, {"temperature": 1.0, "seed": 3}, {"temperature": 0.0}]
        params = [SamplingParams(max_tokens=10, ignore_eos=True, **way) for way in ways]
        return [answer.token_ids for answer in llm.generate(PROMPTS, params)]

    with opened(str(path), "cpu", **few) as llm:
        expected = drawn(llm)
    how = {"method": "mtp", "num_speculative_tokens": 2}
    with opened(str(path), "cuda", engine__speculate=how, **few) as llm:
        answers = Answers(llm, drawn)
        answers.wait_until_some_run()
        llm.scale(remove=[0])
        os.kill(llm.cluster().ranks[0].pid, signal.SIGKILL)
        answers.join()
        assert answers.found == expected
        read = llm._head.registry.get_sample_value
        by_position = [
            read("flexpert_accepted_draft_tokens_by_position_total", {"position": str(place)}) or 0
            for place in range(2)
        ]
        assert by_position[0] > by_position[1] > 0


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_ranks_of_several_machines_answer_the_same_through_a_join_and_a_leave(
    model: str, expected: list[list[int]]
) -> None:
    """Each rank is treated as one on a machine of its own: windows, experts and KV over NIXL."""
    pytest.importorskip("nixl_cu13", reason="pip install 'flexpert[nixl]'")
    with opened(model, "cuda", engine__transport="nixl") as llm:
        answers = Answers(llm)
        answers.wait_until_some_run()
        grown = llm.scale(3)
        answers.join()
        assert answers.found == expected
        assert grown.copied_experts == grown.moved_experts > 0
        answers = Answers(llm)
        answers.wait_until_some_run()
        shrunk = llm.scale(remove=[0])
        answers.join()
        assert answers.found == expected
        assert shrunk.recomputed_tokens == 0


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_latents_move_with_a_leaver_s_requests(tmp_path: Path) -> None:
    """And begin the same prompts the next time."""
    model = saved(
        tmp_path,
        "deepseek_v3",
        first_k_dense_replace=1,
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=16,
    )
    with opened(model, "cpu") as llm:
        expected = [answer.token_ids for answer in llm.generate(PROMPTS, GREEDY)]
    with opened(model, "cuda") as llm:
        answers = Answers(llm)
        answers.wait_until_some_run()
        shrunk = llm.scale(remove=[0])
        answers.join()
        assert answers.found == expected
        assert (shrunk.moved_requests > 0) == (shrunk.moved_with_kv > 0)
        assert shrunk.recomputed_tokens == 0
        again = llm.generate(PROMPTS, GREEDY)
        assert [answer.token_ids for answer in again] == expected
        assert all(rank.graphs for rank in llm.cluster().ranks)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_experts_of_a_lost_rank_come_from_the_copy_in_the_host_s_memory(
    model: str, expected: list[list[int]], tmp_path: Path
) -> None:
    """Nothing else has them: the checkpoint is refused, because it has changed."""
    served = shutil.copytree(model, tmp_path / "served")
    with opened(str(served), "cuda", cluster__restart_policy="never") as llm:
        cache = llm._head._cache
        assert cache is not None
        wait_until(lambda: cache.filled, 60.0)
        for file in served.glob("*.safetensors"):
            os.utime(file)
        answers = Answers(llm)
        answers.wait_until_some_run()
        os.kill(llm.cluster().ranks[0].pid, signal.SIGKILL)
        answers.join()
        assert answers.found == expected
        assert [rank.id for rank in llm.cluster().ranks] == [1]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_states_move_with_a_leaver_s_requests_and_outlive_a_kill(tmp_path: Path) -> None:
    """Of layers that keep one of each sequence, computed by kernels where it lies."""
    model = saved(
        tmp_path,
        "qwen3_next",
        num_key_value_heads=1,
        head_dim=16,
        num_experts=4,
        shared_expert_intermediate_size=16,
        layer_types=["linear_attention", "full_attention"],
        linear_num_key_heads=1,
        linear_num_value_heads=2,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
    )
    with opened(model, "cpu") as llm:
        expected = tokens(llm)
    with opened(model, "cuda") as llm:
        answers = Answers(llm)
        answers.wait_until_some_run()
        shrunk = llm.scale(remove=[0])
        answers.join()
        assert answers.found == expected
        assert (shrunk.moved_requests > 0) == (shrunk.moved_with_kv > 0)
        assert shrunk.recomputed_tokens == 0
        answers = Answers(llm)
        answers.wait_until_some_run()
        os.kill(llm.cluster().ranks[0].pid, signal.SIGKILL)
        answers.join()
        assert answers.found == expected
