"""What there is to compute next, and what there will be if the plan in flight is whole. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from flexpert.engine.scheduled_sequence import ScheduledSequence
from flexpert.engine.step_plan import StepPlan


@dataclass(frozen=True, slots=True)
class BegunPrompt:
    """A sequence whose prompt is computed in part. blocks: how many it has. slot: of its state."""

    state: ScheduledSequence
    row: int
    computed: int
    blocks: int
    slot: int


@dataclass(frozen=True, slots=True)
class Outlook:
    """What is to be computed, if the plan in flight is whole.

    decoding: of D sequences, with rows, positions of the next token, and held blocks: [D] int64.
    sources: [D] int64, which of the plan in flight's `sampled` each is; None: none is in flight.
    shifts: [D] int64, tokens that the plan in flight proposes for each, so that the position may be
    as much larger. promised: [D] int64, tokens that the model will propose behind it. slots: [D] of
    their states; empty where layers keep none.
    admitted: `id` of states that wait no more.
    """

    decoding: list[ScheduledSequence]
    rows: NDArray[np.int64]
    positions: NDArray[np.int64]
    held: NDArray[np.int64]
    sources: NDArray[np.int64] | None
    shifts: NDArray[np.int64]
    promised: NDArray[np.int64]
    prefilling: list[BegunPrompt]
    slots: list[int]
    admitted: frozenset[int] = frozenset()

    @property
    def running(self) -> int:
        return len(self.decoding) + len(self.prefilling)


@dataclass(frozen=True, slots=True)
class PromptChunk:
    state: ScheduledSequence
    row: int
    blocks: int
    slot: int
    start: int
    end: int

    @property
    def whole(self) -> bool:
        """The sequence is sampled after it."""
        return self.end == len(self.state.tokens)

    @property
    def scored(self) -> int:
        """How many of its rows tell how likely the prompt's next token was."""
        return 0 if self.state.scores is None else self.end - self.start - self.whole


@dataclass(slots=True)
class StepRoom:
    """What is left of a step. tokens: to be computed. scored: rows of logits that only tell how
    likely a prompt's tokens were; each is as long as the vocabulary."""

    tokens: int
    scored: int

    def any_for(self, state: ScheduledSequence) -> bool:
        return self.tokens > 0 and (state.scores is None or self.scored > 0)

    def chunk(self, begun: BegunPrompt) -> PromptChunk:
        """As much of the rest of a prompt as there is room for; may be nothing."""
        state, start = begun.state, begun.computed
        room = self.tokens if state.scores is None else min(self.tokens, self.scored)
        end = min(len(state.tokens), start + room)
        chunk = PromptChunk(state, begun.row, begun.blocks, begun.slot, start, end)
        self.tokens -= chunk.end - chunk.start
        self.scored -= chunk.scored
        if not chunk.whole:
            self.tokens = 0  # none overtakes it
        return chunk


def outlook_after(
    plan: StepPlan, prefilling: Sequence[ScheduledSequence], max_model_len: int
) -> Outlook:
    """What there is if `plan` is whole, and no token of it ends an answer before its time.

    prefilling: those whose prompt is computed in part, before it.
    """
    sequences = [*range(plan.decodes), *plan.whole]
    on = [
        index
        for index, state in enumerate(plan.sampled)
        if not state.aborted and state.room(max_model_len) > 1
    ]
    at = np.array([sequences[index] for index in on], dtype=np.int64)
    ends = {id(state): end for state, end in plan.chunks}
    complete = {id(state) for state in plan.sampled[plan.decodes :]}
    begun = [BegunPrompt(s, s.row, s.computed, len(s.blocks), s.state.slot) for s in prefilling]
    begun += [BegunPrompt(a.state, a.row, a.cached, len(a.blocks), a.slot) for a in plan.admitted]
    behind = [] if plan.state_step is None else plan.state_step.behind
    slots = {
        id(state): slot
        for (state, _), slot in zip(plan.chunks, behind[plan.decodes :], strict=False)
    }
    goes_on = [
        replace(
            one,
            computed=ends.get(id(one.state), one.computed),
            slot=slots.get(id(one.state), one.slot),
        )
        for one in begun
        if id(one.state) not in complete and not one.state.aborted
    ]
    first = [
        state.computed if index < plan.decodes else len(state.tokens) - 1
        for index, state in enumerate(plan.sampled)
    ]
    drafted = [len(draft) for draft in plan.drafts or ()] or [0] * plan.decodes
    drafted += [0] * (len(plan.sampled) - plan.decodes)
    return Outlook(
        [plan.sampled[index] for index in on],
        plan.rows[at],
        np.array([first[index] + 1 for index in on], dtype=np.int64),
        plan.blocks[at],
        np.array(on, dtype=np.int64),
        np.array([drafted[index] for index in on], dtype=np.int64),
        np.array([plan.asks[index] if plan.asks else 0 for index in on], dtype=np.int64),
        goes_on,
        [behind[one] for one in at.tolist()] if behind else [],
        frozenset(id(one.state) for one in plan.admitted),
    )
