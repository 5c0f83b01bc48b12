"""Which blocks of a prompt each rank has, and which rank a prompt goes to. Pure.

A rank tells which blocks can be found in its prefix cache (`engine/block_keys.py`). A sequence that
a rank was given and has not computed yet counts, too: what comes with the same prefix meanwhile
goes where it is going to be found.

A prompt goes where it costs least, counted in tokens of prompts to compute:

    its own tokens that are not cached there
    + half of   what waits there: tokens of other prompts that are still to be computed, and
                `SEQUENCE_TOKENS` for each unfinished sequence
              + what its own tokens displace there of a cache that is full

Half, because what waits holds up this prompt alone, while a prefix that is computed again takes
time from all that come after it on that rank as well; and because what is displaced may never be
asked for again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from flexpert.engine.block_keys import MOST_KEYS, PromptKeys

SEQUENCE_TOKENS = 64
"""An unfinished sequence takes part in every step until its end, which is about the work of so many
tokens of a prompt. A cached prefix of 320 tokens outweighs ten of them."""
_SHARE = 0.5

Reason = Literal["prefix", "load", "none"]


class RankBacklog(NamedTuple):
    """What a rank has to do. sequences: unfinished ones. ahead: tokens of prompts that it still has
    to compute. free: tokens that its KV cache takes before anything cached is displaced."""

    sequences: int
    ahead: int = 0
    free: int = 2**62


@dataclass(frozen=True, slots=True)
class RoutingDecision:
    """cached: tokens of the prompt that the rank has. reason: "prefix": no rank has more of it;
    "load": another has, and is too busy or too full; "none": nobody has any of it."""

    rank: int
    cached: int
    reason: Reason


def choose(
    loads: Mapping[int, RankBacklog],
    cached: Mapping[int, int],
    prompt: int,
    *,
    most_running: int = 2**31,
    first: int = 0,
) -> RoutingDecision:
    """The rank for a prompt.

    Args:
        loads: of the ranks there are, at least one.
        cached: tokens of the prompt that each of them has; those that are not named have none.
        prompt: how many tokens it has.
        most_running: sequences that a rank computes at once. One that has as many is chosen only if
            all have: the prompt would wait there for the end of an answer.
        first: of ranks that are equal, the first from this id on.
    """
    able = {rank: load for rank, load in loads.items() if load.sequences < most_running} or loads

    def cost(rank: int) -> tuple[float, int, bool, int]:
        sequences, ahead, free = able[rank]
        own = prompt - cached.get(rank, 0)
        waits = ahead + SEQUENCE_TOKENS * sequences
        if own > free:
            waits += own - free  # displaced
        return own + _SHARE * waits, sequences, rank < first, rank

    rank = min(able, key=cost)
    here = cached.get(rank, 0)
    most = max((tokens for other, tokens in cached.items() if other in loads), default=0)
    reason: Reason = "none" if most == 0 else "prefix" if here == most else "load"
    return RoutingDecision(rank, here, reason)


class PrefixIndex:
    """By rank: keys of blocks that it can find, and of those that it is going to compute.

    most: keys that a rank can have.
    """

    def __init__(self, most: int = MOST_KEYS) -> None:
        self.most = most
        self._held: dict[int, set[int]] = {}
        self._expected: dict[int, Counter[int]] = {}

    def learn(self, rank: int, added: Iterable[int], removed: Iterable[int]) -> None:
        """A rank has told of changes. Raises: ValueError: it cannot have so many blocks."""
        held = self._held.setdefault(rank, set())
        held.difference_update(removed)
        held.update(added)
        if len(held) > self.most:
            count = len(held)
            del self._held[rank]
            raise ValueError(f"it tells of {count} blocks in its prefix cache, and has {self.most}")

    def reset(self, rank: int, keys: Iterable[int]) -> None:
        """A rank has told of all it has. Raises: ValueError: see `learn`."""
        self._held.pop(rank, None)
        self.learn(rank, keys, ())

    def forget(self, rank: int) -> None:
        """Its process is gone, and its cache with it."""
        self._held.pop(rank, None)
        self._expected.pop(rank, None)

    def expect(self, rank: int, keys: Iterable[int]) -> None:
        """It was given a sequence, whose blocks it will have; see `settle`."""
        self._expected.setdefault(rank, Counter()).update(keys)

    def settle(self, rank: int, keys: Iterable[int]) -> None:
        """The sequence is computed, and the rank has told of its blocks; or it is over."""
        expected = self._expected.get(rank)
        if expected is None:
            return  # it was lost meanwhile
        for key in keys:
            expected[key] -= 1
            if expected[key] <= 0:
                del expected[key]

    def blocks(self, rank: int) -> int:
        """How many blocks it has told of that it can find now."""
        return len(self._held.get(rank, ()))

    def cached(self, prompt: PromptKeys, ranks: Iterable[int]) -> dict[int, int]:
        """How many of the prompt's first tokens each of these ranks has; none: it is left out."""
        found = {}
        for rank in ranks:
            held, expected = self._held.get(rank, ()), self._expected.get(rank, ())
            count = 0
            for key in prompt.keys:
                if key not in held and key not in expected:
                    break
                count += 1
            if count:
                found[rank] = prompt.ends[count - 1]
        return found
