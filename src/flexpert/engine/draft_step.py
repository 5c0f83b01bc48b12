"""What the model's draft layer computes behind a step, to propose the next tokens. Pure.

It is applied to every row of the step, so that it has keys and values of all tokens, and says what
may follow the token after the last one. Applied again, to its own result and the token that it
proposed, it proposes another one. On a CPU the host knows the tokens of the step by then
(`DraftRun`); on a GPU it does not, and says where they come from (`draft_inputs`).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flexpert.engine.sequence import SampleState
from flexpert.engine.step_plan import StepPlan


@dataclass(frozen=True, slots=True)
class FirstStep:
    """Every row of a step again.

    token_ids: [N] int64, the token after that of each row of the plan; behind a proposed token that
    did not come true whatever was sampled, which nobody reads. rows: [D] int64, those behind which
    something is proposed.
    """

    token_ids: NDArray[np.int64]
    rows: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class FurtherStep:
    """A row for each sequence for which another token is proposed: [D] as in `StepPlan`.

    rows: [D] int64, which row of the step before each goes on from.
    """

    token_ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    context_len: NDArray[np.int32]
    block_tables: NDArray[np.int32]
    slot_mapping: NDArray[np.int64]
    rows: NDArray[np.int64]


class DraftRun:
    """What is proposed behind a step that is computed and not committed.

    proposed: to follow each of the plan's `sampled`, so far. samples: of the latest step, the D
    sequences as they will be before what it proposes, but greedy.
    """

    def __init__(self, plan: StepPlan, sampled: Sequence[int], failed: Collection[int]) -> None:
        """
        Args:
            sampled: of each of plan.samples. failed: which of them there are not.
        """
        self.proposed: list[list[int]] = [[] for _ in plan.sampled]
        self.samples: list[SampleState] = []
        self._plan = plan
        self._steps = 1
        self._sequences: list[int] = []  # which of the plan's `sampled` the samples are
        self._last: list[int] = []  # the row of each that the first step went on from
        ends = plan.query_start[1:].tolist()
        runs = plan.runs(sampled, failed)
        at = [*range(plan.decodes), *plan.whole]
        for index, (state, run) in enumerate(zip(plan.sampled, runs, strict=True)):
            if run.start not in failed and plan.asks[index] and not state.aborted:
                last = run.stop - 1 if index < plan.decodes else ends[at[index]] - 1
                said = sampled[run.start : run.stop]
                self._keep(index, last, _likeliest(state.after(said)[-1]))
        token_ids = [*sampled[: ends[plan.decodes - 1] if plan.decodes else 0]]
        said_of = {
            id(state): sampled[run.start]
            for state, run in zip(plan.sampled[plan.decodes :], runs[plan.decodes :], strict=True)
        }
        for (state, end), first, last in zip(
            plan.chunks,
            plan.query_start[plan.decodes :].tolist(),
            ends[plan.decodes :],
            strict=False,
        ):
            token_ids += state.tokens[end - (last - first) + 1 : end + 1]
            if end == len(state.tokens):
                token_ids.append(said_of[id(state)])
        rows = np.array(self._last, dtype=np.int64)
        self.first = FirstStep(np.array(token_ids, dtype=np.int64), rows)

    def _keep(self, sequence: int, last: int, state: SampleState) -> None:
        self._sequences.append(sequence)
        self._last.append(last)
        self.samples.append(state)

    def hear(self, tokens: Sequence[int], failed: Collection[int]) -> None:
        """What the latest step proposes.

        tokens: one for each of `samples`. failed: of these, which there are not.
        """
        for place, (sequence, token) in enumerate(zip(self._sequences, tokens, strict=True)):
            if place not in failed:
                self.proposed[sequence].append(token)

    def further(self, block_size: int) -> FurtherStep:
        """The next step. block_size: tokens of a KV block."""
        plan, proposed = self._plan, self.proposed
        first, self._steps = self._steps == 1, self._steps + 1
        count = self._steps
        before = [*zip(self._sequences, self._last, self.samples, strict=True)]
        self._sequences, self._last, self.samples = [], [], []
        rows, tables = list[int](), [*range(plan.decodes), *plan.whole]
        for place, (sequence, last, state) in enumerate(before):
            if len(proposed[sequence]) == count - 1 and plan.asks[sequence] >= count:
                rows.append(last if first else place)
                token = proposed[sequence][-1]
                self._keep(sequence, last, _likeliest(state.after([token])[-1]))
        positions = plan.positions[self._last] + (count - 1)
        table = plan.block_tables[[tables[sequence] for sequence in self._sequences]]
        blocks = table[np.arange(len(rows)), positions // block_size] if len(rows) else positions
        return FurtherStep(
            np.array([proposed[s][-1] for s in self._sequences], dtype=np.int64),
            positions,
            (positions + 1).astype(np.int32),
            table,
            blocks.astype(np.int64) * block_size + positions % block_size,
            np.array(rows, dtype=np.int64),
        )


def _likeliest(state: SampleState) -> SampleState:
    """One of which the likeliest token is sampled, of those that may come: that comes true more
    often than one drawn with the number of its position (59 of 100, not 55, at temperature 1)."""
    state.greedy = True
    return state


@dataclass(frozen=True, slots=True)
class DraftInputs:
    """Where a device finds what the draft layer takes, before the tokens of a step are known.

    token_ids: [N] int64, the token after that of each row, where the plan knows it. sources: [N]
    int64, which of the step's samples it is else; -1: it is in token_ids. sequences: [5, S] int64,
    of each of the plan's `sampled` the first row whose token may be its last one, the first sample
    that may, how many more there are of either, how many tokens are to be proposed, and which row
    of the batch's block tables it has.
    """

    token_ids: NDArray[np.int64]
    sources: NDArray[np.int64]
    sequences: NDArray[np.int64]


def draft_inputs(plan: StepPlan) -> DraftInputs:
    """Of a plan that may be computed on top of another one; in its batch each row that decodes is a
    sequence of its own (`ForwardBatch`)."""
    decoded = int(plan.query_start[plan.decodes])
    token_ids = np.zeros(plan.tokens, dtype=np.int64)
    sources = np.full(plan.tokens, -1, dtype=np.int64)
    sources[:decoded] = np.arange(decoded)
    sequences = np.zeros((5, len(plan.sampled)), dtype=np.int64)
    counts = np.diff(plan.query_start[: plan.decodes + 1])
    begins = plan.query_start[: plan.decodes]
    sequences[:, : plan.decodes] = begins, begins, counts - 1, plan.asks[: plan.decodes], begins
    sample, index = decoded, plan.decodes
    for chunk, (state, end) in enumerate(plan.chunks):
        first, last = plan.query_start[plan.decodes + chunk : plan.decodes + chunk + 2].tolist()
        after = state.tokens[end - (last - first) + 1 : end + 1]
        token_ids[first : first + len(after)] = after
        if end == len(state.tokens):
            sources[last - 1] = sample
            sequences[:, index] = last - 1, sample, 0, plan.asks[index], decoded + chunk
            sample, index = sample + 1, index + 1
    return DraftInputs(token_ids, sources, sequences)
