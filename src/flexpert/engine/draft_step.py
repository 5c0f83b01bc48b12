"""What the model's draft layer computes behind a step, to propose the next tokens. Pure."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flexpert.engine.scheduled_sequence import ScheduledSequence
from flexpert.engine.sequence import SampleState
from flexpert.engine.step_plan import StepPlan


@dataclass(frozen=True, slots=True)
class DraftStep:
    """Every row of a step again, so that the layer has keys and values of all tokens.

    token_ids: [N] int64, the token after that of each row of the plan; behind a proposed token that
    did not come true whatever was sampled, which nobody reads. rows: [D] int64, those behind which
    something is proposed. samples: the D sequences, as they are behind the token after their row,
    but greedy. sequences: which of the plan's `sampled` they are.
    """

    token_ids: NDArray[np.int64]
    rows: NDArray[np.int64]
    samples: list[SampleState]
    sequences: list[int]

    def by_sequence(
        self, tokens: Sequence[int], failed: Collection[int], sequences: int
    ) -> list[list[int]]:
        """What is proposed to follow each of the plan's `sampled`.

        tokens: D. failed: of these, which there are not. sequences: how many are sampled.
        """
        drafts: list[list[int]] = [[] for _ in range(sequences)]
        for place, (sequence, token) in enumerate(zip(self.sequences, tokens, strict=True)):
            if place not in failed:
                drafts[sequence].append(token)
        return drafts


def draft_step(
    plan: StepPlan, sampled: Sequence[int], failed: Collection[int], max_model_len: int
) -> DraftStep:
    """Behind a step that is computed and not committed.

    Args:
        sampled: of each of plan.samples. failed: which of them there are not.
        max_model_len: tokens of prompt and answer.
    """
    rows, samples, sequences = list[int](), list[SampleState](), list[int]()
    ends = plan.query_start[1:].tolist()
    runs = plan.runs(sampled, failed)
    token_ids = [*sampled[: ends[plan.decodes - 1] if plan.decodes else 0]]
    said = {
        id(state): sampled[run.start]
        for state, run in zip(plan.sampled[plan.decodes :], runs[plan.decodes :], strict=True)
    }
    for (state, end), first, last in zip(
        plan.chunks, plan.query_start[plan.decodes :].tolist(), ends[plan.decodes :], strict=False
    ):
        token_ids += state.tokens[end - (last - first) + 1 : end + 1]
        if end == len(state.tokens):
            token_ids.append(said[id(state)])
    at = [*range(plan.decodes), *plan.whole]
    for index, (state, run) in enumerate(zip(plan.sampled, runs, strict=True)):
        if run.start not in failed and _wants(state, len(run), max_model_len):
            decodes = index < plan.decodes
            rows.append(run.stop - 1 if decodes else ends[at[index]] - 1)
            samples.append(_likeliest(state.after(sampled[run.start : run.stop])[-1]))
            sequences.append(index)
    return DraftStep(
        np.array(token_ids, dtype=np.int64), np.array(rows, dtype=np.int64), samples, sequences
    )


def _likeliest(state: SampleState) -> SampleState:
    """One of which the likeliest token is sampled, of those that may come: that comes true more
    often than one drawn with the number of its position (59 of 100, not 55, at temperature 1)."""
    state.greedy = True
    return state


def _wants(state: ScheduledSequence, said: int, max_model_len: int) -> bool:
    """Whether something may be proposed for it in the next step. said: tokens of this one."""
    return (
        not state.aborted
        and state.matcher is None
        and state.room(max_model_len) - said > 1
        and (state.speculation is None or state.speculation.due)  # None: it begins to decode
    )
