"""A rank's experts: each row goes through its own expert, alone or in any company."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from flexpert.kernels import block_fp8 as fp8
from flexpert.kernels.cpu.expert_products import LayerExperts, library_rows
from flexpert.kernels.experts import ExpertShape, ExpertWeights, Gate
from flexpert.kernels.weight_formats import FP8, INT8, MXFP4, WeightFormat

HIDDEN, INTER = 40, 24


def gate(h: Tensor) -> Tensor:
    a, b = h.chunk(2, dim=-1)
    gated: Tensor = F.silu(a) * b
    return gated


def make_experts(count: int, dtype: torch.dtype, *, biases: bool = False) -> list[ExpertWeights]:
    generator = torch.Generator().manual_seed(count)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).mul(float(shape[-1]) ** -0.5).to(dtype)

    return [
        ExpertWeights(
            randn(2 * INTER, HIDDEN),
            randn(HIDDEN, INTER),
            randn(2 * INTER) if biases else None,
            randn(HIDDEN) if biases else None,
        )
        for _ in range(count)
    ]


def offsets_of(counts: list[int]) -> Tensor:
    return torch.tensor([0, *counts]).cumsum(0).int()


def one_by_one(
    experts: list[ExpertWeights], x: Tensor, counts: list[int], gate: Gate = gate
) -> Tensor:
    pieces, begin = [], 0
    for expert, count in zip(experts, counts, strict=True):
        h = x[begin : begin + count].double() @ expert.gate_up.double().t()
        h += 0 if expert.gate_up_bias is None else expert.gate_up_bias.double()
        y = gate(h) @ expert.down.double().t()
        y += 0 if expert.down_bias is None else expert.down_bias.double()
        pieces.append(y)
        begin += count
    return torch.cat(pieces)


COUNTS = [[1, 0, 2, 5], [0, 0, 0, 0], [0, 7, 0, 0], [300, 3, 0, 70], [16, 33, 1, 129]]


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_row_goes_through_its_expert(
    dtype: torch.dtype, deterministic: bool, biases: bool, counts: list[int]
) -> None:
    experts = make_experts(4, dtype, biases=biases)
    x = torch.randn(sum(counts), HIDDEN).to(dtype)
    y = LayerExperts(experts, deterministic=deterministic).compute(x, offsets_of(counts), gate)
    close = 1e-5 if dtype == torch.float32 else 3e-2
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), one_by_one(experts, x, counts), rtol=close, atol=close)


def test_float16_experts_are_computed_by_torch() -> None:
    experts = make_experts(3, torch.float16, biases=True)
    x = torch.randn(5, HIDDEN).half()
    y = LayerExperts(experts, deterministic=False).compute(x, offsets_of([2, 0, 3]), gate)
    torch.testing.assert_close(y.double(), one_by_one(experts, x, [2, 0, 3]), rtol=1e-2, atol=1e-2)
    with pytest.raises(ValueError, match="bf16 or f32"):
        LayerExperts(experts, deterministic=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_deterministic_rows_have_the_same_bits_whatever_the_placement(dtype: torch.dtype) -> None:
    experts = make_experts(4, dtype)
    x = torch.randn(200, HIDDEN).to(dtype)

    def exact_gate(h: Tensor) -> Tensor:  # silu by torch depends on where an element lies
        a, b = h.chunk(2, dim=-1)
        return a * b

    alone = LayerExperts(experts[2:3], deterministic=True)
    each = torch.cat([alone.compute(r[None], offsets_of([1]), exact_gate) for r in x])
    for counts in ([3, 0, 200, 1], [0, 90, 100, 10], [1, 1, 1, 1]):
        shared = LayerExperts(experts, deterministic=True)
        rows = torch.randn(sum(counts), HIDDEN).to(dtype)
        begin = sum(counts[:2])
        rows[begin : begin + counts[2]] = x[: counts[2]]
        y = shared.compute(rows, offsets_of(counts), exact_gate)
        assert torch.equal(y[begin : begin + counts[2]], each[: counts[2]])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weights_that_begin_anywhere_give_the_same_bits(dtype: torch.dtype) -> None:
    shape = ExpertShape(128, 64, 32, dtype)

    def at(offset: int) -> LayerExperts:
        experts = []
        for number in range(2):
            memory = torch.empty(shape.nbytes + 128, dtype=torch.uint8)
            begin = -memory.data_ptr() % 64 + offset
            expert = shape.over(memory[begin : begin + shape.nbytes])
            generator = torch.Generator().manual_seed(number)
            for tensor in expert.tensors:
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
            experts.append(expert)
        return LayerExperts(experts, deterministic=True)

    counts = offsets_of([3, 17])
    x = torch.randn((20, 128), generator=torch.Generator().manual_seed(5)).to(dtype)
    expected = at(0).compute(x, counts, gate)
    for offset in range(dtype.itemsize, 64, dtype.itemsize):
        assert torch.equal(at(offset).compute(x, counts, gate), expected), offset


def test_a_layer_without_experts_computes_nothing() -> None:
    layer = LayerExperts([], deterministic=False)
    assert layer.slots == 0
    y = layer.compute(torch.empty(0, HIDDEN), torch.zeros(1, dtype=torch.int32), gate)
    assert y.shape == (0, HIDDEN)


def test_an_expert_knows_its_size() -> None:
    assert make_experts(1, torch.bfloat16)[0].nbytes == 2 * 3 * HIDDEN * INTER
    elements = 3 * HIDDEN * INTER + 2 * INTER + HIDDEN
    assert make_experts(1, torch.float32, biases=True)[0].nbytes == 4 * elements


def test_large_groups_reach_torch_in_few_sizes() -> None:
    experts = make_experts(2, torch.bfloat16)
    layer = LayerExperts(experts, deterministic=False)
    sizes = set()
    for rows in range(1, 700, 13):
        x = torch.empty((rows + 5, HIDDEN), dtype=torch.bfloat16)
        for _, _, size in layer._split(x, offsets_of([rows, 5])):
            sizes.add(size)
    assert sizes <= set(library_rows(torch.bfloat16, threads=2))


def test_fp8_experts_keep_their_values_to_a_sixteenth_and_no_cpu_computes_them() -> None:
    whole = make_experts(1, torch.float32, biases=True)[0]
    small = whole.quantized(FP8)
    assert small.shape.format is FP8
    assert small.nbytes < whole.nbytes / 3
    for weight, scale, expected in (
        (small.gate_up, small.gate_up_scale, whole.gate_up),
        (small.down, small.down_scale, whole.down),
    ):
        assert scale is not None
        back = fp8.dequantize(weight, scale)
        assert ((back - expected).abs() <= expected.abs() / 16 + expected.abs().max() / 2**16).all()
    with pytest.raises(ValueError, match="does not compute with experts in fp8"):
        LayerExperts([small], deterministic=False)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("packed", [MXFP4, INT8], ids=["mxfp4", "int8"])
def test_packed_experts_compute_as_the_dequantized_ones(
    packed: WeightFormat, deterministic: bool
) -> None:
    shape = ExpertShape(64, 96, 32, torch.bfloat16, torch.bfloat16)
    experts = []
    for _ in range(3):
        whole = shape.empty()
        for tensor in whole.tensors:
            tensor.normal_().mul_(0.1)
        experts.append(whole.quantized(packed))
    counts = [2, 0, 150]  # so many that torch takes a part of them
    x = torch.randn(152, 64).bfloat16()
    layer = LayerExperts(experts, deterministic=deterministic)
    y = layer.compute(x, offsets_of(counts), lambda h: gate(h[:, :64]))
    restored = [expert.dequantized() for expert in experts]
    desired = one_by_one(restored, x, counts, lambda h: gate(h[:, :64]))
    torch.testing.assert_close(y.double(), desired, rtol=2e-2, atol=2e-2)


def test_blocks_of_fp8_weights_are_scaled_alone() -> None:
    weight = torch.randn(200, 300, generator=torch.Generator().manual_seed(1))
    weight[:128, 128:256] *= 1000
    small, scales = fp8.quantize(weight)
    assert small.shape == weight.shape
    assert scales.shape == (2, 3)
    of_each = scales.repeat_interleave(128, 0)[:200].repeat_interleave(128, 1)[:, :300]
    # half of the last of three bits, and half of the smallest step below 2**-6 of the scale
    bound = weight.abs() / 16 * 1.001 + of_each * 2**-10
    assert ((fp8.dequantize(small, scales) - weight).abs() <= bound).all()
    assert scales[0, 1] > 100 * scales[0, 0]


def test_an_expert_of_tensors_that_do_not_fit_is_refused() -> None:
    good = make_experts(1, torch.float32)[0]
    assert good.shape.inter == INTER
    for bad in (
        ExpertWeights(good.gate_up, good.down[1:]),
        ExpertWeights(good.gate_up, good.down.bfloat16()),
        ExpertWeights(good.gate_up, good.down, gate_up_bias=torch.zeros(2 * INTER)),
        ExpertWeights(good.gate_up, good.down, gate_up_scale=torch.ones(1, 1)),
    ):
        with pytest.raises(ValueError, match="do not fit"):
            _ = bad.shape
