"""Which sequences of a step get proposed tokens, and whether that pays. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from flexpert.engine.scheduled_sequence import ScheduledSequence
from flexpert.engine.speculation import WORTH
from flexpert.speculative_settings import SpeculativeSettings

_FEW = 8  # rows up to which each is paid for by itself
_AT_ONCE = 8  # rows beyond that are computed as so many at a time (`models.padding`)


def plan_drafts(
    decoding: Sequence[ScheduledSequence],
    rows: int,
    settings: SpeculativeSettings,
    *,
    max_tokens: int,
    max_model_len: int,
) -> list[list[int]] | None:
    """What is proposed for each sequence that decodes; None: nothing for any.

    Those go first whose proposals come true most often.

    Args:
        rows: of the step without. max_tokens: its budget, with them.
        max_model_len: tokens of prompt and answer.
    """
    room = min(settings.max_rows, max_tokens) - rows
    if room <= 0:
        return None
    able = [
        (speculation.likely, index, speculation)
        for index, state in enumerate(decoding)
        if (speculation := state.speculation) is not None and speculation.depth
    ]
    drafts: list[list[int]] = [[] for _ in decoding]
    left, hoped = room, 0.0
    for likely, index, speculation in sorted(able, key=lambda one: -one[0]):
        state = decoding[index]
        most = min(left, state.room(max_model_len) - 1)
        draft = drafts[index] = speculation.propose(state.tokens, most, state.stop_ids)
        hoped += sum(likely**place for place in range(1, len(draft) + 1))
        left -= len(draft)
        if left == 0:
            break
    return drafts if left < room and _pays(rows, room - left, hoped) else None


def _pays(rows: int, drafted: int, hoped: float) -> bool:
    """Whether so many more rows are worth the tokens that may come true of them."""
    if rows <= _FEW:
        return True
    return hoped >= WORTH * (-(-(rows + drafted) // _AT_ONCE) * _AT_ONCE - rows)
