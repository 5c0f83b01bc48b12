"""Layers with a state that kernels compute are found by trying, and only those."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.checkpoints import random_model
from torch import nn

pytest.importorskip("triton", reason="the GPU kernels need the package triton")

from flexpert.kernels.kernel_set import gpu_kernels
from flexpert.models.fused_states import is_right, state_fusion
from flexpert.models.state_view import StateShape, StateView

SMALL: dict[str, dict[str, Any]] = {
    "qwen3_next": {},
    "qwen3_5_moe_text": {},
    "granitemoehybrid": {"mamba_n_heads": 4, "mamba_d_head": 36, "mamba_d_state": 16},
    "nemotron_h": {
        "mamba_num_heads": 4,
        "mamba_head_dim": 12,
        "n_groups": 2,
        "ssm_state_size": 16,
    },
}


class Layer:
    """The first one of a model that keeps states in a convolution and a recurrence."""

    def __init__(self, family: str) -> None:
        model = random_model(family, **SMALL[family])
        self.module: Any = next(m for m in model.modules() if hasattr(m, "conv1d"))
        self.hidden = torch.randn(1, 3, model.config.hidden_size)
        view = StateView()
        with torch.inference_mode():
            self.module(self.hidden, cache=view)
        self.shapes = [
            StateShape(key, tuple(state.shape[1:]), state.dtype)
            for key, state in view.states.items()
        ]

    def is_computed(self) -> bool:
        """Whether there is a kernel that does what it does."""
        kernels = gpu_kernels(torch.device("cpu")).states
        assert kernels is not None
        with torch.inference_mode():
            fused = state_fusion(self.module, self.shapes, kernels)
            return fused is not None and is_right(
                fused,
                lambda view, rows: self.module(rows, cache=view),
                self.shapes,
                self.hidden,
            )


@pytest.mark.parametrize("family", list(SMALL))
def test_a_kernel_computes_what_the_module_does(family: str) -> None:
    torch.manual_seed(0)
    assert Layer(family).is_computed()


def other_activation(module: Any) -> None:
    module.activation = "gelu"


def doubled_norm(module: Any) -> None:
    norm, before = module.norm, module.norm.forward
    norm.forward = lambda *args: 2 * before(*args)


def other_rate(module: Any) -> None:
    module.A_log = nn.Parameter(module.A_log.data + 1)
    module.forward = with_rate(module, module.A_log.data - 1)


def with_rate(module: Any, rate: torch.Tensor) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        kept, module.A_log = module.A_log, nn.Parameter(rate)
        try:
            return type(module).forward(module, *args, **kwargs)
        finally:
            module.A_log = kept

    return forward


@pytest.mark.parametrize("change", [other_activation, doubled_norm, other_rate])
@pytest.mark.parametrize("family", ["qwen3_next", "granitemoehybrid"])
def test_a_module_that_does_something_else_is_left_alone(
    family: str, change: Callable[[Any], None]
) -> None:
    torch.manual_seed(0)
    layer = Layer(family)
    change(layer.module)
    assert not layer.is_computed()


def test_a_module_of_other_parts_is_left_alone() -> None:
    layer = Layer("qwen3_next")
    del layer.module.A_log
    kernels = gpu_kernels(torch.device("cpu")).states
    assert kernels is not None
    assert state_fusion(layer.module, layer.shapes, kernels) is None
