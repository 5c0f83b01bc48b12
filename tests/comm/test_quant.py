"""fp8: the kernels do what the reference says, bit for bit, and the reference what it promises."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.comm_local import Local, dispatch
from support.comm_ranks import random_sent, spec_of

from flexpert.comm import quant
from flexpert.comm.buffer import Scales
from flexpert.comm.host._kernels import lib
from flexpert.comm.routing import expected_rows
from flexpert.comm.window_layout import DTYPES

KINDS: tuple[Scales, ...] = ("float32", "power2", "ue8m0")


def by_kernel(x: torch.Tensor, scales: Scales) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, hidden = x.shape
    out = torch.full((tokens, quant.row_bytes(hidden, scales) + 12), 255, dtype=torch.uint8)
    kind = KINDS.index(scales)
    lib.fx_quantise(
        x.data_ptr(), DTYPES[x.dtype], tokens, hidden, kind, out.data_ptr(), out.shape[1]
    )
    assert (out[:, -12:] == 255).all()
    raw = out[:, hidden:-12].contiguous()
    return (
        out[:, :hidden].contiguous().view(torch.float8_e4m3fn),
        raw.view(torch.int32 if scales == "ue8m0" else torch.float32),
    )


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def check_both(x: torch.Tensor, scales: Scales) -> None:
    q, scale = quant.quantise(x, scales)
    kernel_q, kernel_scale = by_kernel(x, scales)
    assert same(kernel_scale, scale)
    nan = q.float().isnan()
    assert torch.equal(kernel_q.float().isnan(), nan)
    assert same(kernel_q.float()[~nan].to(torch.float8_e4m3fn), q.float()[~nan].to(q.dtype))
    back = quant.dequantise(q, scale, x.dtype)
    wire = torch.cat([q.view(torch.uint8), scale.view(torch.uint8)], dim=1)
    out = torch.empty_like(x)
    lib.fx_dequantise(
        wire.data_ptr(),
        wire.shape[1],
        *x.shape,
        KINDS.index(scales),
        DTYPES[x.dtype],
        out.data_ptr(),
    )
    assert torch.equal(out.isnan(), back.isnan())
    assert same(out.nan_to_num(), back.nan_to_num())


@pytest.mark.parametrize("scales", KINDS)
@pytest.mark.parametrize("dtype", list(DTYPES), ids=str)
@given(
    seed=st.integers(0, 2**32 - 1),
    tokens=st.integers(0, 5),
    blocks=st.integers(1, 3),
    magnitude=st.floats(-45, 38),
)
def test_kernels_and_reference_agree(
    dtype: torch.dtype, scales: Scales, seed: int, tokens: int, blocks: int, magnitude: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.randn(tokens, 512 * blocks, generator=generator).clamp(-6, 6)
    x = (spread * 10.0**magnitude * torch.rand(spread.shape, generator=generator)).to(dtype)
    check_both(x, scales)


@pytest.mark.parametrize("scales", KINDS)
def test_all_bf16_there_are(scales: Scales) -> None:
    """NaN, infinities, both zeros, denormals: in order, and mixed."""
    every = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
    for order in (torch.arange(65536), torch.randperm(65536)):
        check_both(every[order].view(32, 2048).contiguous(), scales)


@pytest.mark.parametrize("scales", KINDS)
def test_every_code_survives(scales: Scales) -> None:
    """All 256 codes come back as they were where the scale is 1."""
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    x = torch.zeros(2, 512)
    x[:, :256] = codes
    x[:, [0, 128, 256, 384]] = 448.0
    q, _ = quant.quantise(x, scales)
    right = x.isnan() | (q.float() == x)
    assert right.all()
    assert torch.equal(q.float().isnan(), x.isnan())


def test_an_infinity_is_not_silently_anything_else() -> None:
    x = torch.ones(1, 512)
    x[0, 3], x[0, 200] = float("inf"), float("-inf")
    q, scale = quant.quantise(x)
    assert q.float().isnan().nonzero().tolist() == [[0, 3], [0, 200]]
    back = quant.dequantise(q, scale, torch.float32)
    assert torch.equal(back[~back.isnan()], torch.ones(510))


@pytest.mark.parametrize("scales", KINDS)
def test_the_error_is_that_of_three_bits(scales: Scales) -> None:
    x = torch.randn(8, 1024)
    q, scale = quant.quantise(x, scales)
    error = (quant.dequantise(q, scale, torch.float32) - x).abs()
    amax = x.view(8, 8, 128).abs().amax(-1).repeat_interleave(128, 1)
    assert (error <= x.abs() / 16 + amax * 2.0**-17).all()


def test_power2_scales_are_powers_of_two_and_no_smaller() -> None:
    x = torch.randn(64, 512)
    x[0] = 448.0  # exactly a power of two: not rounded up
    _, exact = quant.quantise(x)
    _, power = quant.quantise(x, "power2")
    assert (torch.frexp(power).mantissa == 0.5).all()
    assert ((power >= exact) & (power < 2 * exact)).all()
    assert (power[0] == 1.0).all()
    _, packed = quant.quantise(x, "ue8m0")
    assert torch.equal(packed.view(torch.uint8).int() << 23, power.view(torch.int32))


@pytest.mark.parametrize(
    ("hidden", "scales", "message"),
    [(100, "float32", "multiple of 128"), (640, "ue8m0", "multiple of 512"), (512, "x", "must be")],
)
def test_sizes_without_whole_blocks_are_refused(hidden: int, scales: Scales, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quant.check(hidden, scales)


@pytest.mark.parametrize("scales", KINDS)
def test_a_dispatch_brings_what_the_reference_makes(local: Local, scales: Scales) -> None:
    spec = spec_of(3, hidden=1024)
    ids = (0, 1, 2)
    local.start(spec, ids)
    local.activate(ids)
    for seed in range(3):
        sent = random_sent(spec, ids, seed)
        got = local.each(
            ids,
            lambda b, sent=sent: b.dispatch(  # type: ignore[misc]
                sent[b.rank].x,
                sent[b.rank].expert_ids,
                sent[b.rank].weights,
                sent[b.rank].table,
                fp8=scales,
            ),
        )
        for rank, received in got.items():
            rows, _, _ = expected_rows(sent, rank)
            q, scale = quant.quantise(rows, scales)
            assert same(received.x, q)
            assert received.scales is not None
            assert same(received.scales, scale)
        local.each(ids, lambda b, got=got: b.combine(b.combine_input(got[b.rank]), got[b.rank]))  # type: ignore[misc]


def test_bytes_cannot_be_quantised(local: Local) -> None:
    spec = spec_of(1, hidden=128)
    buffer = local.start(spec, [0])[0]
    s = random_sent(spec, (0,), 1)[0]
    with pytest.raises(ValueError, match="bytes already"):
        buffer.dispatch(s.x.view(torch.uint8), s.expert_ids, s.weights, s.table, fp8="float32")
    dispatch(buffer, s)
