"""From what a step computes to the arrays that the model takes. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from flexpert.engine.scheduled_sequence import ScheduledSequence
from flexpert.engine.step_outlook import Outlook, PromptChunk
from flexpert.engine.step_plan import AdmittedPrompt, ScoredChunk, StepPlan


def lay_out(
    now: Outlook,
    tables: NDArray[np.int32],
    last: NDArray[np.int64],
    size: int,
    *,
    block_of: NDArray[np.int64],
    blocks: NDArray[np.int64],
    grown: list[tuple[ScheduledSequence, int]],
    admitted: list[AdmittedPrompt],
    chunks: list[PromptChunk],
    used: int,
    at_s: float,
) -> StepPlan:
    """The arrays of a plan.

    Args:
        tables: [rows, blocks] int32, the blocks of each row. last: [rows] int64, the token that a
            decoding sequence computes next. size: tokens of a block.
        block_of, blocks: [decodes] int64, of the decoding sequences: index of the block of the
            token, and how many there are.
        used: blocks before the plan. at_s: when it is made.
    """
    rows, positions = now.rows, now.positions
    decodes = len(rows)
    tokens = last[rows] if now.sources is None else np.zeros(decodes, dtype=np.int64)
    sources = now.sources
    slots = tables[rows, block_of] * size + (positions - block_of * size)
    queries = np.arange(decodes + 1, dtype=np.int32)
    context = (positions + 1).astype(np.int32)
    logit_rows = sample_at = np.arange(decodes)
    sampled = now.decoding.copy()
    scored: list[ScoredChunk] = []
    width = int(block_of.max()) + 1 if decodes else 0
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
        stops = decodes + np.cumsum(lengths)
        queries = np.concatenate([queries, stops], dtype=np.int32, casting="same_kind")
        context = np.concatenate([context, ends], dtype=np.int32, casting="same_kind")
        logit_rows, sample_at, scored = _logit_rows(decodes, chunks, stops)
        sampled += [c.state for c in chunks if c.whole]
        width = max(width, -(-int(ends.max()) // size))
        rows = np.concatenate([rows, np.array([c.row for c in chunks])])
        blocks = np.concatenate([blocks, np.array([c.blocks for c in chunks])])
        if sources is not None:
            sources = np.concatenate([sources, np.full(int(lengths.sum()), -1)])
    return StepPlan(
        token_ids=tokens,
        positions=positions,
        query_start=queries,
        context_len=context,
        block_tables=tables[rows, :width],
        slot_mapping=slots,
        logit_rows=logit_rows,
        sample_at=sample_at,
        scored=scored,
        decodes=decodes,
        sources=sources if decodes else None,
        sampled=sampled,
        decoding=now.decoding.copy(),
        grown=grown,
        admitted=admitted,
        chunks=[(c.state, c.end) for c in chunks],
        whole=[decodes + index for index, c in enumerate(chunks) if c.whole],
        rows=rows,
        blocks=blocks,
        at=at_s,
        used_before=used,
    )


def _logit_rows(
    decodes: int, chunks: Sequence[PromptChunk], stops: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], list[ScoredChunk]]:
    """logit_rows, sample_at and scored of a `StepPlan`.

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
