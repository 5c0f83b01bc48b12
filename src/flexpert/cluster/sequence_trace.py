"""What a sequence has gone through, for its trace: which ranks it ran on, and when. Pure.

The journal tells it when a sequence comes to a rank, leaves it, has its first token and ends, and
at no other token. Seconds are those of the journal's clock.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from flexpert.cluster.operation import Operation
    from flexpert.cluster.views import OperationView

_AT_ONCE_S = 1e-3  # the journal takes it off a rank and gives it to another in one go

Stage = Literal["queue", "prefill", "decode"]


@dataclass(frozen=True, slots=True)
class TracedChange:
    """The operation that runs while something happens to a sequence."""

    id: str
    purpose: str


@dataclass(slots=True)
class RankStay:
    """From when a rank was given a sequence until it had it no more.

    said: tokens it had said before. kv_tokens: those, with its prompt's, whose KV came along.
    change: what it came here by; None: it was not moved by any. lost: the rank ended unasked.
    """

    rank: int
    began: float
    said: int
    kv_tokens: int
    change: TracedChange | None = None
    ended: float | None = None
    lost: bool = False


@dataclass(frozen=True, slots=True)
class StageTime:
    """A part of a sequence's time. rank: where; None: it waited in the head. tokens: how many were
    published in it."""

    stage: Stage
    began: float
    ended: float
    rank: int | None = None
    tokens: int = 0


class ChangeTracer(Protocol):
    """Who traces what becomes of the ranks."""

    def epoch_began(self, epoch: int, operation: OperationView | None) -> None:
        """operation: the change that has led to it."""
        ...

    def operation_over(self, operation: Operation) -> None: ...


class SequenceTrace:
    """One sequence's; the journal's entry has it.

    running_change: the operation that runs now; set by the head. opened: when it was submitted.
    first, waited: when its first token came, and the seconds its rank had no room before that.
    outcome: how it ended, as in `flexpert_sequences`; "" while it goes on. said: tokens at the end.
    """

    def __init__(self) -> None:
        self.running_change: Callable[[], TracedChange | None] = lambda: None
        self.opened = 0.0
        self.prompt_tokens = 0
        self.stays: list[RankStay] = []
        self.first: float | None = None
        self.waited = 0.0
        self.ended: float | None = None
        self.outcome = ""
        self.error = ""
        self.said = 0
        self._first_stay = 0

    def open(self, now: float, prompt_tokens: int) -> None:
        self.opened, self.prompt_tokens = now, prompt_tokens

    def placed(self, rank: int, now: float, said: int, kv_tokens: int) -> None:
        """A rank has been given it."""
        change = None
        if self.stays:
            change, left = self.running_change(), self.stays[-1].ended
            if left is not None and now - left < _AT_ONCE_S:
                now = left
        self.stays.append(RankStay(rank, now, said, kv_tokens, change))

    def left(self, now: float) -> None:
        """No rank has it now."""
        if self.stays and self.stays[-1].ended is None:
            self.stays[-1].ended = now

    def rank_lost(self) -> None:
        """The rank that has it has ended unasked."""
        if self.stays and self.stays[-1].ended is None:
            self.stays[-1].lost = True

    def first_token(self, now: float, waited: float) -> None:
        if self.first is None:
            self.first, self.waited = now, waited
            self._first_stay = max(0, len(self.stays) - 1)

    def over(self, now: float, outcome: str, said: int, error: str = "") -> None:
        """It has ended; only the first outcome counts."""
        if self.ended is None:
            self.left(now)
            self.ended, self.outcome, self.said, self.error = now, outcome, said, error

    @property
    def moves(self) -> list[tuple[RankStay, RankStay]]:
        """From where to where it went on."""
        return list(zip(self.stays, self.stays[1:], strict=False))

    def without_kv(self, stay: RankStay) -> int:
        """Tokens that were computed before it came to a rank, and whose KV did not come along: that
        rank computes them again, unless its prefix cache has them."""
        return max(0, self.prompt_tokens + stay.said - 1 - stay.kv_tokens)

    def stages(self, until: float) -> list[StageTime]:
        """All its time in order, without gaps. until: its end if it has none yet.

        On the rank where the first token came, the time without room is part of the queue. Where a
        rank was lost or left before the first token, it may have waited there, too.
        """
        end = until if self.ended is None else self.ended
        found: list[StageTime] = []
        at = self.opened
        for number, stay in enumerate(self.stays):
            stay_end = end if stay.ended is None else stay.ended
            begins = stay.began
            first = None
            if self.first is not None and number >= self._first_stay:
                first = min(max(self.first, begins), stay_end)
                if number == self._first_stay:
                    begins = min(begins + max(0.0, self.waited), first)
            if number == 0 or begins > at:
                found.append(StageTime("queue", at, begins))
            following = self.stays[number + 1].said if number + 1 < len(self.stays) else self.said
            tokens = max(0, following - stay.said)
            if first is None:
                found.append(StageTime("prefill", begins, stay_end, stay.rank))
            elif number == self._first_stay:
                found.append(StageTime("prefill", begins, first, stay.rank, min(1, tokens)))
                if stay_end > first:
                    later = max(0, tokens - 1)
                    found.append(StageTime("decode", first, stay_end, stay.rank, later))
            else:
                found.append(StageTime("decode", begins, stay_end, stay.rank, tokens))
            at = stay_end
        if end > at or not found:
            found.append(StageTime("queue", at, max(at, end)))
        return found
