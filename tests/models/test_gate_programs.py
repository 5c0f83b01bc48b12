"""What stands between the products of an expert is computed row by row, as the model does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from flexpert.models.gate_programs import gate_program, gate_programs

HEIGHT = 48


def swiglu(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return functional.silu(gate) * up


def geglu(x: Tensor) -> Tensor:
    return functional.gelu(x[:, ::2], approximate="tanh") * (x[:, 1::2] + 1)


def clamped(x: Tensor) -> Tensor:
    """As gpt-oss has it."""
    gate, up = x[..., ::2].clamp(min=None, max=1.0), x[..., 1::2].clamp(min=-0.7, max=0.7)
    return (up + 1) * (gate * torch.sigmoid(gate * 1.702))


def squared(x: Tensor) -> Tensor:
    return functional.relu(x).square()


@pytest.mark.parametrize("gate", [swiglu, geglu, clamped, squared])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gate_gives_a_row_what_the_model_gives_it_in_any_company(
    gate: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> None:
    program = gate_program(gate, HEIGHT, dtype)
    assert program is not None
    x = torch.randn((33, HEIGHT)).to(dtype)
    found = program(x)
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(found, gate(x), rtol=3 * rounding, atol=rounding)
    for begin, end in ((0, 1), (5, 22), (32, 33), (4, 4)):
        assert torch.equal(program(x[begin:end].contiguous()), found[begin:end])


def test_in_bfloat16_a_swiglu_has_torchs_bits() -> None:
    """Of all numbers whose result is not next to nothing."""
    numbers = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    numbers = numbers[(numbers.abs() < 80) & numbers.isfinite()]
    x = torch.stack([numbers, torch.full_like(numbers, 0.5)], dim=1).repeat_interleave(8, dim=1)
    program = gate_program(swiglu, 16, torch.bfloat16)
    assert program is not None
    assert torch.equal(program(x), swiglu(x))


@pytest.mark.parametrize(
    "gate",
    [
        lambda x: x.sort(dim=-1).values[:, :24],
        lambda x: x[:, :24] * float(x.sum()),
        lambda x: x[:, :24],
        lambda x: x.sum(0, keepdim=True) + x[:, :48],
        lambda x: functional.silu(x).t(),
    ],
)
def test_a_gate_without_kernels_of_ours_stays_the_models(gate: Callable[[Tensor], Tensor]) -> None:
    assert gate_program(gate, HEIGHT, torch.float32) is None


def test_other_dtypes_stay_the_models() -> None:
    assert gate_program(swiglu, HEIGHT, torch.float16) is None


class Experts(nn.Module):
    """As transformers' modules are: an activation, and settings."""

    def __init__(self, limit: float, act: nn.Module) -> None:
        super().__init__()
        self.limit = limit
        self.act_fn = act

    def gate(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, dim=-1)
        return self.act_fn(left.clamp(max=self.limit)) * right


def test_layers_share_a_gate_that_is_the_same_and_no_other() -> None:
    layers = [
        Experts(1.0, nn.SiLU()),
        Experts(1.0, nn.SiLU()),
        Experts(0.5, nn.SiLU()),
        Experts(1.0, nn.GELU(approximate="tanh")),
        Experts(1.0, nn.GELU()),
        Experts(1.0, nn.PReLU()),
    ]
    gates = [layer.gate for layer in layers]
    programs = gate_programs(gates, [HEIGHT] * 6, torch.float32)
    assert programs[0] is programs[1]
    assert len({id(program) for program in programs[1:5]}) == 4
    x = torch.randn((5, HEIGHT))
    for gate, program in zip(gates, programs[:5], strict=False):
        assert program is not None
        torch.testing.assert_close(program(x), gate(x), rtol=1e-5, atol=1e-6)
    assert programs[5] is None, "it has a weight, and no kernel"
    other = gate_programs(gates[:1], [2 * HEIGHT], torch.float32)[0]
    assert other is not programs[0]
