"""Which captured graph computes a batch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flexpert.engine.warm_up import with_shared
from flexpert.kernels.step_shapes import FEW_TOKENS
from flexpert.models.batch import ForwardBatch
from flexpert.models.step_graphs import GraphShape, StepGraphs


def decoding(sequences: int, *, shares: bool) -> ForwardBatch:
    each = torch.arange(sequences)
    return ForwardBatch(
        token_ids=each,
        positions=each,
        query_start=torch.arange(sequences + 1, dtype=torch.int32),
        context_len=torch.ones(sequences, dtype=torch.int32),
        block_tables=torch.zeros((sequences, 1), dtype=torch.int32),
        slot_mapping=each,
        sample_rows=each,
        shares=shares,
    )


@pytest.mark.parametrize("speculates", [False, True])
def test_rows_of_one_sequence_are_kept_from_kernels_that_do_not_wait_for_each_other(
    speculates: bool,
) -> None:
    seen: list[tuple[int, bool]] = []

    def walk(batch: ForwardBatch) -> Tensor:
        seen.append((batch.token_ids.shape[0], batch.shares))
        return torch.zeros((batch.sample_rows.shape[0], 3))

    shapes = [GraphShape(size, size) for size in (1, 2, FEW_TOKENS, 2 * FEW_TOKENS)]
    if speculates:
        shapes = with_shared(shapes)
    graphs = StepGraphs(walk, shapes=shapes, max_blocks=1, device=torch.device("cpu"))
    assert graphs.captures == len(shapes) == (7 if speculates else 4)
    for sequences in (1, 2, 3, FEW_TOKENS + 1):
        for shares in (False, True):
            batch = decoding(sequences, shares=shares)
            assert graphs.fits(batch) == (speculates or not shares)
            if graphs.forward(batch) is not None:
                rows, shared = seen[-1]
                assert rows == 1 << (sequences - 1).bit_length()
                assert shared == (shares or (speculates and rows > FEW_TOKENS))
