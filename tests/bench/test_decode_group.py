"""Ranks of `flexpert bench decode` in processes of their own compute what transformers computes.

In Triton's interpreter, with a model of two small layers; times mean nothing here.
"""

from __future__ import annotations

import pytest
import torch
from support.rendered import shown
from transformers import AutoConfig, DeepseekV3Config

pytest.importorskip("triton", reason="what is measured needs the package triton")

from flexpert.bench.gpu.decode import difference, single_rank
from flexpert.bench.gpu.decode_group import GroupPlan, place_on, run_group
from flexpert.bench.gpu.decode_rank import check_prompts
from flexpert.bench.gpu.gpu_device import MeasuredGpu
from flexpert.bench.gpu.gpu_report import layer_text
from flexpert.bench.gpu.layer_group import LayerGroupPlan, run_layer_group
from flexpert.bench.gpu.layer_report import LayerReport
from flexpert.bench.gpu.layer_weights import LayerShape
from flexpert.bench.gpu.model import RandomModel
from flexpert.bench.machine import this_machine
from flexpert.errors import FlexpertError
from flexpert.moe.placement import Placement

SMALL = AutoConfig.for_model(
    "qwen3_moe",
    vocab_size=64,
    hidden_size=32,
    intermediate_size=32,
    moe_intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    num_experts=4,
    num_experts_per_tok=2,
    max_position_embeddings=128,
)
SEED = 3
GPU = MeasuredGpu("H", "13.0", "2.11", "3.6", bytes_per_s=3e12, flops=8e14)


def plan(ranks: int, *, quantise: bool = False) -> GroupPlan:
    return GroupPlan(
        SMALL,
        ranks,
        [1, 3],
        context=8,
        steps=1,
        seed=SEED,
        dtype=torch.float32,
        check_tokens=6,
        quantise=quantise,
    )


def whole(seed: int = SEED, *, quantise: bool = False) -> RandomModel:
    return RandomModel.build(
        SMALL,
        torch.device("cpu"),
        seed=seed,
        dtype=torch.float32,
        place=place_on(1),
        quantise=quantise,
    )


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.skipif(torch.cuda.is_available(), reason="it is a test of the interpreter")
def test_two_ranks_give_the_logits_of_transformers() -> None:
    """With experts in fp8, of which transformers has the restored ones."""
    result = run_group(plan(2, quantise=True), note=lambda _: None)
    with torch.inference_mode():
        reference = whole(quantise=True).transformers()
        assert difference(reference, result.logits, SEED, 6) < 1e-4
        other = whole(seed=SEED + 1, quantise=True).transformers()
        assert difference(other, result.logits, SEED, 6) > 0.1  # it can tell
    assert [len(times) for times in result.times_us] == [1, 1]
    assert all(1 <= active <= 4 for active in result.active)
    assert result.captures == 2  # for one sequence, and for the two of the check


def test_weights_do_not_depend_on_who_holds_them() -> None:
    alone = whole()
    dealt = Placement(4, [{0: [3, 1], 1: [0, 2]}, {0: [2, 0], 1: [1, 3]}])
    for rank in (0, 1):
        share = RandomModel.build(
            SMALL,
            torch.device("cpu"),
            seed=SEED,
            dtype=torch.float32,
            place=lambda _: dealt,
            rank=rank,
        )
        for layer, held in enumerate(dealt.held_by(rank)):
            for ours, expert in zip(share.experts(layer), held, strict=True):
                theirs = alone.experts(layer)[expert]
                assert torch.equal(ours.gate_up, theirs.gate_up)
                assert torch.equal(ours.down, theirs.down)
        for name, tensor in share.weights.items():
            if "experts" not in name:
                assert torch.equal(tensor, alone.weights[name])


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="it is a test of the interpreter")
def test_latents_and_expanded_keys_give_the_logits_of_transformers() -> None:
    config = DeepseekV3Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        first_k_dense_replace=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=16,
        max_position_embeddings=128,
    )
    model = RandomModel.build(
        config, torch.device("cpu"), seed=SEED, dtype=torch.float32, place=place_on(1)
    )
    kept = [each.info.kv_bytes_per_token() for each in (model, model.expanded())]
    assert kept == [2 * 24 * 4, 2 * 2 * (24 + 16) * 4]
    prompts = check_prompts(model.info.vocab, SEED, 6)
    with torch.inference_mode():
        for each in (model, model.expanded()):
            logits = single_rank(each, [1], 8, lambda _: None).logits(prompts)
            assert difference(model.transformers(), logits, SEED, 6) < 1e-4


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="it is a test of the interpreter")
def test_a_layer_of_two_ranks_is_that_of_one() -> None:
    """Each compares its own tokens' results with float64, experts of the other included."""
    shape = LayerShape("small", hidden=160, inter=48, experts=5, topk=2)
    plan = LayerGroupPlan(shape, [3], 2, repeat=1, quantise=True, seed=SEED, dtype="float32")
    (point,) = run_layer_group(plan, GPU, note=lambda _: None)
    (result,) = point.results
    assert result.error is not None
    assert result.error < 1e-5
    assert result.us is not None
    assert 1 <= point.active <= 5
    assert "2 ranks on 1 GPUs with 3 tokens each" in shown(
        layer_text(LayerReport(machine=this_machine(), gpu=GPU, points=[point]))
    )


@pytest.mark.slow
def test_a_rank_that_fails_is_named() -> None:
    broken = GroupPlan(SMALL, 2, [1], 8, 2, seed=SEED, dtype=torch.int64)
    with pytest.raises(FlexpertError, match="rank 0 of the bench: "):
        run_group(broken, note=lambda _: None)


def test_a_batch_is_dealt_out_evenly() -> None:
    four = plan(4)
    assert [four.share(6, rank) for rank in range(4)] == [2, 2, 1, 1]
    assert [four.share(1, rank) for rank in range(4)] == [1, 0, 0, 0]
