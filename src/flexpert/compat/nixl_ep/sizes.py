"""What a number of bytes says about the sizes of tokens.

nixl_ep sizes its memory in bytes, a window of ours in tokens and channels, and it must exist before
the first dispatch shows them. But the bytes come from `size_hint`, which was told; so this process
remembers what each of its hints was for. That needs no memory from the number itself: a window
is sparse, and takes what is written to it.
"""

from __future__ import annotations

import torch

from flexpert.comm.buffer import BufferSpec
from flexpert.comm.window_layout import size_bytes

MAX_TOPK = 32
CHANNELS = 16  # hidden is a multiple of this

_hints: dict[int, tuple[int, int]] = {}  # bytes → (max_tokens, hidden), in the order of the calls


def spec_of(num_ranks: int, max_tokens: int, hidden: int) -> BufferSpec:
    return BufferSpec(num_ranks, max_tokens, hidden, MAX_TOPK, torch.bfloat16)


def size_hint(max_tokens: int, hidden: int, num_ranks: int) -> int:
    """Bytes for `update_memory_buffers`: the most that a window can take.

    Raises: ValueError: sizes that no window can have.
    """
    if hidden % CHANNELS:
        raise ValueError(f"hidden is {hidden}, must be a multiple of {CHANNELS}")
    size = size_bytes(spec_of(num_ranks, max_tokens, hidden))
    _hints.pop(size, None)
    _hints[size] = max_tokens, hidden
    return size


def spec_from_bytes(num_rdma_bytes: int, num_ranks: int) -> BufferSpec:
    """The sizes of the hint with this number, or else of the last one that is smaller.

    Raises: ValueError: there was no such hint, or num_ranks is out of range.
    """
    fitting = [hint for hint in _hints if hint <= num_rdma_bytes]
    if not fitting:
        raise ValueError(
            f"num_rdma_bytes={num_rdma_bytes} does not tell how large tokens are. Pass what "
            "Buffer.get_rdma_size_hint(num_max_dispatch_tokens_per_rank, hidden, num_ranks, "
            "num_experts) returns in this process"
        )
    hint = num_rdma_bytes if num_rdma_bytes in _hints else fitting[-1]
    return spec_of(num_ranks, *_hints[hint])
