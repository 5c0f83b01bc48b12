"""What one forward pass computes: sequences packed into one row of tokens."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from flexpert.kernels.step_upload import StepUpload
from flexpert.models.state_runs import StateRuns


@dataclass(frozen=True, slots=True)
class DraftRows:
    """Where the draft layer finds what it takes, before the tokens of a step are known.

    token_ids: [N] int64, the token after that of each row. sources: [N] int64, which of the step's
    samples it is instead; -1: none. sequences: [5, S] int64, of each sequence that is sampled the
    first row whose token may be its last one, the first sample that may, how many more there are of
    either, how many tokens are to be proposed, and which row of the block tables it has.
    """

    token_ids: Tensor
    sources: Tensor
    sequences: Tensor


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
    sources: [N] int64, which of the tokens that the step before left (`ModelRunner.left`) each row
        has; -1: the one in token_ids. None: all have that. With `drafts` such rows are sequences of
        their own, and go on behind what came true there: positions, context_len and slot_mapping
        are those without.
    states: where layers that keep a state find and leave it; None: the model has none, or
        `state_slots` says all.
    state_slots: [2, D] int64, of the D rows of sequences that decode, which are the first ones: the
        slots that they read and those that they write; -1: the row is padding. None: see `states`.
    state_rows, state_starts: [3, N] and [S + 1] int64, `begins`, `sources`, `targets` and `starts`
        of `StateRows`. None: each row decodes, or see `states`.
    shares: rows that are sequences by themselves may lie behind one another in the same blocks, so
        that all keys and values must be written before any row attends to them.
    drafts: for the draft layer, on a GPU.
    host: the same on the host, of a batch that was sent to a device; None: this is it, or each
        sequence has one token.
    """

    token_ids: Tensor
    positions: Tensor
    query_start: Tensor
    context_len: Tensor
    block_tables: Tensor
    slot_mapping: Tensor
    sample_rows: Tensor
    sources: Tensor | None = None
    states: StateRuns | None = None
    state_slots: Tensor | None = None
    state_rows: Tensor | None = None
    state_starts: Tensor | None = None
    shares: bool = False
    drafts: DraftRows | None = None
    host: ForwardBatch | None = None

    def sent(self, upload: StepUpload) -> ForwardBatch:
        """The same on a device."""
        own = _tensors(self)
        if self.states is not None:
            own["state_slots"] = decode_slots(self.states)
            if not self.states.apart:
                own["state_rows"], own["state_starts"] = rows_and_starts(self.states)
        further = {} if self.drafts is None else _tensors(self.drafts)
        arrays = upload.send([*own.values(), *further.values()])
        there: dict[str, Any] = dict(zip(own, arrays, strict=False))
        if self.drafts is not None:
            there["drafts"] = DraftRows(*arrays[len(own) :])
        return ForwardBatch(**there, states=self.states, shares=self.shares, host=self)


def _tensors(parts: ForwardBatch | DraftRows) -> dict[str, Tensor]:
    given = {field.name: getattr(parts, field.name) for field in fields(parts)}
    return {name: array for name, array in given.items() if isinstance(array, Tensor)}


def decode_slots(runs: StateRuns) -> Tensor:
    """`ForwardBatch.state_slots` of a step, on the host."""
    both = (runs.sources[: runs.decodes], runs.targets[: runs.decodes])
    return torch.tensor(both, dtype=torch.int64)


def rows_and_starts(runs: StateRuns) -> tuple[Tensor, Tensor]:
    """`ForwardBatch.state_rows` and `state_starts` of a step, on the host."""
    rows = torch.full((3, runs.begins[-1]), -1, dtype=torch.int64)
    starts: list[int] = []
    for run, (source, target) in enumerate(zip(runs.sources, runs.targets, strict=True)):
        begin, end = runs.begins[run : run + 2]
        if not runs.goes_on(run):
            starts.append(begin)
            first = source
        rows[0, begin:end] = starts[-1]
        rows[1, begin:end] = first
        rows[2, end - 1] = target
    return rows, torch.tensor([*starts, runs.begins[-1]])
