"""The engine on a GPU computes what it computes on a CPU; its kernels in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from support.checkpoints import Sequences, prompt_of, reference_logits, single_runner
from support.fp8_checkpoints import make_fp8_checkpoint

from flexpert.kernels.kernel_set import fixed_order_gpu_kernels, gpu_kernels
from flexpert.kernels.weight_formats import FP8
from flexpert.models.batch import ForwardBatch
from flexpert.models.model_runner import ModelRunner
from flexpert.models.source import ModelSource
from flexpert.models.step_graphs import GraphShape, StepGraphs, StepInputs
from flexpert.moe.moe_layers import LayerState
from flexpert.moe.placement import Placement, replan
from flexpert.moe.runtime import expert_tables

pytest.importorskip("triton", reason="the GPU kernels need the package triton")

from flexpert.kernels.cuda.device_experts import SlotAddresses, is_swiglu
from flexpert.moe.cuda.local_experts import LocalExperts

from support.device_runner import device_runner  # isort: skip - needs triton

CPU = torch.device("cpu")


def states(source: ModelSource, placement: Placement) -> list[LayerState[SlotAddresses]]:
    held = [
        SlotAddresses.of([source.load_experts(layer, [expert])[expert] for expert in experts])
        for layer, experts in enumerate(placement.held_by(0))
    ]
    tables = expert_tables(placement, 0)
    return [LayerState(table, experts) for table, experts in zip(tables, held, strict=True)]


def gpu_runner(
    source: ModelSource, *, deterministic: bool = False
) -> tuple[Sequences, LocalExperts]:
    info = source.info
    local = LocalExperts(
        *(0, info.moe_layers, info.experts, source.expert_shape(), CPU),
        deterministic=deterministic,
    )
    made = ModelRunner.load(
        source,
        moe=local,
        kv_blocks=32,
        kv_block_size=8,
        deterministic=deterministic,
        kernels=fixed_order_gpu_kernels(CPU) if deterministic else gpu_kernels(CPU),
    )
    return Sequences(made, 8), local


FUSED = {
    "qwen3_moe": {
        *("Qwen3MoeAttention", "Qwen3MoeTopKRouter", "Qwen3MoeRMSNorm"),
        "Qwen3MoeDecoderLayer",
    },
    "mixtral": {
        *("MixtralAttention", "MixtralTopKRouter", "MixtralRMSNorm"),
        "MixtralDecoderLayer",
    },
    "gpt_oss": {"GptOssRMSNorm"},
    "deepseek_v3": {"DeepseekV3RMSNorm"},
    "glm4_moe": {"Glm4MoeRMSNorm"},  # it rotates a part of each head
}
"""Modules that one kernel, or a few, must have taken the place of."""


@pytest.mark.slow
@pytest.mark.parametrize("family", list(FUSED))
def test_the_kernels_give_the_logits_of_the_cpu_wherever_the_experts_are(
    family: str, checkpoint: Callable[..., Path]
) -> None:
    path = checkpoint(family)
    a, b = prompt_of(5, 1), prompt_of(3, 2)
    steps = [{"a": a[:3], "b": b[:1]}, {"a": a[3:4], "b": b[1:2]}, {"a": a[4:], "b": b[2:]}]
    cpu = single_runner(path, dtype="float32")
    expected = [cpu.step(step) for step in steps]

    source = ModelSource.open(str(path), dtype="float32")
    gpu, local = gpu_runner(source)
    fused = {type(m).__name__ for m in gpu.runner._model.modules() if "forward" in vars(m)}
    assert fused >= FUSED[family]
    experts, layers = source.info.experts, source.info.moe_layers
    forward = replan(None, [0], experts=experts, layers=layers)
    backward = Placement(experts, [{0: list(reversed(range(experts)))} for _ in range(layers)])
    for index, step in enumerate(steps):
        local.install(local.stage(states(source, backward if index == 1 else forward)))
        for name, logits in gpu.step(step).items():
            torch.testing.assert_close(logits, expected[index][name], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_deterministic_logits_have_the_same_bits_in_any_company(
    checkpoint: Callable[..., Path],
) -> None:
    """In graphs as well, of decode steps and of prompts: there a batch is padded. Of this family no
    attention and no router is fused."""
    source = ModelSource.open(str(checkpoint("deepseek_v3")), dtype="float32")
    gpu, local = gpu_runner(source, deterministic=True)
    info = source.info
    local.install(
        local.stage(states(source, replan(None, [0], experts=info.experts, layers=info.moe_layers)))
    )
    a, b = prompt_of(6, 1), prompt_of(4, 2)
    whole = gpu.step({"a": a})["a"]
    gpu.drop("a")
    pieces = [gpu.step({"b": b[:1], "a": a[:2]})["a"], gpu.step({"a": a[2:3], "b": b[1:2]})["a"]]
    gpu.runner.capture([GraphShape(4, 4), GraphShape(8, 4)], max_blocks=3)
    pieces.append(gpu.step({"b": b[2:3], "a": a[3:4]})["a"].clone())
    pieces.append(gpu.step({"a": a[4:], "b": b[3:]})["a"])
    assert torch.equal(torch.cat(pieces), whole)


@pytest.mark.slow
def test_fp8_experts_give_the_logits_of_a_cpu_that_dequantizes_them(tmp_path: Path) -> None:
    small, _ = make_fp8_checkpoint("qwen3_moe", tmp_path, num_hidden_layers=2, num_experts=4)
    prompt = prompt_of(5, 1)
    steps = [{"a": prompt[:4]}, {"a": prompt[4:]}]
    cpu = single_runner(small)
    source = ModelSource.open(str(small), experts="stored")
    assert source.expert_shape().format is FP8
    gpu, local = gpu_runner(source)
    info = source.info
    local.install(
        local.stage(states(source, replan(None, [0], experts=info.experts, layers=info.moe_layers)))
    )
    for step in steps:
        torch.testing.assert_close(gpu.step(step)["a"], cpu.step(step)["a"], rtol=1e-3, atol=1e-4)


def test_experts_on_another_rank_are_refused() -> None:
    source = ModelSource.open("tiny", dtype="float32")
    info = source.info
    local = LocalExperts(0, info.moe_layers, info.experts, source.expert_shape(), CPU)
    placement = replan(None, [0, 1], experts=info.experts, layers=info.moe_layers)
    with pytest.raises(ValueError, match="other ranks"):
        local.install(local.stage(states(source, placement)))


@pytest.mark.parametrize("factor", [1.0, 1.001])
def test_a_gate_is_taken_for_swiglu_only_if_it_computes_it(factor: float) -> None:
    def gate(x: torch.Tensor) -> torch.Tensor:
        a, b = x.chunk(2, dim=-1)
        return torch.nn.functional.silu(a) * b * factor

    assert is_swiglu(gate) == (factor == 1.0)
    assert not is_swiglu(torch.nn.functional.silu)


@pytest.mark.slow
def test_captured_steps_follow_the_experts_without_another_capture(
    checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = checkpoint("qwen3_moe")
    prompts = {name: prompt_of(9, seed) for seed, name in enumerate("abc")}
    begin = {name: prompt[:5] for name, prompt in prompts.items()}
    # in graphs for four, two and one sequence, then the ends of two prompts beside a token
    decodes = [{name: prompts[name][5 + i : 6 + i] for name in "abc"[: 3 - i]} for i in range(3)]
    decodes.append({"a": prompts["a"][8:9], "b": prompts["b"][7:9], "c": prompts["c"][6:9]})
    cpu = single_runner(path, dtype="float32")
    expected = [cpu.step(step) for step in (begin, *decodes)][1:]

    source = ModelSource.open(str(path), dtype="float32")
    gpu, local = gpu_runner(source)
    shapes = [GraphShape(n, n) for n in (1, 2, 4)] + [GraphShape(10, 6)]
    gpu.runner.capture(shapes, max_blocks=3)  # before any expert is there
    experts, layers = source.info.experts, source.info.moe_layers
    forward = replan(None, [0], experts=experts, layers=layers)
    backward = Placement(experts, [{0: list(reversed(range(experts)))} for _ in range(layers)])
    local.install(local.stage(states(source, forward)))
    gpu.step(begin)
    for index, step in enumerate(decodes):
        local.install(local.stage(states(source, backward if index % 2 else forward)))
        with monkeypatch.context() as only_graphs:
            only_graphs.setattr(gpu.runner, "_walk", None)
            found = gpu.step(step)
        for name, logits in found.items():
            torch.testing.assert_close(logits, expected[index][name], rtol=1e-3, atol=1e-4)
    assert gpu.runner.graphs is not None
    assert gpu.runner.graphs.captures == 4


@pytest.mark.slow
@pytest.mark.parametrize("family", ["lfm2_moe"])
def test_layers_with_states_give_the_logits_of_transformers_in_graphs_too(
    family: str, checkpoint: Callable[..., Path]
) -> None:
    """By a kernel where states lie, and by transformers' module beside them."""
    path = checkpoint(family)
    gpu = device_runner(path, CPU)
    prompts = {"a": prompt_of(9, 1), "b": prompt_of(6, 2)}
    found: dict[str, list[torch.Tensor]] = {"a": [], "b": []}
    at = {"a": 0, "b": 0}

    def step(**counts: int) -> None:
        work = {name: prompts[name][at[name] : at[name] + n] for name, n in counts.items()}
        for name, logits in gpu.step(work).items():
            found[name].append(logits.clone())
            at[name] += counts[name]

    step(a=5, b=2)
    step(a=1, b=2)
    gpu.runner.capture([GraphShape(4, 4), GraphShape(8, 4)], max_blocks=1)
    assert gpu.runner.graphs is not None
    assert gpu.runner.graphs.captures == 1  # prompts are cut by the host
    step(a=1, b=1)
    step(b=1)
    step(a=2)
    for name, tokens in prompts.items():
        expected = reference_logits(path, tokens[: at[name]])
        torch.testing.assert_close(torch.cat(found[name]), expected, rtol=1e-3, atol=1e-3)


def test_the_smallest_graph_is_taken_that_has_room_for_what_comes_from_all_ranks() -> None:
    taken: list[int] = []

    def walk(batch: ForwardBatch) -> torch.Tensor:
        taken.append(batch.token_ids.shape[0])
        return torch.zeros(batch.sample_rows.shape[0], 3)

    shapes = [GraphShape(n, n) for n in (1, 2, 4)] + [GraphShape(n, 3) for n in (8, 16)]
    graphs = StepGraphs(walk, shapes=shapes, max_blocks=2, device=CPU)
    assert graphs.captures == len(shapes)

    def tokens_of_the_graph(tokens: int, sequences: int, mean: int = 0, samples: int = 1) -> int:
        taken.clear()
        ones = torch.ones(tokens, dtype=torch.int64)
        start = torch.arange(sequences + 1).int()
        start[-1] = tokens
        lengths = torch.ones(sequences).int()
        tables = torch.zeros(sequences, 1).int()
        rows = torch.zeros(samples, dtype=torch.int64)
        batch = ForwardBatch(ones, ones, start, lengths, tables, ones, rows)
        logits = graphs.forward(batch, mean)
        assert (logits is not None) == graphs.fits(batch) or mean
        assert logits is None or logits.shape == (samples, 3)
        return taken[0] if taken else 0

    assert tokens_of_the_graph(3, 3, samples=3) == 4  # each one token
    assert tokens_of_the_graph(3, 3, samples=2) == 8  # one is no decoding
    assert tokens_of_the_graph(3, 2) == 8
    assert tokens_of_the_graph(9, 2) == 16
    assert tokens_of_the_graph(17, 2) == 0
    assert tokens_of_the_graph(9, 4) == 0  # too many sequences
    assert tokens_of_the_graph(3, 3, mean=8, samples=3) == 4
    assert tokens_of_the_graph(3, 3, mean=9, samples=3) == 8
    assert tokens_of_the_graph(3, 3, mean=33, samples=3) == 0
    taken.clear()
    assert [graphs.idle(mean) for mean in (0, 3, 17, 33)] == [True, True, True, False]
    assert taken == [1, 2, 16]


def test_a_model_that_waits_in_prompts_has_graphs_for_decoding(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def walk(batch: ForwardBatch) -> torch.Tensor:
        if batch.token_ids.shape[0] > batch.context_len.shape[0]:
            raise RuntimeError("it waits")
        return torch.zeros(batch.sample_rows.shape[0], 3)

    graphs = StepGraphs(walk, shapes=[GraphShape(2, 2), GraphShape(8, 2)], max_blocks=1, device=CPU)
    assert graphs.captures == 1
    assert "it waits" in caplog.text


def test_padding_of_a_captured_step_is_no_leftover_of_a_larger_one() -> None:
    shape = GraphShape(4, 4)
    memory = torch.full((StepInputs.bytes_for(GraphShape(8, 8), 5),), 255, dtype=torch.uint8)
    inputs = StepInputs.over(memory, shape, 5)
    tables = torch.arange(6, dtype=torch.int32).view(2, 3)
    ones, start = torch.ones(2, dtype=torch.int64), torch.arange(3).int()
    inputs.fill(ForwardBatch(ones, ones, start, 2 * ones.int(), tables, 3 * ones, ones))
    assert inputs.token_ids.tolist() == [1, 1, 0, 0]
    assert inputs.positions.tolist() == [1, 1, 0, 0]
    assert inputs.slot_mapping.tolist() == [3, 3, -1, -1]
    assert inputs.sources.tolist() == [-1, -1, -1, -1]
    assert inputs.sample_rows.tolist() == [1, 1, 0, 0]
    assert inputs.query_start.tolist() == [0, 1, 2, 3, 4]
    assert inputs.context_len.tolist() == [2, 2, 0, 0]
    assert torch.equal(inputs.block_tables[:2, :3], tables)
    assert inputs.nbytes <= StepInputs.bytes_for(shape, 5)
    prompts = StepInputs.over(memory, GraphShape(6, 3), 5)
    prompts.fill(ForwardBatch(ones, ones, start[::2], ones[:1].int(), tables[:1], ones, ones[:1]))
    assert prompts.query_start.tolist() == [0, 2, 2, 2]  # sequences that are padding have no token
    assert prompts.context_len.tolist() == [1, 0, 0]
    for one in (inputs, prompts):
        arrays = [getattr(one, field.name) for field in fields(one)]
        places = [a.data_ptr() - memory.data_ptr() for a in arrays if isinstance(a, torch.Tensor)]
        assert [place % 16 for place in places] == [0] * 9  # as kernels were compiled for
