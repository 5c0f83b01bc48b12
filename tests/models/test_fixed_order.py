"""What `--deterministic` leaves to torch on a GPU: nothing that sums in an order of the batch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flexpert.errors import UnsupportedModel

pytest.importorskip("triton", reason="the GPU kernels need the package triton")

from flexpert.kernels.kernel_set import FixedOrderKernels, fixed_order_gpu_kernels
from flexpert.models.fixed_order import FixedOrderMode, check_fixed_order


class Layer(nn.Module):
    def __init__(self, compute: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.compute = compute

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(x)


WEIGHT = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
ORDERED: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda x: F.linear(x, WEIGHT),
    "product": lambda x: x @ WEIGHT.t(),
    "outer product": lambda x: x[:, :, None] @ WEIGHT[:1, None],
    "mean of squares": lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6),
    "weights": lambda x: x / x.sum(dim=-1, keepdim=True),
    "softmax": lambda x: F.softmax(x, dim=1, dtype=torch.float32),
    "layer norm": lambda x: F.layer_norm(x, (8,), WEIGHT[0], WEIGHT[1], 1e-6),
    "choice": lambda x: x.gather(1, x.topk(2, dim=-1).indices),
    "gate": lambda x: F.silu(x[:, :4]) * x[:, 4:],
}
UNORDERED: dict[str, Callable[[Tensor], Tensor]] = {
    "layer_norm": lambda x: F.layer_norm(x, (6, 8)),
    "bmm": lambda x: torch.bmm(x[None], x.t()[None]),
    "sum": lambda x: x.sum(0),
    "mean": lambda x: x.mean(),
    "cumsum": lambda x: x.cumsum(-1),
    "linalg_vector_norm": lambda x: x.norm(dim=-1),
    "addmm": lambda x: torch.addmm(WEIGHT[:, 0], x, WEIGHT.t()),
}


@pytest.fixture(scope="module")
def kernels() -> FixedOrderKernels:
    fixed = fixed_order_gpu_kernels(torch.device("cpu")).fixed_order
    assert fixed is not None
    return fixed


def walked(model: nn.Module, kernels: FixedOrderKernels) -> Tensor:
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))
    results = []

    def walk() -> None:
        with torch.inference_mode(), FixedOrderMode(kernels, interpreted=True):
            results.append(model(x))

    check_fixed_order(model, walk)
    torch.testing.assert_close(results[0], model(x))
    return results[0]


@pytest.mark.parametrize("name", ORDERED)
def test_what_has_an_order_of_a_row_is_computed(name: str, kernels: FixedOrderKernels) -> None:
    walked(nn.Sequential(Layer(ORDERED[name])), kernels)


@pytest.mark.parametrize("name", UNORDERED)
def test_what_torch_would_sum_is_refused_with_its_module(
    name: str, kernels: FixedOrderKernels
) -> None:
    with pytest.raises(UnsupportedModel, match=rf"{name} in 1 \(Layer\)"):
        walked(nn.Sequential(Layer(F.silu), Layer(UNORDERED[name])), kernels)


def test_products_of_two_types_are_refused(kernels: FixedOrderKernels) -> None:
    with pytest.raises(UnsupportedModel, match="one type"):
        walked(nn.Sequential(Layer(lambda x: F.linear(x, WEIGHT.bfloat16()))), kernels)
