"""From what a step computes to the arrays that the model takes. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flexpert.engine.scheduled_sequence import ScheduledSequence
from flexpert.engine.sequence import SampleState, Unseen
from flexpert.engine.state_slots import StateStep
from flexpert.engine.step_outlook import Outlook, PromptChunk
from flexpert.engine.step_plan import AdmittedPrompt, ScoredChunk, StepPlan


def lay_out(
    now: Outlook,
    tables: NDArray[np.int32],
    last: NDArray[np.int64],
    size: int,
    *,
    blocks: NDArray[np.int64],
    drafts: list[list[int]] | None,
    asks: list[int],
    on: bool,
    speculates: bool,
    width: int,
    grown: list[tuple[ScheduledSequence, int]],
    extra: list[tuple[ScheduledSequence, int]],
    admitted: list[AdmittedPrompt],
    chunks: list[PromptChunk],
    states: StateStep | None,
    used: int,
    at_s: float,
) -> StepPlan:
    """The arrays of a plan.

    Args:
        tables: [rows, blocks] int32, the blocks of each row. last: [rows] int64, the token that a
            decoding sequence computes next. size: tokens of a block.
        blocks: [decodes] int64, how many the decoding sequences have.
        drafts: what is proposed for each of them; None: nothing is for any.
        asks, on, speculates: see `StepPlan`. width: tokens that a plan leaves on the device for
            each sequence.
        states: what becomes of the states; None: there are none.
        used: blocks before the plan. at_s: when it is made.
    """
    rows = now.rows
    decodes = len(rows)
    decoded = _decoding(now, last, drafts, width)
    sources = decoded.sources
    tokens, positions = decoded.tokens, decoded.positions
    queries, context = decoded.queries, decoded.context
    block_of = positions // size
    slots = tables[decoded.rows, block_of] * size + (positions - block_of * size)
    before = len(tokens)
    logit_rows = sample_at = np.arange(before)
    sampled, samples = now.decoding.copy(), decoded.samples
    scored: list[ScoredChunk] = []
    columns = int(block_of.max()) + 1 if decodes else 0
    if (asks or now.sources is not None) and decodes:  # where further tokens may be
        columns = max(columns, int(blocks.max()))
    if chunks:
        at = [np.arange(c.start, c.end) for c in chunks]
        ids = [np.array(c.state.tokens[c.start : c.end], dtype=np.int64) for c in chunks]
        to = [
            tables[c.row, where // size] * size + where % size
            for c, where in zip(chunks, at, strict=True)
        ]
        ends = np.array([c.end for c in chunks])
        lengths = ends - np.array([c.start for c in chunks])
        tokens = np.concatenate([tokens, *ids])
        positions = np.concatenate([positions, *at])
        slots = np.concatenate([slots, *to])
        stops = before + np.cumsum(lengths)
        queries = np.concatenate([queries, stops], dtype=np.int32, casting="same_kind")
        context = np.concatenate([context, ends], dtype=np.int32, casting="same_kind")
        logit_rows, sample_at, scored = _logit_rows(before, chunks, stops)
        sampled += (whole := [c.state for c in chunks if c.whole])
        samples += whole
        columns = max(columns, -(-int(ends.max()) // size))
        rows = np.concatenate([rows, np.array([c.row for c in chunks])])
        blocks = np.concatenate([blocks, np.array([c.blocks for c in chunks])])
        if sources is not None:
            sources = np.concatenate([sources, np.full(int(lengths.sum()), -1)])
    return StepPlan(
        token_ids=tokens,
        positions=positions,
        query_start=queries,
        context_len=context,
        block_tables=tables[rows, :columns],
        slot_mapping=slots,
        logit_rows=logit_rows,
        sample_at=sample_at,
        scored=scored,
        decodes=decodes,
        sources=sources if decodes else None,
        samples=samples,
        drafts=drafts,
        unseen=_unseen(now, drafts, len(samples)) if decodes else None,
        asks=asks,
        on=on,
        speculates=speculates,
        sampled=sampled,
        decoding=now.decoding.copy(),
        behind=now.sources,
        grown=grown,
        extra=extra,
        admitted=admitted,
        chunks=[(c.state, c.end) for c in chunks],
        whole=[decodes + index for index, c in enumerate(chunks) if c.whole],
        rows=rows,
        blocks=blocks,
        state_step=states,
        at=at_s,
        used_before=used,
    )


@dataclass(frozen=True, slots=True)
class _Decoding:
    """The first rows of a plan, n of them, of D sequences that decode.

    tokens, positions, rows: [n] int64; the last: of the scheduler's arrays. queries: [D + 1] int32
    and context: [D] int32, as in `StepPlan`; sources as well, [n] int64. samples: n.
    """

    tokens: NDArray[np.int64]
    positions: NDArray[np.int64]
    rows: NDArray[np.int64]
    queries: NDArray[np.int32]
    context: NDArray[np.int32]
    samples: list[SampleState]
    sources: NDArray[np.int64] | None


def _decoding(
    now: Outlook, last: NDArray[np.int64], drafts: list[list[int]] | None, width: int
) -> _Decoding:
    decodes = len(now.rows)
    if drafts is None:
        return _Decoding(
            sources=None if now.sources is None else now.sources * width,
            tokens=last[now.rows] if now.sources is None else np.zeros(decodes, dtype=np.int64),
            positions=now.positions,
            rows=now.rows,
            queries=np.arange(decodes + 1, dtype=np.int32),
            context=(now.positions + 1).astype(np.int32),
            samples=[*now.decoding],
        )
    tokens: list[int] = []
    samples: list[SampleState] = []
    for state, draft in zip(now.decoding, drafts, strict=True):
        if now.sources is None:
            tokens += (state.tokens[-1], *draft)
            samples += (state, *state.after(draft))
        else:  # whatever the tokens are, it is sampled the same
            tokens += [0] * (1 + len(draft))
            samples += [state] * (1 + len(draft))
    counts = np.array([1 + len(draft) for draft in drafts])
    queries = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    place = np.arange(len(tokens)) - np.repeat(queries[:-1], counts)
    return _Decoding(
        tokens=np.array(tokens, dtype=np.int64),
        positions=np.repeat(now.positions, counts) + place,
        rows=np.repeat(now.rows, counts),
        queries=queries,
        context=(now.positions + counts).astype(np.int32),
        samples=samples,
        sources=None if now.sources is None else np.repeat(now.sources * width, counts) + place,
    )


def _unseen(now: Outlook, drafts: list[list[int]] | None, samples: int) -> Unseen | None:
    """samples: of all sequences; those that decode are the first ones."""
    if now.sources is None:
        return None
    counts = [1] * len(now.rows) if drafts is None else [1 + len(draft) for draft in drafts]
    rows = sum(counts)
    unseen = Unseen(
        np.zeros(samples, dtype=np.int64),
        np.zeros(samples, dtype=np.int64),
        np.full(samples, -1, dtype=np.int64),
    )
    unseen.tokens[:rows] = np.concatenate([np.arange(1, 1 + count) for count in counts])
    unseen.more[:rows] = np.repeat(now.shifts, counts)
    unseen.sequences[:rows] = np.repeat(now.sources, counts)
    return unseen


def _logit_rows(
    decodes: int, chunks: Sequence[PromptChunk], stops: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], list[ScoredChunk]]:
    """logit_rows, sample_at and scored of a `StepPlan`.

    decodes: rows of sequences that decode.
    stops: [chunks] int64, the row behind the last of each.
    """
    if not any(chunk.scored for chunk in chunks):
        whole = np.array([chunk.whole for chunk in chunks])
        rows = np.concatenate([np.arange(decodes), stops[whole] - 1])
        return rows, np.arange(len(rows)), []
    needed, sample_at, scored = list(range(decodes)), list(range(decodes)), []
    for chunk, stop in zip(chunks, stops.tolist(), strict=True):
        if chunk.scored:
            state = chunk.state
            after = state.tokens[chunk.start + 1 : chunk.start + 1 + chunk.scored]
            top = state.params.prompt_logprobs or 0
            scored.append(ScoredChunk(state.id, len(needed), after, top))
            begin = stop - (chunk.end - chunk.start)
            needed += range(begin, begin + chunk.scored)
        if chunk.whole:
            sample_at.append(len(needed))
            needed.append(stop - 1)
    return np.array(needed, dtype=np.int64), np.array(sample_at, dtype=np.int64), scored
