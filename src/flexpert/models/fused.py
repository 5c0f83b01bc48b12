"""Puts our kernels where a model's small modules would call many of torch's.

While decoding, a rank computes few rows, and the time goes to calls: torch's product takes 20 µs
of preparation for 5 µs of work, an RMS norm is six operations. Both kinds of module occur in every
family. What a linear layer is, torch says; what a norm computes, we find out by trying it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flexpert.kernels.cpu import ops
from flexpert.kernels.kernel_set import Kernels, LinearKernel, NormKernel
from flexpert.models import recording
from flexpert.models.deterministic import outside_modes
from flexpert.models.fusion_verdicts import FusionVerdicts, NormFusion, VerdictLedger

LIBRARY_ROWS: Final = 64
"""From here on a product goes to torch if that may use more than our one thread, even with AMX."""

_FORMS: Final = (NormFusion(early=True), NormFusion(early=False), NormFusion(False, shifted=True))
_TRIAL_ROWS: Final = 64
_MOST_DIFFERENT: Final = 0.01  # share of elements; sums in another order round some otherwise


def fuse(
    model: nn.Module,
    kernels: Kernels,
    *,
    deterministic: bool,
    known: FusionVerdicts = MappingProxyType({}),
) -> FusionVerdicts:
    """Replace the forward of the modules of a loaded model that our kernels compute as well.

    Args:
        kernels: for the device that the model is on.
        known: what was found of such a model before; norms that it names are not tried.

    Returns: what holds for its norms.
    """
    linear, norm = kernels.linear, kernels.rms_norm
    ledger = VerdictLedger(known)
    for name, module in model.named_modules():
        if type(module) is nn.Linear:
            if linear is not None and _fits_kernel(module.weight, kernels.linear_bytes):
                _replace(module, _linear(module, linear, kernels.linear_rows, deterministic))
        elif (eps := epsilon(module)) is not None:
            forms = _FORMS if kernels.wide_norms else _FORMS[:2]
            attempt = functools.partial(_try_norm, module, eps, norm, forms)
            if (found := ledger.settle(name, module, NormFusion, attempt)) is not None:
                _replace(module, FusedNorm.of(module, eps, norm, found))
    return ledger.found


def _replace(module: nn.Module, forward: Callable[[Tensor], Tensor]) -> None:
    vars(module)["forward"] = forward


def _fits_kernel(weight: Tensor, least: int) -> bool:
    return weight.dtype == torch.bfloat16 and weight.is_contiguous() and weight.nbytes >= least


def _linear(
    module: nn.Linear, kernel: LinearKernel, most: int | None, deterministic: bool
) -> Callable[[Tensor], Tensor]:
    weight, bias = module.weight.data, None if module.bias is None else module.bias.data

    def forward(input: Tensor) -> Tensor:
        if (noting := recording.current()) is not None and input.dtype == weight.dtype:
            return noting.linear(input, weight, bias)
        if deterministic:
            with outside_modes():
                return kernel(input, weight, bias)
        if input.dtype != weight.dtype or is_torchs(input.numel() // weight.shape[1], most):
            return F.linear(input, weight, bias)
        return kernel(input, weight, bias)

    return forward


def is_torchs(rows: int, most: int | None) -> bool:
    """Whether a product is faster in torch. most: see `Kernels.linear_rows`."""
    threads = torch.get_num_threads()
    if most is None:
        return rows >= LIBRARY_ROWS and threads > 1
    return rows * threads > most


def epsilon(module: nn.Module) -> float | None:
    """Epsilon of a module that looks like an RMS norm: its only tensor is a vector, `weight`."""
    weight = module._parameters.get("weight")
    if (
        len(module._parameters) != 1
        or weight is None
        or weight.ndim != 1
        or weight.dtype not in ops.DTYPES
        or module._buffers
        or module._modules
        or module._forward_hooks
        or module._forward_pre_hooks
        or len(inspect.signature(type(module).forward).parameters) != 2  # gated norms take a gate
    ):
        return None
    for name in ("variance_epsilon", "eps", "epsilon"):
        eps = getattr(module, name, None)
        if isinstance(eps, float):
            return eps
    return None


@dataclass(frozen=True, slots=True, eq=False)
class FusedNorm:
    """The forward of an RMS norm. weight: [n], float32 if it is more than the module's own by one;
    dtype: of the rows; eps, early: see `ops.rms_norm`."""

    module: nn.Module
    weight: Tensor
    dtype: torch.dtype
    eps: float
    kernel: NormKernel
    early: bool

    @classmethod
    def of(cls, module: nn.Module, eps: float, kernel: NormKernel, form: NormFusion) -> FusedNorm:
        own = module.get_parameter("weight").data
        weight = 1.0 + own.float() if form.shifted else own.contiguous()
        return cls(module, weight, own.dtype, eps, kernel, form.early)

    def __call__(self, hidden_states: Tensor) -> Tensor:
        x, weight = hidden_states, self.weight
        with outside_modes():
            if x.dtype == self.dtype and x.shape[-1] == weight.shape[0]:
                if (noting := recording.current()) is not None:
                    return noting.norm(self.kernel, x, weight, self.eps, early=self.early)
                return self.kernel(x, weight, self.eps, early=self.early)
        result: Tensor = type(self.module).forward(self.module, x)
        return result


def _try_norm(
    module: nn.Module, eps: float, kernel: NormKernel, forms: Sequence[NormFusion]
) -> NormFusion | None:
    return next((form for form in forms if _is_norm(module, eps, kernel, form)), None)


def _is_norm(module: nn.Module, eps: float, kernel: NormKernel, form: NormFusion) -> bool:
    """Does the module compute what our kernel does, but for rounding?"""
    weight = module.get_parameter("weight").data
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((_TRIAL_ROWS, weight.shape[0]), generator=generator)
    x *= torch.logspace(-4, 2, _TRIAL_ROWS).unsqueeze(1)  # small rows show epsilon
    x = x.to(weight.device, weight.dtype)
    ours = FusedNorm.of(module, eps, kernel, form)(x)
    try:
        theirs = type(module).forward(module, x)
    except (TypeError, RuntimeError, ValueError):
        return False  # it wants something else to work on
    if not isinstance(theirs, Tensor) or theirs.dtype != ours.dtype or theirs.shape != ours.shape:
        return False
    rounding = 4 * torch.finfo(ours.dtype).eps
    if not torch.allclose(ours.float(), theirs.float(), rtol=rounding, atol=0.0):
        return False
    if ours.dtype == torch.float32:
        return True
    return bool((ours != theirs).float().mean() <= _MOST_DIFFERENT)
