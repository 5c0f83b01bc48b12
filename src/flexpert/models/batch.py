"""What one forward pass computes: sequences packed into one row of tokens."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from flexpert.kernels.step_upload import StepUpload
from flexpert.models.state_runs import StateRuns


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
    sources: [N] int64, which of the tokens sampled last (`ModelRunner.sampled`) each row has; -1:
        the one in token_ids. None: all have that.
    states: where layers that keep a state find and leave it; None: the model has none, or
        `state_slots` says all.
    state_slots: [2, D] int64, of the D sequences that decode, which are the first ones: the slots
        that they read and those that they write; -1: the row is padding. None: see `states`.
    state_rows, state_starts: [3, N] and [S + 1] int64, `begins`, `sources`, `targets` and `starts`
        of `StateRows`. None: each row decodes, or see `states`.
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
    host: ForwardBatch | None = None

    def sent(self, upload: StepUpload) -> ForwardBatch:
        """The same on a device."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        if self.states is not None:
            given["state_slots"] = decode_slots(self.states)
            if self.states.decodes < len(self.states):
                given["state_rows"], given["state_starts"] = rows_and_starts(self.states)
        there = {name: array for name, array in given.items() if isinstance(array, Tensor)}
        arrays: dict[str, Any] = dict(zip(there, upload.send(list(there.values())), strict=True))
        return ForwardBatch(**arrays, states=self.states, host=self)


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
        goes_on = run > 0 and source == runs.targets[run - 1]
        if not goes_on:
            starts.append(begin)
            first = source
        rows[0, begin:end] = starts[-1]
        rows[1, begin:end] = first
        rows[2, end - 1] = target
    return rows, torch.tensor([*starts, runs.begins[-1]])
