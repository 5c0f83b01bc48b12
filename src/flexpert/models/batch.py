"""What one forward pass computes: sequences packed into one row of tokens."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(slots=True)
class ForwardBatch:
    """S sequences packed into N tokens; a sequence's tokens are consecutive and its last ones.

    token_ids: [N] int64.
    positions: [N] int64, of each token in its sequence.
    query_start: [S + 1] int32; tokens of sequence s are query_start[s] … query_start[s+1]-1.
    context_len: [S] int32, tokens in the KV cache after this step.
    block_tables: [S, max_blocks] int32, blocks of each sequence; only those in use are read.
    slot_mapping: [N] int64, block * block_size + offset where a token's KV goes.
    sample_rows: [M] int64, rows whose logits are desired.
    """

    token_ids: Tensor
    positions: Tensor
    query_start: Tensor
    context_len: Tensor
    block_tables: Tensor
    slot_mapping: Tensor
    sample_rows: Tensor

    def to(self, device: torch.device) -> ForwardBatch:
        """The same on a device; itself if it is there."""
        if self.token_ids.device == device:
            return self
        return ForwardBatch(*(getattr(self, field.name).to(device) for field in fields(self)))
