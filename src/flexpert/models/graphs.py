"""Decode steps as captured CUDA graphs, one for each batch size, replayed without the host.

What changes from step to step (tokens, positions, block tables, who holds which expert) lies in
device memory of a fixed place that is rewritten before a replay. So a graph is captured once in the
life of a rank: joins, leaves and moves of experts replay the same one, and `captures` stays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flexpert.models.batch import ForwardBatch

Walk = Callable[[ForwardBatch], Tensor]


@dataclass(frozen=True, slots=True)
class _Inputs:
    """Views of one step's inputs in the staging memory; slot of padding is -1, its context 0."""

    token_ids: Tensor
    positions: Tensor
    slot_mapping: Tensor
    context_len: Tensor
    block_tables: Tensor
    nbytes: int

    @classmethod
    def of(cls, memory: Tensor, size: int, max_blocks: int) -> _Inputs:
        """memory: [bytes] uint8."""
        end = 0

        def take(count: int, dtype: torch.dtype) -> Tensor:
            nonlocal end
            begin, end = end, end + count * dtype.itemsize
            return memory[begin:end].view(dtype)

        return cls(
            take(size, torch.int64),
            take(size, torch.int64),
            take(size, torch.int64),
            take(size, torch.int32),
            take(size * max_blocks, torch.int32).view(size, max_blocks),
            end,
        )


@dataclass(frozen=True, slots=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    host: _Inputs
    logits: Tensor


class DecodeGraphs:
    """See the module's docstring; used by one thread, in inference mode.

    Args:
        walk: a batch on the device → [M, vocab] logits, without waiting for the device.
        sizes: of batches, in sequences.
        max_blocks: KV blocks of the longest sequence.
        device: a GPU.

    Attributes:
        captures: graphs captured so far.
    """

    def __init__(
        self, walk: Walk, *, sizes: Sequence[int], max_blocks: int, device: torch.device
    ) -> None:
        self.captures = 0
        self._max_blocks = max_blocks
        room = max(sizes) * (3 * 8 + 4 + 4 * max_blocks)
        self._host = torch.zeros(room, dtype=torch.uint8, pin_memory=True)
        self._device = torch.zeros(room, dtype=torch.uint8, device=device)
        self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()
        self._captured: dict[int, _Captured] = {}
        # the largest first: the others find room in its memory
        for size in sorted(set(sizes), reverse=True):
            self._captured[size] = self._capture(walk, size)
        self._sizes = sorted(self._captured)

    def _capture(self, walk: Walk, size: int) -> _Captured:
        device = self._device.device
        inputs = _Inputs.of(self._device, size, self._max_blocks)
        self._device.zero_()
        inputs.slot_mapping.fill_(-1)
        count = torch.arange(size + 1, device=device)
        batch = ForwardBatch(
            token_ids=inputs.token_ids,
            positions=inputs.positions,
            query_start=count.int(),
            context_len=inputs.context_len,
            block_tables=inputs.block_tables,
            slot_mapping=inputs.slot_mapping,
            sample_rows=count[:size].clone(),
        )
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            walk(batch)  # compiles what is still to be compiled
        torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # thread_local: another thread may load weights meanwhile
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            logits = walk(batch)
        self.captures += 1
        return _Captured(graph, _Inputs.of(self._host, size, self._max_blocks), logits)

    def fits(self, batch: ForwardBatch) -> bool:
        """Whether a batch on the host is a decode step that a graph was captured for."""
        tokens = batch.token_ids.shape[0]
        return (
            0 < tokens <= self._sizes[-1]
            and tokens == batch.context_len.shape[0] == batch.sample_rows.shape[0]
            and batch.block_tables.shape[1] <= self._max_blocks
        )

    def forward(self, batch: ForwardBatch) -> Tensor:
        """[tokens, vocab] logits of a batch that `fits`, valid until the next call."""
        tokens, width = batch.block_tables.shape
        size = next(size for size in self._sizes if size >= tokens)
        captured = self._captured[size]
        inputs = captured.host
        self._copied.synchronize()  # what lies there has been read
        inputs.token_ids[:tokens] = batch.token_ids
        inputs.positions[:tokens] = batch.positions
        inputs.slot_mapping[:tokens] = batch.slot_mapping
        inputs.slot_mapping[tokens:] = -1
        inputs.context_len[:tokens] = batch.context_len
        inputs.context_len[tokens:] = 0
        inputs.block_tables[:tokens, :width] = batch.block_tables
        count = inputs.nbytes
        self._device[:count].copy_(self._host[:count], non_blocking=True)
        self._copied.record()
        captured.graph.replay()
        return captured.logits[:tokens]
