"""NVIDIA's nixl_ep on a CPU or a GPU; see docs/nixl_ep.md. `flexpert.compat.install_nixl_ep`
names it so.
"""

from __future__ import annotations

import torch

from flexpert.compat.nixl_ep.buffer import DEFAULT_TIMEOUT_MS, Buffer
from flexpert.compat.nixl_ep.tuning import Config
from flexpert.compat.nixl_ep.utils import EventOverlap

topk_idx_t = torch.int64

__all__ = ["DEFAULT_TIMEOUT_MS", "Buffer", "Config", "EventOverlap", "topk_idx_t"]
