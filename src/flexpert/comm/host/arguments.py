"""What callers give to a HostBuffer, checked. Pure."""

from __future__ import annotations

import math

import torch

from flexpert.comm.buffer import BufferSpec, Channel, OnTimeout
from flexpert.comm.window_layout import check_spec

FOREVER_NS = 2**62


def check_settings(
    rank: int, spec: BufferSpec, timeout_s: float, on_timeout: OnTimeout, channel: Channel
) -> None:
    """Raises: ValueError"""
    check_spec(spec)
    if not 0 <= rank < spec.capacity:
        raise ValueError(f"rank is {rank}, must be 0 to {spec.capacity - 1}")
    for name, value, allowed in (
        ("on_timeout", on_timeout, ("raise", "mask")),
        ("channel", channel, ("auto", "shm", "nixl")),
    ):
        if value not in allowed:
            raise ValueError(f"{name} is {value!r}, must be one of {', '.join(allowed)}")
    limit_ns(timeout_s)


def limit_ns(limit_s: float) -> int:
    """Raises: ValueError: negative, infinite or no number."""
    if not limit_s >= 0 or math.isinf(limit_s):
        raise ValueError(f"a time limit must be a number of seconds, is {limit_s}")
    return min(int(limit_s * 1e9), FOREVER_NS)


def check_rows(name: str, tensor: torch.Tensor, rows: int, spec: BufferSpec) -> None:
    """tensor: to be [rows, hidden] spec.dtype. Raises: ValueError"""
    if (
        tensor.dtype is not spec.dtype
        or tensor.ndim != 2
        or tensor.shape[0] != rows
        or tensor.shape[1] != spec.hidden
        or not tensor.is_contiguous()
    ):
        raise ValueError(
            f"{name} must be [{rows}, {spec.hidden}] {spec.dtype}, contiguous; "
            f"is {list(tensor.shape)} {tensor.dtype}"
        )


def check_weights(weights: torch.Tensor, shape: tuple[int, int], *, home: bool) -> None:
    """weights: given to combine; to be [tokens, k] float32. Raises: ValueError"""
    if not home:
        raise ValueError("weights at combine need reduce='home'")
    if weights.dtype is not torch.float32 or weights.shape != shape:
        raise ValueError(
            f"weights must be {list(shape)} float32, is {list(weights.shape)} {weights.dtype}"
        )
