"""Experts so wide that torch works on one with several threads: ranks are forks of a process that
has read some, and threads do not survive a fork."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from flexpert import LLM, SamplingParams
from flexpert.models.source import ModelSource


@pytest.mark.timeout(120)
def test_ranks_compute_with_threads_of_their_own(tmp_path: Path) -> None:
    tokenizer = ModelSource.open("tiny").tokenizer()
    config = AutoConfig.for_model(
        "qwen3_moe",
        vocab_size=len(tokenizer),
        hidden_size=512,
        intermediate_size=512,
        moe_intermediate_size=512,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=128,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with LLM(
        str(tmp_path), ranks=1, max_ranks=2, engine__threads=2, engine__kv_memory="4MiB"
    ) as llm:
        greedy = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
        for ranks in (1, 2):
            llm.scale(ranks)
            (answer,) = llm.generate([[5, 6, 7] * 8], greedy)
            assert len(answer.token_ids) == 4
