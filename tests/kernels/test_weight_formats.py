"""Weights in MXFP4, int8 and fp8: what they are, what rounding costs, and products with them."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from flexpert.kernels import mxfp4
from flexpert.kernels.cpu import ops
from flexpert.kernels.experts import ExpertShape
from flexpert.kernels.weight_formats import (
    FORMATS,
    FP8,
    INT4,
    INT8,
    MXFP4,
    WeightFormat,
    format_of,
    int4_of,
)

PACKED = [MXFP4, INT8, INT4]
NAMES = [f.name for f in PACKED]
DTYPES = [torch.bfloat16, torch.float32]


def dice(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def value(code: int, scale: int) -> float:
    """By the format's paper: sign, two bits of exponent with a bias of 1, one of mantissa."""
    sign, exponent, mantissa = code >> 3, code >> 1 & 3, code & 1
    size = mantissa * 0.5 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1)
    return math.copysign(size, -1 if sign else 1) * 2.0 ** (scale - 127)


@pytest.mark.parametrize("scale", [0, 1, 2, 100, 127, 130, 252, 253, 255])
def test_each_byte_of_mxfp4_is_what_the_paper_says(scale: int) -> None:
    weight = torch.arange(256, dtype=torch.uint8).view(1, 256)
    got = mxfp4.dequantize(weight, torch.full((1, 16), scale, dtype=torch.uint8))
    if scale == 255:
        assert got.isnan().all()
        return
    each = [value(code, scale) for byte in range(256) for code in (byte & 15, byte >> 4)]
    assert torch.equal(got, torch.tensor(each, dtype=torch.float64).float()[None])


def test_mxfp4_takes_the_nearest_value_and_the_better_of_two_scales() -> None:
    weight = torch.randn(64, 96, generator=dice(1)) * torch.randn(64, 1, generator=dice(2)).exp()
    error = (mxfp4.dequantize(*mxfp4.quantize(weight)) - weight).square().view(-1, 32).sum(1)
    values = torch.tensor([value(code, 127) for code in range(16)])
    best = torch.full_like(error, math.inf)
    exponent = weight.view(-1, 32).abs().amax(1).log2().floor() - 2
    for raised in (0, 1):
        scale = 2.0 ** (exponent + raised)
        scaled = weight.view(-1, 32) / scale[:, None]
        nearest = (scaled[..., None] - values).abs().amin(-1) * scale[:, None]
        best = torch.minimum(best, nearest.square().sum(1))
    torch.testing.assert_close(error, best, rtol=1e-4, atol=0)


def test_what_mxfp4_holds_it_keeps() -> None:
    codes = torch.randint(0, 256, (8, 64), generator=dice(3), dtype=torch.uint8)
    scales = torch.randint(110, 140, (8, 4), generator=dice(4), dtype=torch.uint8)
    whole = mxfp4.dequantize(codes, scales)
    assert torch.equal(mxfp4.dequantize(*mxfp4.quantize(whole)), whole)
    assert torch.equal(mxfp4.dequantize(*mxfp4.quantize(whole.bfloat16())), whole)
    for small in (0.0, 2.0**-140, 3e38):
        there = torch.full((1, 32), small)
        back = mxfp4.dequantize(*mxfp4.quantize(there))
        torch.testing.assert_close(back, there, rtol=0.16, atol=2.0**-129)


@pytest.mark.parametrize(
    ("packed", "most"), [(FP8, 0.03), (MXFP4, 0.12), (INT8, 0.012), (INT4, 0.12)]
)
def test_rounding_costs_what_the_bits_say(packed: WeightFormat, most: float) -> None:
    weight = torch.randn(256, 512, generator=dice(5)) * 0.02
    stored, scales = packed.quantize(weight.bfloat16())
    assert stored.shape == packed.weights_of(256, 512)
    assert scales.shape == packed.scales_of(256, 512)
    assert format_of(stored, scales) is packed
    error = (packed.restore(stored, scales) - weight).norm() / weight.norm()
    assert most / 2 < error < most
    assert (packed.restore(stored, scales)[0, :5] * weight[0, :5] >= 0).all()


@pytest.mark.parametrize("packed", FORMATS.values(), ids=list(FORMATS))
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_weights_that_are_not_finite_are_refused(packed: WeightFormat, bad: float) -> None:
    weight = torch.ones(64, 64)
    weight[3, 5] = bad
    with pytest.raises(ValueError, match=f"no numbers cannot be made {packed.name}"):
        packed.quantize(weight)


def test_mxfp4_wants_whole_blocks() -> None:
    with pytest.raises(ValueError, match="each 32 columns, and a matrix has 40"):
        MXFP4.quantize(torch.ones(4, 40))
    with pytest.raises(ValueError, match="each 32 columns"):
        _ = ExpertShape(40, 64, 32, MXFP4).nbytes


@pytest.mark.parametrize("packed", FORMATS.values(), ids=list(FORMATS))
def test_an_expert_in_a_format_knows_its_shape_and_lies_in_one_piece(packed: WeightFormat) -> None:
    shape = ExpertShape(96, 128, 64, packed, torch.bfloat16)
    expert = shape.empty()
    assert expert.shape == shape
    assert expert.gate_up_scale is not None
    assert sum(t.nbytes for t in expert.tensors) <= shape.nbytes
    whole = ExpertShape(96, 128, 64, torch.bfloat16, torch.bfloat16)
    assert shape.nbytes < 0.6 * whole.nbytes


# ---- products on a CPU ----------------------------------------------------------------------


def grouped(packed: WeightFormat, width: int) -> WeightFormat:
    """int4 with larger groups than those it has by default, where rows are made of them."""
    if packed is not INT4:
        return packed
    return int4_of(96 if width % 96 == 0 else width if width < 256 else 32)


def matrix(packed: WeightFormat, out: int, width: int, seed: int) -> tuple[Tensor, Tensor]:
    """One of a format, with scales at both ends of those that MXFP4 has."""
    weight, scales = grouped(packed, width).quantize(torch.randn(out, width, generator=dice(seed)))
    if packed is MXFP4:
        for row, scale in enumerate((0, 1, 2, 3, 4, 250, 251)):
            scales[row, row % scales.shape[1]] = scale
    return weight, scales


def offsets(*counts: int) -> Tensor:
    return torch.tensor([0, *counts]).cumsum(0).int()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("packed", PACKED, ids=NAMES)
@pytest.mark.parametrize(("out", "width"), [(7, 32), (64, 128), (80, 96), (130, 416), (192, 2880)])
def test_a_product_is_that_of_the_dequantized_matrix(
    out: int, width: int, packed: WeightFormat, dtype: torch.dtype
) -> None:
    pairs = [matrix(packed, out, width, seed) for seed in (1, 2, 3)]
    biases = [torch.randn(out, generator=dice(seed)).to(dtype) for seed in (4, 5, 6)]
    table = ops.WeightTable([w for w, _ in pairs], biases, [s for _, s in pairs])
    assert table.in_features == width
    for counts in ((1, 0, 2), (5, 16, 17), (0, 40, 1)):
        x = (torch.randn(sum(counts), width, generator=dice(7)) * 1e-3).to(dtype)
        y = table.linear(x, offsets(*counts))
        assert y.dtype == dtype
        for rows, slot in zip(x.split(counts), range(3), strict=True):
            whole = table.whole(slot, dtype).double()
            desired = rows.double() @ whole.t() + biases[slot].double()
            got = y[sum(counts[:slot]) :][: len(rows)].double()
            sizes = rows.double().abs() @ whole.abs().t() + biases[slot].double().abs()
            rounding = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-18
            assert ((got - desired).abs() <= sizes * rounding + 1e-35).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("packed", PACKED, ids=NAMES)
@pytest.mark.parametrize("out", [48, 64, 150])
def test_a_row_has_the_same_bits_in_any_company(
    out: int, packed: WeightFormat, dtype: torch.dtype
) -> None:
    weight, scales = grouped(packed, 224).quantize(torch.randn(out, 224, generator=dice(8)))
    table = ops.WeightTable([weight], None, [scales])
    x = torch.randn(70, 224, generator=dice(9)).to(dtype)
    each = torch.cat([table.linear(row[None], offsets(1)) for row in x])
    for rows in (2, 3, 4, 7, 15, 16, 17, 33, 70):
        assert torch.equal(table.linear(x[:rows], offsets(rows)), each[:rows])


@pytest.mark.skipif(ops.instruction_set() == "amx", reason="tiles add up in an order of their own")
@pytest.mark.parametrize("packed", PACKED, ids=NAMES)
@pytest.mark.parametrize(("out", "width"), [(48, 32), (35, 96), (64, 2880)])
def test_a_product_has_the_bits_of_the_dequantized_one(
    out: int, width: int, packed: WeightFormat
) -> None:
    weight, scales = grouped(packed, width).quantize(torch.randn(out, width, generator=dice(10)))
    if packed is MXFP4:  # one block that is not the fast way's
        scales[17, 0] = 1
    elif packed is INT4:  # zero points of all sizes
        scales |= torch.randint(0, 16, scales.shape, generator=dice(13), dtype=torch.int32)
    bias = torch.randn(out, generator=dice(11)).bfloat16()
    packed_table = ops.WeightTable([weight], [bias], [scales])
    whole = ops.WeightTable([packed_table.whole(0, torch.bfloat16)], [bias])
    x = torch.randn(9, width, generator=dice(12)).bfloat16()
    for rows in range(1, 10):
        got = packed_table.linear(x[:rows], offsets(rows))
        assert torch.equal(got, whole.linear(x[:rows], offsets(rows)))


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("instruction_set", ["portable", "avx2", "avx512", "avx512_bf16"])
def test_lesser_instruction_sets_compute_the_same_products(instruction_set: str) -> None:
    order = ["portable", "avx2", "avx512", "avx512_bf16", "amx"]
    if order.index(ops.instruction_set()) <= order.index(instruction_set):
        pytest.skip(f"this CPU has no more than {instruction_set}")
    chosen = "dequantized_matrix or any_company or no_number or dequantized_one"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-k", chosen, __file__],
        env={**os.environ, "FLEXPERT_CPU": instruction_set},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert "58 passed" in done.stdout, done.stdout + done.stderr


def test_a_block_whose_scale_is_no_number_gives_none() -> None:
    weight, scales = MXFP4.quantize(torch.ones(64, 128))
    scales[5, 2] = 255
    y = ops.WeightTable([weight], None, [scales]).linear(torch.ones(1, 128), offsets(1))
    assert y[0].isnan().nonzero().tolist() == [[5]]


def test_a_table_refuses_what_it_cannot_compute() -> None:
    weight, scales = MXFP4.quantize(torch.ones(64, 64))
    for wrong in (None, [scales[:, :1]], [scales.float()]):
        with pytest.raises(ValueError, match=r"mxfp4 must have scales of \[64, 2\] torch.uint8"):
            ops.WeightTable([weight], None, wrong)
    with pytest.raises(ValueError, match="does not compute with weights in fp8"):
        ops.WeightTable([FP8.quantize(torch.ones(64, 64))[0]], None, [torch.ones(1, 1)])
    with pytest.raises(ValueError, match="have no scales"):
        ops.WeightTable([torch.ones(64, 64)], None, [scales])
