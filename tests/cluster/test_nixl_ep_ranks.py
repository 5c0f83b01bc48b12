"""`--device cuda --all2all nixl_ep` with several ranks, over nixl_ep's interface on the CPU.

As `test_gpu_ranks`: real processes in Triton's interpreter; NVIDIA's kernels are not in it.
"""

from __future__ import annotations

import os
import signal

import pytest
import torch
from test_gpu_ranks import GREEDY, PROMPTS, Answers, model

from flexpert import LLM

pytest.importorskip("triton", reason="the GPU kernels need the package triton")

if torch.cuda.is_available():
    pytest.skip("ranks would look for NVIDIA's package", allow_module_level=True)

__all__ = ["model"]  # the fixture


def opened(model: str, ranks: int, max_ranks: int, all2all: str) -> LLM:
    return LLM(
        model,
        ranks=ranks,
        max_ranks=max_ranks,
        engine__device="cuda",
        engine__all2all=all2all,
        engine__max_tokens_per_step=16,
        engine__max_running=3,
        engine__kv_memory="64k",
        engine__kv_block_size=4,
        model__dtype="bfloat16",
        cluster__exchange_timeout=60.0,
        cluster__stall_timeout=30.0,
    )


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_answers_are_those_of_one_rank_through_a_join_a_leave_and_a_kill(model: str) -> None:
    with opened(model, 1, 1, "auto") as alone:
        expected = [answer.token_ids for answer in alone.generate(PROMPTS, GREEDY)]
    with opened(model, 2, 3, "nixl_ep") as llm:
        answers = Answers(llm)
        answers.wait_until_some_run()
        llm.scale(3)
        answers.join()
        assert answers.found == expected
        answers = Answers(llm)
        answers.wait_until_some_run()
        captured = {rank.id: rank.graphs for rank in llm.cluster().ranks}
        llm.scale(remove=[0])
        answers.join()
        assert answers.found == expected
        assert captured[1] > 0
        assert {r.id: r.graphs for r in llm.cluster().ranks} == {1: captured[1], 2: captured[2]}
        answers = Answers(llm)
        answers.wait_until_some_run()
        os.kill(llm.cluster().ranks[0].pid, signal.SIGKILL)
        answers.join()
        assert answers.found == expected
