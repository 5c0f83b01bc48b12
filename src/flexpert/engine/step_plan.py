"""One step's work: whose tokens it computes, and the arrays that the model takes. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from flexpert.engine.scheduled_sequence import ScheduledSequence
from flexpert.engine.sequence import SampleState, Unseen
from flexpert.engine.speculation import agreed
from flexpert.engine.state_slots import StateStep
from flexpert.models.state_runs import StateRuns


@dataclass(slots=True)
class AdmittedPrompt:
    """A sequence that waits no more, if the plan is whole."""

    state: ScheduledSequence
    row: int
    blocks: list[int]
    cached: int  # tokens that need no computing
    kept: bool  # the blocks are those it has waited with
    slot: int  # of the state behind the cached tokens


@dataclass(frozen=True, slots=True)
class ScoredChunk:
    """Rows of logits at [start, start + len(tokens)) tell how likely these tokens of a prompt
    were. top: how many of the likeliest are asked for, too."""

    id: str
    start: int
    tokens: list[int]
    top: int


@dataclass(slots=True, eq=False)
class StepPlan:
    """One step's work as the model takes it: S sequences with N tokens, M of which are sampled.

    The first `decodes` sequences have one token each, and those that are proposed to come after it
    (`drafts`); the rest are chunks of prompts.

    token_ids, positions: [N] int64. query_start: [S + 1] int32, sequence s has the rows
    query_start[s] to query_start[s + 1]. context_len: [S] int32, tokens of s up to and with its
    last row. block_tables: [S, blocks of the longest] int32, padded with whatever valid ids.
    slot_mapping: [N] int64, block * block_size + offset each row's keys and values go to.
    logit_rows: [L] int64, ascending: rows whose logits are needed. sample_at: [M] int64, where
    among them the rows are that are sampled: the last one of a prompt, every one of a sequence that
    decodes. samples: the M sequences, as they will be before that token. drafts: of each that
    decodes, what is proposed; None: nothing is. scored: prompts whose tokens'
    log probabilities are asked for. sources: [N] int64, which of the tokens that the plan before
    leaves on the device each row has, where that is not known yet: w for each of its `sampled`,
    the last one that counts and w - 1 that the model proposes to follow it; -1: it is in token_ids.
    None: all are. Where the plan before has drafts, positions, context_len and slot_mapping of such
    rows are the least they may be: the device adds what has come true. unseen: the same of
    the samples. asks: how many tokens the model is to propose behind each of `sampled`; empty: it
    is asked for none, ever. on: tokens are proposed in this phase (`DraftPhases`), and a draft
    layer is computed for all rows, on all ranks. speculates: this step takes longer for it.
    """

    token_ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    query_start: NDArray[np.int32]
    context_len: NDArray[np.int32]
    block_tables: NDArray[np.int32]
    slot_mapping: NDArray[np.int64]
    logit_rows: NDArray[np.int64]
    sample_at: NDArray[np.int64]
    scored: list[ScoredChunk]
    decodes: int
    sources: NDArray[np.int64] | None
    samples: Sequence[SampleState]
    drafts: list[list[int]] | None
    unseen: Unseen | None
    asks: list[int]
    on: bool
    speculates: bool
    # ---- the scheduler's
    sampled: list[ScheduledSequence] = field(repr=False)
    decoding: list[ScheduledSequence] = field(repr=False)
    behind: NDArray[np.int64] | None = field(repr=False)  # which of the plan before each of them is
    grown: list[tuple[ScheduledSequence, int]] = field(repr=False)  # a further block for decoding
    extra: list[tuple[ScheduledSequence, int]] = field(repr=False)  # and those for what is proposed
    admitted: list[AdmittedPrompt] = field(repr=False)
    chunks: list[tuple[ScheduledSequence, int]] = field(repr=False)  # computed so far afterwards
    whole: list[int] = field(repr=False)  # which sequences are prompts that are sampled
    rows: NDArray[np.int64] = field(repr=False)  # [S], of the scheduler's arrays
    blocks: NDArray[np.int64] = field(repr=False)  # [S], how many each has afterwards
    state_step: StateStep | None = field(repr=False)
    at: float = field(repr=False)  # when it was made
    used_before: int = field(repr=False)  # blocks

    @property
    def states(self) -> StateRuns | None:
        """Slots that layers with a state read and write; None: the model has none."""
        return None if self.state_step is None else self.state_step.runs

    @property
    def ids(self) -> Iterable[str]:
        """Of all sequences that take part."""
        yield from (state.id for state in self.decoding)
        yield from (state.id for state, _ in self.chunks)

    def runs(self, sampled: Sequence[int], failed: Collection[int]) -> list[range]:
        """Of each sequence that is sampled the samples that count, at least one: those behind what
        was proposed and came true. failed: samples that there are not."""
        found = []
        first = 0
        for index in range(len(self.sampled)):
            draft = self.drafts[index] if self.drafts and index < self.decodes else ()
            run = range(first, first + 1 + agreed(draft, sampled[first : first + len(draft)]))
            beyond = [row for row in run[1:] if row in failed]
            found.append(range(first, beyond[0]) if beyond else run)
            first += 1 + len(draft)
        return found

    def supposed(self, sample: int) -> bool:
        """Whether a sample only counts if the tokens proposed before it come true."""
        first = 0
        for draft in self.drafts or ():
            if first >= sample:
                break
            first += 1 + len(draft)
        return self.drafts is not None and first > sample

    def hear(self, proposed: Sequence[Sequence[int]]) -> None:
        """The plan before is whole, and `proposed` is what the model says may follow each of its
        `sampled`: what stands here in its place."""
        if self.drafts is not None and self.behind is not None:
            for draft, source in zip(self.drafts, self.behind.tolist(), strict=True):
                draft[:] = proposed[source][: len(draft)]

    @property
    def tokens(self) -> int:
        """N; 0 when there is nothing to do, and the rank only takes part in the exchanges."""
        return len(self.token_ids)
