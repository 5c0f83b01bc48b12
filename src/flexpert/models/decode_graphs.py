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

from flexpert.kernels.device_stream import Replay, stream_of
from flexpert.models.batch import ForwardBatch

Walk = Callable[[ForwardBatch], Tensor]


@dataclass(frozen=True, slots=True)
class StepInputs:
    """Views of one step's inputs in a piece of memory.

    token_ids, sources, positions, slot_mapping: [size] int64; context_len: [size] int32;
    block_tables: [size, max_blocks] int32. nbytes: of all of them, from the begin of the memory.
    """

    token_ids: Tensor
    sources: Tensor
    positions: Tensor
    slot_mapping: Tensor
    context_len: Tensor
    block_tables: Tensor
    nbytes: int

    @staticmethod
    def bytes_for(size: int, max_blocks: int) -> int:
        """Bytes of memory for `size` sequences."""
        return size * (4 * 8 + 4 + 4 * max_blocks)

    @classmethod
    def over(cls, memory: Tensor, size: int, max_blocks: int) -> StepInputs:
        """memory: [at least `bytes_for`] uint8."""
        end = 0

        def take(count: int, dtype: torch.dtype) -> Tensor:
            nonlocal end
            begin, end = end, end + count * dtype.itemsize
            return memory[begin:end].view(dtype)

        return cls(
            take(size, torch.int64),
            take(size, torch.int64),
            take(size, torch.int64),
            take(size, torch.int64),
            take(size, torch.int32),
            take(size * max_blocks, torch.int32).view(size, max_blocks),
            end,
        )

    def fill(self, batch: ForwardBatch | None) -> None:
        """Put a batch of at most `size` sequences here; padding writes and reads no KV."""
        tokens = 0
        self.sources.fill_(-1)
        if batch is not None:
            tokens, width = batch.block_tables.shape
            self.token_ids[:tokens] = batch.token_ids
            self.positions[:tokens] = batch.positions
            self.slot_mapping[:tokens] = batch.slot_mapping
            self.context_len[:tokens] = batch.context_len
            self.block_tables[:tokens, :width] = batch.block_tables
            if batch.sources is not None:
                self.sources[:tokens] = batch.sources
        # the memory has held batches of other sizes: what lies here now may be no token at all
        self.token_ids[tokens:] = 0
        self.positions[tokens:] = 0
        self.slot_mapping[tokens:] = -1
        self.context_len[tokens:] = 0


@dataclass(frozen=True, slots=True)
class _Captured:
    """batch: what the graph reads; kept, because its memory must not go to anybody else."""

    batch: ForwardBatch
    host: StepInputs
    replay: Replay
    logits: Tensor


class DecodeGraphs:
    """See the module's docstring; used by one thread, in inference mode.

    Args:
        walk: a batch on the device → [M, vocab] logits, without waiting for the device.
        sizes: of batches, in sequences. For each, a step of as many tokens has been computed that
            chose the same kernels.
        max_blocks: KV blocks of the longest sequence.
        device: of the model and what it computes with.

    Attributes:
        captures: graphs captured so far.
    """

    def __init__(
        self, walk: Walk, *, sizes: Sequence[int], max_blocks: int, device: torch.device
    ) -> None:
        self.captures = 0
        self._max_blocks = max_blocks
        most = StepInputs.bytes_for(max(sizes), max_blocks)
        self._stream = stream_of(device)
        self._host = self._stream.host_buffer(most)
        self._device = torch.zeros(most, dtype=torch.uint8, device=device)
        self._copied = self._stream.event()  # the device has read what lies on the host
        self._pool = self._stream.graph_pool()
        self._captured: dict[int, _Captured] = {}
        # the largest first: the others fit into its memory
        for size in sorted(set(sizes), reverse=True):
            self._captured[size] = self._capture(walk, size)
        self._sizes = sorted(self._captured)

    def _capture(self, walk: Walk, size: int) -> _Captured:
        device = self._device.device
        inputs = StepInputs.over(self._device, size, self._max_blocks)
        inputs.fill(None)
        count = torch.arange(size + 1, device=device)
        batch = ForwardBatch(
            token_ids=inputs.token_ids,
            positions=inputs.positions,
            query_start=count.int(),
            context_len=inputs.context_len,
            block_tables=inputs.block_tables,
            slot_mapping=inputs.slot_mapping,
            sample_rows=count[:size].clone(),
            sources=inputs.sources,
        )
        # the largest is computed once; that and the steps before have loaded all kernels
        warm = bool(self._captured)
        replay, logits = self._stream.capture(lambda: walk(batch), self._pool, warm=warm)
        self.captures += 1
        host = StepInputs.over(self._host, size, self._max_blocks)
        return _Captured(batch, host, replay, logits)

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
        tokens = batch.token_ids.shape[0]
        captured = self._captured[next(size for size in self._sizes if size >= tokens)]
        self._replay(captured, batch)
        return captured.logits[:tokens]

    def idle(self) -> None:
        """A step without tokens."""
        self._replay(self._captured[self._sizes[0]], None)

    def _replay(self, captured: _Captured, batch: ForwardBatch | None) -> None:
        self._copied.synchronize()
        captured.host.fill(batch)
        count = captured.host.nbytes
        self._device[:count].copy_(self._host[:count], non_blocking=True)
        self._copied.record()
        captured.replay()
