"""Steps as captured CUDA graphs, one for each shape of a batch, replayed without the host.

What changes from step to step (tokens, positions, block tables, who holds which expert) lies in
device memory of a fixed place that is rewritten before a replay. So a graph is captured once in the
life of a rank: joins, leaves and moves of experts replay the same one, and `captures` stays.

Steps that only decode have graphs of their own, in which attention knows that each sequence has one
token. Those with prompts have others, in powers of two and halfway between.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from flexpert.kernels.device_stream import Replay, stream_of
from flexpert.models.batch import DraftRows, ForwardBatch, decode_slots

Walk = Callable[[ForwardBatch], Tensor]

_ALIGNMENT = 16  # bytes; kernels are compiled for pointers that have it
_OTHERS = 2
"""A graph's products are cut for the rows that its own tokens send. Where the ranks have more
tokens than that times so many, on average, a larger graph takes less time."""

log = logging.getLogger("flexpert")


@dataclass(frozen=True, slots=True, order=True)
class GraphShape:
    """tokens, sequences: at most. As many of both: each sequence has one token. shares: such
    sequences may lie behind one another, see `ForwardBatch`."""

    tokens: int
    sequences: int
    shares: bool = False

    @property
    def decodes(self) -> bool:
        return self.tokens == self.sequences


@dataclass(frozen=True, slots=True)
class StepInputs:
    """Views of one step's inputs in a piece of memory. shape: of the batches that fit.

    token_ids, sources, positions, slot_mapping: [tokens] int64; sample_rows: [sequences] int64;
    query_start: [sequences + 1] int32; context_len: [sequences] int32; block_tables: [sequences,
    max_blocks] int32; state_slots: [2, sequences] int64, of shapes that decode. drafts: of
    `DraftRows`, for as many tokens and sequences; None: nothing is proposed. nbytes: of all of
    them, from the begin of the memory.
    """

    shape: GraphShape
    token_ids: Tensor
    sources: Tensor
    positions: Tensor
    slot_mapping: Tensor
    sample_rows: Tensor
    query_start: Tensor
    context_len: Tensor
    block_tables: Tensor
    state_slots: Tensor
    drafts: DraftRows | None
    nbytes: int

    @staticmethod
    def bytes_for(shape: GraphShape, max_blocks: int, *, drafts: bool = False) -> int:
        """Bytes of memory."""
        each = 8 + 4 + 4 + 4 * max_blocks + 16
        whole = 4 * shape.tokens * 8 + shape.sequences * each + 4
        further = 2 * shape.tokens * 8 + 5 * shape.sequences * 8 if drafts else 0
        return whole + further + 12 * _ALIGNMENT

    @classmethod
    def over(
        cls, memory: Tensor, shape: GraphShape, max_blocks: int, *, drafts: bool = False
    ) -> StepInputs:
        """memory: [at least `bytes_for`] uint8."""
        end = 0

        def take(count: int, dtype: torch.dtype) -> Tensor:
            nonlocal end
            begin = -(-end // _ALIGNMENT) * _ALIGNMENT
            end = begin + count * dtype.itemsize
            return memory[begin:end].view(dtype)

        tokens, sequences = shape.tokens, shape.sequences

        def take_drafts() -> DraftRows:
            rows = take(tokens, torch.int64), take(tokens, torch.int64)
            return DraftRows(*rows, take(5 * sequences, torch.int64).view(5, sequences))

        return cls(
            shape,
            take(tokens, torch.int64),
            take(tokens, torch.int64),
            take(tokens, torch.int64),
            take(tokens, torch.int64),
            take(sequences, torch.int64),
            take(sequences + 1, torch.int32),
            take(sequences, torch.int32),
            take(sequences * max_blocks, torch.int32).view(sequences, max_blocks),
            take(2 * sequences, torch.int64).view(2, sequences),
            take_drafts() if drafts else None,
            end,
        )

    def fill(self, batch: ForwardBatch | None) -> None:
        """Put a batch that fits here, on the host; padding writes and reads no KV.

        The memory has held batches of other sizes: what lies here may be no token at all.
        """
        tokens = sequences = 0
        given: tuple[Tensor | None, ...] = (None,) * 7
        states = drafts = None
        if batch is not None:
            tokens = batch.token_ids.shape[0]
            sequences, width = batch.block_tables.shape
            self.block_tables.numpy()[:sequences, :width] = batch.block_tables.numpy()
            states = None if batch.states is None else decode_slots(batch.states)
            drafts = batch.drafts
            given = (
                batch.token_ids,
                batch.sources,
                batch.positions,
                batch.slot_mapping,
                batch.sample_rows,
                batch.query_start,
                batch.context_len,
            )
        _put(self.token_ids, given[0], 0)
        _put(self.sources, given[1], -1)
        _put(self.positions, given[2], 0)
        _put(self.slot_mapping, given[3], -1)
        _put(self.sample_rows, given[4], 0)
        _put(self.query_start, given[5], tokens)
        _put(self.context_len, given[6], 0)
        _put(self.state_slots, states, -1)
        if self.shape.decodes:
            behind = np.arange(tokens, self.shape.tokens + 1, dtype=np.int32)
            self.query_start.numpy()[sequences:] = behind
        if self.drafts is not None:
            _put(self.drafts.token_ids, None if drafts is None else drafts.token_ids, 0)
            _put(self.drafts.sources, None if drafts is None else drafts.sources, -1)
            _put(self.drafts.sequences, None if drafts is None else drafts.sequences, 0)


def _put(here: Tensor, given: Tensor | None, rest: int) -> None:
    """given, and `rest` behind it along the last dimension. By numpy, whose calls take a tenth of
    torch's."""
    whole = here.numpy()
    count = 0
    if given is not None:
        count = given.shape[-1]
        whole[..., :count] = given.numpy()
    whole[..., count:] = rest


@dataclass(frozen=True, slots=True)
class _Captured:
    """batch: what the graph reads; kept, because its memory must not go to anybody else. after: the
    graph behind the sampling, which reads the same; None: there is none."""

    batch: ForwardBatch
    host: StepInputs
    replay: Replay
    logits: Tensor
    after: Sequence[Replay]


class StepGraphs:
    """See the module's docstring; used by one thread, in inference mode.

    Args:
        walk: a batch on the device → [M, vocab] logits, without waiting for the device.
        shapes: of batches. For each that decodes, a step of as many tokens has been computed that
            chose the same kernels.
        max_blocks: KV blocks of the longest sequence.
        device: of the model and what it computes with.
        states: layers of the model keep states; then all shapes decode.
        after: what a batch may be given to once more, behind the sampling of its step, with
            `drafts`; as `walk`.

    Attributes:
        captures: graphs captured so far.
    """

    def __init__(
        self,
        walk: Walk,
        *,
        shapes: Sequence[GraphShape],
        max_blocks: int,
        device: torch.device,
        states: bool = False,
        after: Sequence[Walk] = (),
    ) -> None:
        self.captures = 0
        self._states = states
        self._max_blocks = max_blocks
        self._after = after
        self._last: _Captured | None = None  # was replayed
        drafts = bool(after)
        most = max(StepInputs.bytes_for(shape, max_blocks, drafts=drafts) for shape in shapes)
        self._stream = stream_of(device)
        self._host = self._stream.host_buffer(most)
        self._device = torch.zeros(most, dtype=torch.uint8, device=device)
        self._copied = self._stream.event()  # the device has read what lies on the host
        self._pool = self._stream.graph_pool()
        self._logits: Tensor | None = None  # of all steps with prompts
        self._captured: list[_Captured] = []
        # the largest first: the others fit into its memory
        ordered = sorted(set(shapes), reverse=True)
        self._capture_prompts(walk, [shape for shape in ordered if not shape.decodes])
        self._capture_decodes(walk, [shape for shape in ordered if shape.decodes])
        self._captured.sort(key=lambda one: (not one.host.shape.decodes, one.host.shape))

    def _capture_prompts(self, walk: Walk, shapes: Sequence[GraphShape]) -> None:
        """Where a model waits for the device in a step with prompts, these go without graphs."""
        if not shapes:
            return
        most = max(shape.sequences for shape in shapes)

        def compute(batch: ForwardBatch) -> Tensor:
            logits = walk(batch)
            if self._logits is None:
                self._logits = logits.new_empty((most, logits.shape[1]))
            return self._logits[: logits.shape[0]].copy_(logits)

        try:
            self._captured += [self._capture(compute, shape, warm=False) for shape in shapes]
        except RuntimeError as error:
            why = str(error).partition("\n")[0]
            log.warning("steps with prompts are launched kernel by kernel: %s", why)

    def _capture_decodes(self, walk: Walk, shapes: Sequence[GraphShape]) -> None:
        """Where layers with states wait for the device, as a library's may, so do these."""
        try:
            for index, shape in enumerate(shapes):
                # the largest is computed once; that and the steps before have loaded all kernels
                self._captured.append(self._capture(walk, shape, warm=index > 0))
        except RuntimeError as error:
            if not self._states:
                raise
            why = str(error).partition("\n")[0]
            log.warning("steps that decode are launched kernel by kernel: %s", why)

    def _capture(self, walk: Walk, shape: GraphShape, *, warm: bool) -> _Captured:
        drafts = bool(self._after)
        inputs = StepInputs.over(self._device, shape, self._max_blocks, drafts=drafts)
        filled = StepInputs.over(self._host, shape, self._max_blocks, drafts=drafts)
        self._fill(filled, None)
        batch = ForwardBatch(
            token_ids=inputs.token_ids,
            positions=inputs.positions,
            query_start=inputs.query_start,
            context_len=inputs.context_len,
            block_tables=inputs.block_tables,
            slot_mapping=inputs.slot_mapping,
            sample_rows=inputs.sample_rows,
            sources=inputs.sources,
            state_slots=inputs.state_slots if self._states else None,
            shares=shape.shares,
            drafts=inputs.drafts,
        )
        replay, logits = self._stream.capture(lambda: walk(batch), self._pool, warm=warm)
        self.captures += 1
        behind = [self.also(functools.partial(w, batch), warm=warm) for w in self._after]
        return _Captured(batch, filled, replay, logits, behind)

    def also(self, compute: Callable[[], Tensor], *, warm: bool = False) -> Replay:
        """A graph of something else, which reads and writes memory of fixed places and never runs
        at once with the others."""
        replay, _ = self._stream.capture(compute, self._pool, warm=warm)
        self.captures += 1
        return replay

    def replay_after(self, which: int) -> None:
        """One of `after`, of the batch that was computed last."""
        assert self._last is not None
        self._last.after[which]()

    def _chosen(self, batch: ForwardBatch | None, mean_tokens: int) -> _Captured | None:
        """The smallest that takes the batch; None: none does."""
        tokens = sequences = samples = width = 0
        decodes, shares = True, False
        if batch is not None:
            shares = batch.shares
            tokens, samples = batch.token_ids.shape[0], batch.sample_rows.shape[0]
            sequences, width = batch.block_tables.shape
            decodes = tokens == sequences == samples
            if batch.states is not None and not batch.states.apart:
                return None  # some begin, or have several rows
        if width > self._max_blocks:
            return None
        for captured in self._captured:
            shape = captured.host.shape
            if (
                (decodes or not shape.decodes)
                and (shape.shares or not shape.decodes or not shares)
                and tokens <= shape.tokens
                and max(sequences, samples) <= shape.sequences
                and mean_tokens <= _OTHERS * shape.tokens
            ):
                return captured
        return None

    def fits(self, batch: ForwardBatch) -> bool:
        """Whether there is a graph for a batch on the host."""
        return self._chosen(batch, 0) is not None

    def forward(self, batch: ForwardBatch, mean_tokens: int = 0) -> Tensor | None:
        """[M, vocab] logits of a batch on the host, valid until the next call; None: there is no
        graph for it.

        mean_tokens: of all ranks in this step; their rows come here as well.
        """
        captured = self._chosen(batch, mean_tokens)
        if captured is None:
            return None
        self._replay(captured, batch)
        return captured.logits[: batch.sample_rows.shape[0]]

    def idle(self, mean_tokens: int = 0) -> bool:
        """A step without tokens. False: there is no graph for it."""
        captured = self._chosen(None, mean_tokens)
        if captured is not None:
            self._replay(captured, None)
        return captured is not None

    def _replay(self, captured: _Captured, batch: ForwardBatch | None) -> None:
        self._fill(captured.host, batch)
        self._last = captured
        captured.replay()

    def _fill(self, inputs: StepInputs, batch: ForwardBatch | None) -> None:
        """Here and on the device."""
        self._copied.synchronize()
        inputs.fill(batch)
        count = inputs.nbytes
        self._device[:count].copy_(self._host[:count], non_blocking=True)
        self._copied.record()
