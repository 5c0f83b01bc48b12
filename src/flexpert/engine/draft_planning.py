"""Which sequences of a step get proposed tokens, where any do. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from flexpert.engine.scheduled_sequence import ScheduledSequence
from flexpert.engine.speculation import AT_FIRST, WORTH
from flexpert.engine.step_outlook import Outlook, PromptChunk
from flexpert.speculative_settings import SpeculativeSettings

_FEW = 8  # rows up to which each is paid for by itself
_AT_ONCE = 8  # rows beyond that are computed as so many at a time (`models.padding`)


def plan_drafts(
    now: Outlook,
    rows: int,
    settings: SpeculativeSettings,
    *,
    max_tokens: int,
    max_model_len: int,
    most: int | None = None,
) -> list[list[int]] | None:
    """What is proposed for each sequence that decodes; None: nothing for any. On top of a step in
    flight the device knows what the model proposes: there are zeros in its place.

    Those go first whose proposals come true most often.

    Args:
        rows: of the step without. max_tokens: its budget, with them.
        max_model_len: tokens of prompt and answer.
        most: tokens that may be proposed; None: as many as `settings` and `max_tokens` leave.
    """
    room = min(settings.max_rows, max_tokens) - rows
    if most is not None:
        room = min(room, most)
    if room <= 0:
        return None
    able = [
        (AT_FIRST if state.speculation is None else state.speculation.likely, index)
        for index, state in enumerate(now.decoding)
        if _proposes(now, index)
    ]
    drafts: list[list[int]] = [[] for _ in now.decoding]
    left, hoped = room, 0.0
    for likely, index in sorted(able, key=lambda one: -one[0]):
        state = now.decoding[index]
        unseen = 0 if now.sources is None else 1 + int(now.shifts[index])
        fit = min(left, state.room(max_model_len) - unseen - 1)
        draft = drafts[index] = _draft(now, index, fit)
        hoped += sum(likely**place for place in range(1, len(draft) + 1))
        left -= len(draft)
        if left == 0:
            break
    return drafts if left < room and _pays(rows, room - left, hoped) else None


def _proposes(now: Outlook, index: int) -> bool:
    if now.sources is not None and not now.promised[index]:
        return False
    speculation = now.decoding[index].speculation
    return now.sources is not None if speculation is None else speculation.depth > 0


def _draft(now: Outlook, index: int, most: int) -> list[int]:
    state = now.decoding[index]
    speculation = state.speculation
    if now.sources is None:
        assert speculation is not None
        return speculation.propose(state.tokens, most, state.stop_ids)
    depth = 1 if speculation is None else speculation.depth
    return [0] * max(0, min(most, depth, int(now.promised[index])))


def _pays(rows: int, drafted: int, hoped: float) -> bool:
    """Whether so many more rows are worth the tokens that may come true of them."""
    if rows <= _FEW:
        return True
    return hoped >= WORTH * (-(-(rows + drafted) // _AT_ONCE) * _AT_ONCE - rows)


def plan_questions(
    now: Outlook,
    chunks: Sequence[PromptChunk],
    settings: SpeculativeSettings,
    *,
    max_model_len: int,
    block_size: int,
    on: bool = True,
) -> list[int]:
    """How many tokens the model is to propose behind the step, for each sequence that is sampled.
    Those that decode may need blocks for them; prompts are content with those that they have.

    Args:
        chunks: of prompts. max_model_len: tokens of prompt and answer.
        on: see `StepPlan`.
    """
    whole = [chunk for chunk in chunks if chunk.whole]
    states = [*now.decoding, *(chunk.state for chunk in whole)]
    if not on or len(states) >= settings.max_rows:
        return [0] * len(states)
    unseen = 0 if now.sources is None else 1
    asks = [min(_wanted(state), state.room(max_model_len) - unseen - 2) for state in now.decoding]
    asks += [
        min(
            _wanted(chunk.state),
            chunk.state.room(max_model_len) - 2,
            chunk.blocks * block_size - chunk.end + 1,
        )
        for chunk in whole
    ]
    return [max(0, ask) for ask in asks]


def _wanted(state: ScheduledSequence) -> int:
    if state.aborted or state.matcher is not None:
        return 0
    return 1 if state.speculation is None else state.speculation.wanted
