"""NVIDIA's nixl_ep on a CPU or a GPU; see docs/nixl_ep.md. `flexpert.comm.nixl_ep.install`
names it so.
"""

from __future__ import annotations

import torch

from flexpert.comm.nixl_ep.compat.buffer import DEFAULT_TIMEOUT_MS, Buffer
from flexpert.comm.nixl_ep.compat.config import Config
from flexpert.comm.nixl_ep.compat.utils import EventOverlap

topk_idx_t = torch.int64

__all__ = ["DEFAULT_TIMEOUT_MS", "Buffer", "Config", "EventOverlap", "topk_idx_t"]
