"""Modules whose forward is replaced compute what they did; others are left alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.checkpoints import FAMILIES, random_model
from torch import Tensor, nn

from flexpert.kernels.cpu import ops
from flexpert.kernels.kernel_set import cpu_kernels, gpu_kernels
from flexpert.models.fused import fuse

DTYPES = [torch.float32, torch.bfloat16]


def fused(module: nn.Module) -> bool:
    return "forward" in vars(module)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_norm_of_a_family_is_replaced_and_rounds_as_before(
    family: str, dtype: torch.dtype
) -> None:
    model = random_model(family).to(dtype)
    norms = [m for m in model.modules() if type(m).__name__.endswith("RMSNorm")]
    assert norms
    with torch.inference_mode():
        fuse(model, cpu_kernels(), deterministic=False)
        for norm in norms:
            assert fused(norm)
            x = torch.randn(2, 3, norm.get_parameter("weight").shape[0]).to(dtype)
            expected = type(norm).forward(norm, x)
            rounding = 4 * torch.finfo(dtype).eps
            torch.testing.assert_close(norm(x), expected, rtol=rounding, atol=0.0)


class ShiftedNorm(nn.Module):
    """As Gemma's: the weight is what to add to one."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.1 * torch.randn(32))
        self.eps = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * (1 + self.weight)


@pytest.mark.parametrize("norm", [ShiftedNorm(), nn.LayerNorm(32), nn.LayerNorm(32, bias=False)])
def test_what_is_no_rms_norm_is_left_alone(norm: nn.Module) -> None:
    with torch.inference_mode():
        fuse(norm, cpu_kernels(), deterministic=False)
    assert not fused(norm)


def test_on_a_gpu_a_norm_that_adds_one_to_its_weight_is_one_kernel() -> None:
    pytest.importorskip("triton", reason="the GPU kernels need the package triton")
    norm, x = ShiftedNorm(), torch.randn(5, 32)
    with torch.inference_mode():
        expected = norm(x)
        fuse(norm, gpu_kernels(torch.device("cpu")), deterministic=False)
        assert fused(norm)
        torch.testing.assert_close(norm(x), expected)


@pytest.mark.skipif(
    not ops.instruction_set().startswith(("amx", "avx")),
    reason="elsewhere torch's product stays",
)
@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_layer_is_replaced_and_rounds_as_before(bias: bool) -> None:
    layer = nn.Linear(1056, 520, bias=bias).to(torch.bfloat16)
    with torch.inference_mode():
        fuse(layer, cpu_kernels(), deterministic=False)
        assert fused(layer)
        for rows in (1, 4, 5, 17, 100):
            x = torch.randn(1, rows, 1056).bfloat16()
            expected = nn.functional.linear(x, layer.weight, layer.bias)
            torch.testing.assert_close(layer(x), expected, rtol=2e-2, atol=2e-2)


def test_where_torch_is_faster_for_many_rows_or_in_a_cache_it_computes() -> None:
    calls: list[int] = []

    def kernel(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        calls.append(x.shape[0])
        return nn.functional.linear(x, weight, bias)

    kernels = replace(cpu_kernels(), linear=kernel, linear_rows=4, linear_bytes=64 * 64 * 2)
    small, large = (nn.Linear(64, n).to(torch.bfloat16) for n in (63, 64))
    threads = torch.get_num_threads()
    try:
        with torch.inference_mode():
            for layer in (small, large):
                fuse(layer, kernels, deterministic=False)
            assert not fused(small)
            for count, desired in ((1, [1, 4]), (2, [1, 2])):
                torch.set_num_threads(count)
                calls.clear()
                for rows in (1, desired[-1], desired[-1] + 1, 64):
                    large(torch.randn(rows, 64).bfloat16())
                assert calls == desired
    finally:
        torch.set_num_threads(threads)
