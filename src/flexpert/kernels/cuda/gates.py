"""The gate of GPT-OSS in one launch; by torch it is seven, each as long as a small product."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexpert.kernels.experts import Gate

_COLUMNS = 1024


@triton.jit
def _clamped_swiglu(pairs, out, rows, inter, alpha, limit, COLUMNS: tl.constexpr):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    ok = column < inter
    row = tl.program_id(1).to(tl.int64)
    last = tl.load(rows)
    while row < last:
        at = pairs + row * 2 * inter + 2 * column
        gate = tl.minimum(tl.load(at, mask=ok, other=0.0).to(tl.float32), limit)
        up = tl.load(at + 1, mask=ok, other=0.0).to(tl.float32)
        up = tl.minimum(tl.maximum(up, -limit), limit)
        y = (up + 1.0) * gate * tl.sigmoid(gate * alpha)
        tl.store(out + row * inter + column, y.to(out.dtype.element_ty), mask=ok)
        row += tl.num_programs(1)


def clamped_swiglu(
    pairs: Tensor, rows: Tensor, alpha: float, limit: float, *, programs: int
) -> Tensor:
    """(up + 1) · gate · sigmoid(alpha · gate), with gate at most `limit` and up within it.

    Args:
        pairs: [most, 2 * inter], contiguous; gate and up in turn.
        rows: [1] int32 on the device: how many of them count.
        programs: take the rows in turn.

    Returns:
        [most, inter] of its dtype, rounded once; what does not count is unset.
    """
    most, inter = pairs.shape[0], pairs.shape[1] // 2
    out = pairs.new_empty((most, inter))
    if most:
        grid = (triton.cdiv(inter, _COLUMNS), programs)
        _clamped_swiglu[grid](pairs, out, rows, inter, alpha, limit, COLUMNS=_COLUMNS)
    return out


def clamped_swiglu_of(apply_gate: Gate) -> tuple[float, float] | None:
    """(alpha, limit) where a gate is `clamped_swiglu`, as of transformers' GptOssExperts; found by
    trying what its module says. None: it is another one."""
    module = getattr(apply_gate, "__self__", None)
    alpha, limit = getattr(module, "alpha", None), getattr(module, "limit", None)
    if not isinstance(alpha, int | float) or not isinstance(limit, int | float):
        return None
    dice = torch.Generator(device="cpu").manual_seed(0)
    x = torch.randn((4, 64), generator=dice, dtype=torch.float32, device="cpu") * 8
    gate, up = x[:, ::2].clamp(max=limit), x[:, 1::2].clamp(-limit, limit)
    desired = (up + 1) * gate * torch.sigmoid(gate * alpha)
    try:
        y = apply_gate(x)
    except (RuntimeError, TypeError, ValueError):  # it wants something else to work on
        return None
    same = y.shape == desired.shape and torch.allclose(y, desired, rtol=1e-5, atol=1e-6)
    return (float(alpha), float(limit)) if same else None
