"""Decode steps as captured CUDA graphs, one for each batch size, replayed without the host.

What changes from step to step (tokens, positions, block tables, who holds which expert) lies in
device memory of a fixed place that is rewritten before a replay. So a graph is captured once in the
life of a rank: joins, leaves and moves of experts replay the same one, and `captures` stays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flexpert.models.batch import ForwardBatch

Walk = Callable[[ForwardBatch], Tensor]
Replay = Callable[[], object]


@dataclass(frozen=True, slots=True)
class StepInputs:
    """Views of one step's inputs in a piece of memory.

    token_ids, positions, slot_mapping: [size] int64; context_len: [size] int32; block_tables:
    [size, max_blocks] int32. nbytes: of all of them, from the begin of the memory.
    """

    token_ids: Tensor
    positions: Tensor
    slot_mapping: Tensor
    context_len: Tensor
    block_tables: Tensor
    nbytes: int

    @staticmethod
    def room(size: int, max_blocks: int) -> int:
        """Bytes of memory for so many sequences."""
        return size * (3 * 8 + 4 + 4 * max_blocks)

    @classmethod
    def over(cls, memory: Tensor, size: int, max_blocks: int) -> StepInputs:
        """memory: [at least `room`] uint8."""
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

    def fill(self, batch: ForwardBatch | None) -> None:
        """Put a batch of at most `size` sequences here; padding writes and reads no KV."""
        tokens = 0
        if batch is not None:
            tokens, width = batch.block_tables.shape
            self.token_ids[:tokens] = batch.token_ids
            self.positions[:tokens] = batch.positions
            self.slot_mapping[:tokens] = batch.slot_mapping
            self.context_len[:tokens] = batch.context_len
            self.block_tables[:tokens, :width] = batch.block_tables
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
        gpu = device.type == "cuda"
        room = StepInputs.room(max(sizes), max_blocks)
        self._host = torch.zeros(room, dtype=torch.uint8, pin_memory=gpu)
        self._device = torch.zeros(room, dtype=torch.uint8, device=device)
        self._copied = torch.cuda.Event() if gpu else None  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle() if gpu else None
        self._captured: dict[int, _Captured] = {}
        # the largest first: the others find room in its memory
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
        )
        replay, logits = record(walk, batch, self._pool)
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
        if self._copied is not None:
            self._copied.synchronize()  # what lies on the host has been read
        captured.host.fill(batch)
        count = captured.host.nbytes
        self._device[:count].copy_(self._host[:count], non_blocking=True)
        if self._copied is not None:
            self._copied.record()
        captured.replay()


def record(walk: Walk, batch: ForwardBatch, pool: Any) -> tuple[Replay, Tensor]:
    """A CUDA graph of `walk(batch)`: (how to replay it, where its result is then).

    In Triton's interpreter there are no graphs: a replay walks again, over the same memory.
    """
    device = batch.token_ids.device
    if device.type == "cpu":
        result = walk(batch).clone()
        return lambda: result.copy_(walk(batch)), result
    here = torch.cuda.current_stream(device)
    aside = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    aside.wait_stream(here)
    with torch.cuda.stream(aside):
        walk(batch)  # compiles what is still to be compiled
    here.wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    # thread_local: another thread may load weights meanwhile
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        logits = walk(batch)
    return graph.replay, logits
