"""The interface of NVIDIA's nixl_ep over our buffers, on a CPU or a GPU; see docs/nixl_ep.md.

`flexpert.compat.install_nixl_ep` has `import nixl_ep` find it. `flexpert.comm.nixl_ep` is the
opposite, NVIDIA's kernels behind our interface; nothing here imports it.
"""

from __future__ import annotations

import torch

from flexpert.compat.nixl_ep.buffer import DEFAULT_TIMEOUT_MS, Buffer
from flexpert.compat.nixl_ep.tuning import Config
from flexpert.compat.nixl_ep.utils import EventHandle, EventOverlap

topk_idx_t = torch.int32  # as in NVIDIA's wheels; calls take int64 as well

__all__ = ["DEFAULT_TIMEOUT_MS", "Buffer", "Config", "EventHandle", "EventOverlap", "topk_idx_t"]
