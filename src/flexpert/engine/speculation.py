"""Speculative decoding: what is proposed for a sequence, and how much of it. Pure.

Two sources propose tokens. A text that repeats itself says what comes next: the last tokens of a
sequence are looked up in its prompt and answer, and the tokens that followed there are proposed. Or
the model does, by a layer for that (`draft_step`). The next step computes them along with the last
token, one row each, and every row is sampled. What a row samples counts as long as the tokens
before it are those that were sampled. Since a token depends on the tokens before it, the seed and
the position alone, the answer is the one that there is without proposals.

What is proposed costs rows, whether it comes true or not. So each sequence keeps how often its
proposals came true, lately: the more often, the more tokens are proposed; hardly ever, and nothing
is proposed for a while, that grows.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from typing import Protocol

from flexpert.speculative_settings import SpeculativeSettings

_CANDIDATES = 16  # earlier places of the same n-gram that are looked at
_LEARNT = 512  # tokens that are indexed in one step at most, of a prompt
WORTH = 0.3  # a row that comes true less often than this costs more than it saves
AT_FIRST = 0.5  # share of proposed tokens that are taken to come true
_LEAST = 0.25  # the least they are taken for, so that one that comes true is a new beginning
_LATELY = {"ngram": 0.2, "mtp": 0.1}  # weight of the latest token
_SHORTEST_PAUSE, _LONGEST_PAUSE = 8, 128  # steps


def agreed(draft: Sequence[int], sampled: Sequence[int]) -> int:
    """How many of the proposed tokens came true: sampled[i] is what was sampled before draft[i]."""
    for place, token in enumerate(draft):
        if sampled[place] != token:
            return place
    return len(draft)


class NgramIndex:
    """Where each n-gram of a sequence was last: a hash table of the shortest ones, each place with
    the one before it; longer ones are compared. Constant time for a token, some 100 bytes."""

    __slots__ = ("_before", "_latest", "_longest", "_shortest")

    def __init__(self, shortest: int, longest: int) -> None:
        self._shortest = shortest
        self._longest = longest
        self._latest: dict[int, int] = {}
        self._before = array("i")  # [place - shortest]

    def learn(self, tokens: list[int], most: int = _LEARNT) -> None:
        """Take in up to so many further tokens of a sequence; the last one has no successor yet."""
        size, latest, before = self._shortest, self._latest, self._before
        first = len(before) + size
        for place in range(first, min(len(tokens), first + most)):
            key = hash(tuple(tokens[place - size : place]))
            before.append(latest.get(key, -1))
            latest[key] = place

    def find(self, tokens: list[int]) -> int | None:
        """Where the successors of the longest n-gram begin that ends `tokens` and was there before,
        of equally long ones the latest; None: there is none, or they are not taken in yet."""
        size, end = self._shortest, len(tokens)
        if len(self._before) < end - size:
            return None
        place = self._latest.get(hash(tuple(tokens[end - size :])), -1)
        found, longest = None, size - 1
        for _ in range(_CANDIDATES):
            if place < 0 or longest == self._longest:
                break
            length, most = 0, min(self._longest, place)
            while length < most and tokens[place - 1 - length] == tokens[end - 1 - length]:
                length += 1
            if length > longest:
                found, longest = place, length
            place = self._before[place - size]
        return found


class DraftSource(Protocol):
    """Knows what may come next in one sequence."""

    def learn(self, tokens: list[int]) -> None:
        """After a step, with which `tokens` are published."""
        ...

    def hear(self, tokens: list[int], draft: Sequence[int]) -> None:
        """What the model itself proposes to follow these tokens."""
        ...

    def propose(self, tokens: list[int], most: int) -> list[int]:
        """At most so many tokens that may follow these. Changes nothing."""
        ...


class NgramDrafts:
    """What followed the last tokens when they were there before."""

    __slots__ = ("_index",)

    def __init__(self, shortest: int, longest: int) -> None:
        self._index = NgramIndex(shortest, longest)

    def learn(self, tokens: list[int]) -> None:
        """As `DraftSource` says."""
        self._index.learn(tokens)

    def hear(self, tokens: list[int], draft: Sequence[int]) -> None:
        """As `DraftSource` says; the text alone counts."""

    def propose(self, tokens: list[int], most: int) -> list[int]:
        """As `DraftSource` says."""
        begin = self._index.find(tokens)
        if begin is None:
            return []
        draft = tokens[begin : begin + most]
        while len(draft) < most:  # what has begun to repeat itself goes on to
            draft.append(draft[begin - len(tokens)])
        return draft


class ModelDrafts:
    """What the model has proposed itself."""

    __slots__ = ("_draft", "_length")

    def __init__(self) -> None:
        self._draft: list[int] = []
        self._length = 0  # of the tokens that it is to follow

    def learn(self, tokens: list[int]) -> None:
        """As `DraftSource` says; the model alone counts."""

    def hear(self, tokens: list[int], draft: Sequence[int]) -> None:
        """As `DraftSource` says."""
        self._draft, self._length = [*draft], len(tokens)

    def propose(self, tokens: list[int], most: int) -> list[int]:
        """As `DraftSource` says."""
        return self._draft[:most] if self._length == len(tokens) else []


def _source_of(settings: SpeculativeSettings) -> DraftSource:
    if settings.method == "mtp":
        return ModelDrafts()
    return NgramDrafts(settings.prompt_lookup_min, settings.prompt_lookup_max)


class SequenceSpeculation:
    """What is proposed for one sequence. likely: how often a proposed token came true, lately."""

    __slots__ = ("_most", "_pause", "_source", "_wait", "_weight", "likely")

    def __init__(self, settings: SpeculativeSettings, likely: float = AT_FIRST) -> None:
        """likely: to begin with."""
        self._source = _source_of(settings)
        self._most = settings.num_speculative_tokens
        self._weight = _LATELY[settings.method]
        self.likely = likely
        self._wait = 0  # steps until something is proposed again
        self._pause = _SHORTEST_PAUSE

    @property
    def depth(self) -> int:
        """How many tokens it is worth to propose."""
        if self._wait:
            return 0
        if self.likely >= 1:
            return self._most
        return min(self._most, max(1, int(math.log(WORTH) / math.log(self.likely))))

    @property
    def wanted(self) -> int:
        """How many tokens the model is to propose behind the step under way."""
        return (self.depth or 1) if self._wait <= 1 else 0

    def expects(self, tokens: list[int]) -> bool:
        """Whether something may be proposed as soon as the token behind these is known."""
        return self._wait <= 1 and len(self._source.propose(tokens, 2)) == 2

    def propose(self, tokens: list[int], most: int, ends: frozenset[int]) -> list[int]:
        """The tokens that may come next, at most so many; none behind one that ends the answer.
        Changes nothing."""
        most = min(most, self.depth)
        draft = self._source.propose(tokens, most) if most > 0 else []
        for place, token in enumerate(draft):
            if token in ends:
                return draft[: place + 1]
        return draft

    def hear(self, tokens: list[int], draft: Sequence[int]) -> None:
        """What the model itself proposes to follow these tokens."""
        self._source.hear(tokens, draft)

    def learn(self, tokens: list[int], proposed: int = 0, accepted: int = 0) -> None:
        """After a step, with which `tokens` are published: what became of what was proposed."""
        self._source.learn(tokens)
        if not proposed:
            self._wait = max(0, self._wait - 1)
            return
        for _ in range(accepted):
            self.likely += self._weight * (1 - self.likely)
        if accepted < proposed:
            self.likely = max(_LEAST, self.likely - self._weight * self.likely)
        if self.likely >= WORTH:
            self._pause = _SHORTEST_PAUSE
        else:
            self._wait = self._pause
            self._pause = min(2 * self._pause, _LONGEST_PAUSE)
