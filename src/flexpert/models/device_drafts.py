"""The draft layer's part in steps on a GPU, where nobody waits to know which tokens there are.

Behind the sampling of a step it is seen which proposed tokens came true, and the layer is applied
to every row of the step: a graph for each shape of a batch, that reads what the step's own graph
has read. What follows is alike for all: the head says what each sequence is proposed, and the layer
is applied again to that. All that the next step, and the host, need of it lies in places that stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from flexpert.kernels.device_stream import DeviceStream, Replay, StreamEvent
from flexpert.models.batch import DraftRows, ForwardBatch
from flexpert.models.draft_layer import draft_logits, draft_states
from flexpert.models.source import ModelInfo


@dataclass(slots=True)
class Proposals:
    """What the model proposes behind one step, on its way to the host. tokens: [sequences * width]
    int64, there once `copied`; the first of each sequence is no proposal."""

    tokens: Tensor
    copied: StreamEvent
    width: int
    counts: Sequence[int] = ()

    def finish(self) -> list[list[int]]:
        """Waits. What is proposed to follow each sequence, as many as were asked for."""
        self.copied.synchronize()
        table = self.tokens[: len(self.counts) * self.width].view(-1, self.width).tolist()
        return [row[1 : 1 + count] for row, count in zip(table, self.counts, strict=True)]


class DeviceDrafts:
    """Of a model with a draft layer; used by one thread.

    Args:
        most_tokens, most_sequences: of a step. most_proposed: tokens for one sequence.
        sampled: int64, where the sampler leaves the tokens of a step.
        cache: what the layer's attention keeps, as `KVCache.slots_of` gives it.
        block_size: tokens of a KV block. most_blocks: of a sequence.
        stream: of the device.

    left: [most_sequences * width] int64, of each sequence of the step before the last token that
    counts and those that are proposed to follow it. accepted: [most_sequences] int64, how many
    proposed tokens came true in it. width: 1 + most_proposed.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        info: ModelInfo,
        sampled: Tensor,
        cache: Sequence[Tensor],
        *,
        most_tokens: int,
        most_sequences: int,
        most_proposed: int,
        block_size: int,
        most_blocks: int,
        stream: DeviceStream,
    ) -> None:
        self._model = model
        self._vocab = info.vocab
        self._sampled = sampled
        self._cache = cache
        self._size = block_size
        self.width = 1 + most_proposed
        self.sequences = 0  # of the step under way
        device = sampled.device

        def numbers(count: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(count, dtype=dtype, device=device)

        self.left = numbers(most_sequences * self.width)
        self.accepted = numbers(most_sequences)
        self._last, self._at, self._asked = (numbers(most_sequences) for _ in range(3))
        self._tokens, self._positions, self._slots = (numbers(most_sequences) for _ in range(3))
        self._step = numbers(1)
        self._context = numbers(most_sequences, torch.int32)
        self._begins = torch.arange(most_sequences + 1, dtype=torch.int32, device=device)
        self._tables = numbers(most_sequences * most_blocks, torch.int32).view(-1, most_blocks)
        self._after = numbers(most_tokens)
        self._states = torch.zeros((most_tokens, info.hidden), dtype=info.dtype, device=device)
        self._found = torch.zeros((most_sequences, info.hidden), dtype=info.dtype, device=device)
        pieces = [stream.host_buffer(8 * most_sequences * self.width) for _ in range(2)]
        # two steps are in flight at most
        self._pieces = [Proposals(p.view(torch.int64), stream.event(), self.width) for p in pieces]
        decoder: Any = model.get_decoder()
        decoder.register_forward_hook(self._hear)

    def _hear(self, _module: nn.Module, _given: object, found: Any) -> None:
        rows = min(found[0].shape[1], self._states.shape[0])
        self._states[:rows].copy_(found[0][0, :rows])

    def begin(self) -> None:
        """The next `head` says the first token."""
        self._step.fill_(1)

    def place(self, batch: ForwardBatch) -> None:
        """Rows that go on from the step before, on the device, get what it has left."""
        from flexpert.kernels.cuda.drafts import place_rows  # needs triton

        if batch.sources is not None:
            place_rows(
                batch.sources,
                self.left,
                self.accepted,
                batch.token_ids,
                batch.positions,
                batch.context_len,
                batch.slot_mapping,
                batch.block_tables,
                width=self.width,
                block_size=self._size,
            )

    def first(self, batch: ForwardBatch) -> Tensor:
        """Behind a step and its sampling: the layer's states of all rows → [S, hidden], those
        behind which something is proposed. batch: of the step, on the device, with `drafts`."""
        from flexpert.kernels.cuda.drafts import tokens_after  # needs triton

        given = self._judge(batch)
        rows, sequences = batch.token_ids.shape[0], given.sequences.shape[1]
        self.begin()
        tables = batch.block_tables
        if self.width > 2:
            columns = min(tables.shape[1], self._tables.shape[1])
            self._tables[:sequences, :columns] = tables[given.sequences[4], :columns]
        tokens_after(given.sources, given.token_ids, self._sampled, self._after)
        found = draft_states(
            self._model, self._after[:rows], batch.positions, self._states[:rows].unsqueeze(0)
        )
        return self._found[:sequences].copy_(found[self._last[:sequences]])

    def leave_out(self, batch: ForwardBatch) -> Tensor:
        """In the place of `first`, where the layer is not computed: what came true is seen all the
        same, and the layer's keys and values of these tokens are 0. Returns `left`."""
        from flexpert.kernels.cuda.drafts import clear_rows  # needs triton

        self._judge(batch)
        for part in self._cache:
            clear_rows(batch.slot_mapping, part)
        return self.left

    def _judge(self, batch: ForwardBatch) -> DraftRows:
        """What was proposed, and came true."""
        from flexpert.kernels.cuda.drafts import judge_rows  # needs triton

        given = batch.drafts
        assert given is not None
        judge_rows(
            given.sequences,
            self._sampled,
            batch.token_ids,
            batch.positions,
            left=self.left,
            accepted=self.accepted,
            last=self._last,
            at=self._at,
            asked=self._asked,
            width=self.width,
        )
        return given

    def head(self, sequences: int) -> Tensor:
        """Behind `first` or `again`: [S] int64, what is proposed next."""
        logits = draft_logits(self._model, self._found[:sequences])[:, : self._vocab]
        tokens = self._tokens[:sequences]
        torch.argmax(logits, dim=-1, out=tokens)
        places = self._step.expand(sequences).unsqueeze(1)
        self.left[: sequences * self.width].view(-1, self.width).scatter_(
            1, places, tokens.unsqueeze(1)
        )
        return tokens

    def further(self, sequences: int) -> ForwardBatch:
        """The rows of `again`, whose places on the device stay."""
        return ForwardBatch(
            token_ids=self._tokens[:sequences],
            positions=self._positions[:sequences],
            query_start=self._begins[: sequences + 1],
            context_len=self._context[:sequences],
            block_tables=self._tables[:sequences],
            slot_mapping=self._slots[:sequences],
            sample_rows=self._last[:0],
        )

    def again(self, batch: ForwardBatch) -> Tensor:
        """Behind `head`: the layer once more, to what was proposed. batch: `further`."""
        from flexpert.kernels.cuda.drafts import further_rows  # needs triton

        sequences = batch.token_ids.shape[0]
        further_rows(
            self._step,
            self._asked,
            self._at,
            self._tables,
            positions=batch.positions,
            context_len=batch.context_len,
            slot_mapping=batch.slot_mapping,
            block_size=self._size,
        )
        self._step += 1
        states = self._found[:sequences]
        found = draft_states(self._model, batch.token_ids, batch.positions, states.unsqueeze(0))
        return states.copy_(found)

    def read(self, counts: Sequence[int]) -> Proposals:
        """What is proposed, once the device has come to it. counts: how many tokens each sequence
        was asked for."""
        piece = self._pieces[0]
        self._pieces.reverse()
        piece.counts = counts
        many = len(counts) * self.width
        piece.tokens[:many].copy_(self.left[:many], non_blocking=True)
        piece.copied.record()
        return piece


@dataclass(frozen=True, slots=True)
class DraftGraphs:
    """`head` and `again`, captured for so many sequences: ascending."""

    sizes: Sequence[int]
    heads: Sequence[Replay]
    agains: Sequence[Replay]

    def at(self, sequences: int) -> int | None:
        """Which takes so many; None: none does."""
        return next((i for i, size in enumerate(self.sizes) if size >= sequences), None)
