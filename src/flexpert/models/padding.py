"""Rounds the size of a batch up, so that few shapes of products occur.

oneDNN compiles and keeps a kernel for every number of rows it meets: with sizes from 1 to 256 that
cost 490 MiB and three times the time of the products themselves here, with these sizes 23 MiB.
Padding rows are computed and thrown away; they reach neither the KV cache nor the experts.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from flexpert.models.batch import ForwardBatch


def padded_size(rows: int) -> int:
    """The least of 1, 2, 4, 8, 16, 24, … 64, 96, … 256, 320, … that holds `rows`."""
    if rows <= 8:
        return 1 << max(rows - 1, 0).bit_length()
    unit = 8 if rows <= 64 else 32 if rows <= 256 else 64
    return -(-rows // unit) * unit


def padded_sizes(most: int) -> list[int]:
    """All sizes that batches of 1 … most rows are padded to."""
    return sorted({padded_size(rows) for rows in range(1, most + 1)})


def pad_rows(x: Tensor, rows: int) -> Tensor:
    """x: [n, …] → [rows, …], zeros behind."""
    missing = rows - x.shape[0]
    return F.pad(x, (0, 0) * (x.ndim - 1) + (0, missing)) if missing else x


def pad_batch(batch: ForwardBatch) -> tuple[Tensor, Tensor, Tensor]:
    """(token_ids, positions, sample_rows) of a batch, each in a padded size."""
    tokens = padded_size(batch.token_ids.shape[0])
    samples = padded_size(batch.sample_rows.shape[0])
    return (
        pad_rows(batch.token_ids, tokens),
        pad_rows(batch.positions, tokens),
        pad_rows(batch.sample_rows, samples) if batch.sample_rows.shape[0] else batch.sample_rows,
    )


def exact_batch(batch: ForwardBatch) -> tuple[Tensor, Tensor, Tensor]:
    """The same without padding."""
    return batch.token_ids, batch.positions, batch.sample_rows
