"""What callers of nixl_ep's `Buffer` can get wrong, said before anything is sent. Pure."""

from __future__ import annotations

import torch

from flexpert.comm.buffer import BufferSpec, Scales
from flexpert.compat.nixl_ep.device_exchange import VARIABLE
from flexpert.compat.nixl_ep.sizes import CHANNELS


def check_one_way(async_finish: bool, return_recv_hook: bool) -> None:
    if async_finish and return_recv_hook:
        raise ValueError("async_finish and return_recv_hook exclude each other")


def scales(use_fp8: bool, round_scale: bool, use_ue8m0: bool) -> Scales | None:
    if not use_fp8:
        return None
    if use_ue8m0 and not round_scale:
        raise ValueError("use_ue8m0 needs round_scale: an exponent is all that it keeps")
    return "ue8m0" if use_ue8m0 else "power2" if round_scale else "float32"


def check_x(
    x: torch.Tensor,
    topk_idx: torch.Tensor,
    max_tokens: int,
    fp8: Scales | None,
    spec: BufferSpec,
    at: torch.device,
) -> None:
    for name, tensor in (("x", x), ("topk_idx", topk_idx)):
        if tensor.device != at:
            raise ValueError(
                f"{name} is on {tensor.device}; this buffer takes tensors on {at} (see "
                f"{VARIABLE} in docs/nixl_ep.md)"
            )
    if x.dtype is not torch.bfloat16 or x.ndim != 2:
        raise ValueError(f"x must be [tokens, hidden] bfloat16, is {list(x.shape)} {x.dtype}")
    tokens, hidden = x.shape
    unit = {None: CHANNELS, "ue8m0": 512}.get(fp8, 128)
    if hidden == 0 or hidden % unit:
        raise ValueError(f"x has {hidden} channels, must be a multiple of {unit}")
    if hidden > spec.hidden or max_tokens > spec.max_tokens:
        raise ValueError(
            f"dispatch of up to {max_tokens} tokens of {hidden} channels, but num_rdma_bytes was a "
            f"hint for {spec.max_tokens} of {spec.hidden}: give update_memory_buffers what "
            f"Buffer.get_rdma_size_hint({max_tokens}, {hidden}, {spec.capacity}, …) returns"
        )
    if tokens > max_tokens:
        raise ValueError(f"{tokens} tokens, but num_max_dispatch_tokens_per_rank={max_tokens}")
    if topk_idx.ndim != 2 or topk_idx.shape[0] != tokens or topk_idx.shape[1] > spec.topk:
        raise ValueError(
            f"topk_idx must be [{tokens}, k], k <= {spec.topk} (flexpert's limit), is "
            f"{list(topk_idx.shape)}"
        )


def check_bound(ranks: int, active: tuple[int, ...]) -> None:
    """ranks: that a handle is for. active: sorted ids."""
    if active[-1] >= ranks:
        raise ValueError(
            f"the handle is of a dispatch for {ranks} ranks, but rank {active[-1]} was unmasked "
            "since: dispatch again, or give dispatch num_experts for all ranks that may come"
        )


def check_tensor(
    name: str, tensor: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype, at: torch.device
) -> None:
    if tensor.dtype is not dtype or tuple(tensor.shape) != shape or tensor.device != at:
        raise ValueError(
            f"{name} must be {list(shape)} {dtype} on {at}, is {list(tensor.shape)} "
            f"{tensor.dtype} on {tensor.device}"
        )


def check_waits(name: str, tensor: torch.Tensor | None, ranks: int, at: torch.device) -> None:
    if tensor is not None:
        check_tensor(name, tensor, (ranks,), torch.int64, at)


def counting_weights(
    topk_idx: torch.Tensor, weights: torch.Tensor, sent: torch.Tensor
) -> torch.Tensor:
    """[tokens, k] float32: 0 where an expert that was dispatched to is -1 by now."""
    if topk_idx.shape == sent.shape:
        same = topk_idx == sent
        if bool(same.all()):
            return weights
        if bool((same | (topk_idx < 0)).all()):
            return weights.masked_fill(topk_idx < 0, 0.0)
    raise ValueError("topk_idx names other experts than in dispatch; it may only turn some to -1")
