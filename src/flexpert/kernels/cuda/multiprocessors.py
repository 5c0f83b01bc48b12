"""How many programs a GPU runs at once."""

from __future__ import annotations

import torch


def multiprocessor_count(device: torch.device, *, interpreted: int) -> int:
    """Multiprocessors of a GPU. interpreted: the answer for a CPU, in Triton's interpreter."""
    if device.type != "cuda":
        return interpreted
    return torch.cuda.get_device_properties(device).multi_processor_count
