"""Which rank the journal gives a sequence to: what is known of loads and caches, put together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from flexpert.cluster.prefix_index import PrefixIndex, RankBacklog, RoutingDecision, choose
from flexpert.engine import rank_protocol as msg
from flexpert.engine.block_keys import (
    PromptKeys,
    prompt_keys,
    stride_of,
    unpack_keys,
)
from flexpert.engine.request import BlockChanges, RequestSequence

Routing = Literal["prefix", "fewest"]

_NO_KEYS = PromptKeys((), ())


@dataclass(frozen=True, slots=True)
class RankCaches:
    """The KV cache of each rank, and what it computes at once. prefix_cache: blocks are found."""

    blocks: int
    block_size: int
    most_running: int
    prefix_cache: bool


@dataclass(frozen=True, slots=True)
class _Placed:
    """A sequence that a rank has to compute. ahead: tokens; 0 once it has said something."""

    rank: int
    keys: Sequence[int]
    ahead: int


class Router:
    """on_decision: told of each sequence for which there was a choice by prefix."""

    def __init__(self, routing: Routing = "prefix") -> None:
        self.on_decision: Callable[[RoutingDecision], None] = lambda decision: None
        self._routing = routing
        self._caches: RankCaches | None = None  # until the model is known, and where none is
        self._stride = 1
        self._index = PrefixIndex()
        self._ahead: Counter[int] = Counter()  # tokens of prompts, by rank
        self._keys: dict[str, PromptKeys] = {}  # of unfinished sequences
        self._placed: dict[str, _Placed] = {}
        self._next = 0  # the rank that is first among equals

    def set_caches(self, caches: RankCaches) -> None:
        self._caches = caches
        self._stride = stride_of(caches.blocks)
        self._index = PrefixIndex(caches.blocks)

    @property
    def by_prefix(self) -> bool:
        return self._routing == "prefix" and self._caches is not None

    # ---- what ranks tell ------------------------------------------------------------------------

    def learn(self, rank: int, changes: BlockChanges | None) -> None:
        """Raises: Contradiction: it cannot be true."""
        if changes is None:
            return
        try:
            self._index.learn(rank, unpack_keys(changes.added), unpack_keys(changes.removed))
        except ValueError as error:
            raise msg.Contradiction(str(error)) from None

    def reset(self, rank: int, blocks: bytes) -> None:
        """Another head's rank has told of all it has. Raises: Contradiction"""
        try:
            self._index.reset(rank, unpack_keys(blocks))
        except ValueError as error:
            raise msg.Contradiction(str(error)) from None

    def forget(self, rank: int) -> None:
        """Its process is gone."""
        self._index.forget(rank)

    def blocks(self, rank: int) -> int:
        """How many blocks of its prefix cache are known; of a large cache, about."""
        return self._index.blocks(rank) * self._stride

    # ---- sequences ------------------------------------------------------------------------------

    def choose(self, sequence: RequestSequence, counts: Mapping[int, int]) -> int:
        """A rank for it, of those with so many sequences each; there is at least one."""
        if not self.by_prefix:
            return min(counts, key=lambda rank: (counts[rank], rank))
        decision = self._decide(sequence, counts, self._index.cached(self._of(sequence), counts))
        self._next = decision.rank + 1
        self.on_decision(decision)
        return decision.rank

    def destination(
        self,
        sequence: RequestSequence,
        counts: Mapping[int, int],
        coming: Mapping[int, set[int]],
    ) -> int:
        """Who goes on with a leaver's sequence, so that a prefix moves to few ranks. coming: keys
        of blocks that will have moved to each; those of this sequence are added."""
        if not self.by_prefix:
            return min(counts, key=lambda rank: (counts[rank], rank))
        keys = self._of(sequence)
        cached = self._index.cached(keys, counts)
        for rank in counts:
            more = coming.get(rank, ())
            moved = next((i for i, key in enumerate(keys.keys) if key not in more), len(keys.keys))
            if moved:
                cached[rank] = max(cached.get(rank, 0), keys.ends[moved - 1])
        rank = self._decide(sequence, counts, cached).rank
        if rank in coming:
            coming[rank].update(keys.keys)
        return rank

    def _decide(
        self, sequence: RequestSequence, counts: Mapping[int, int], cached: Mapping[int, int]
    ) -> RoutingDecision:
        caches = self._caches
        assert caches is not None
        ahead, held = self._ahead.get, self._index.blocks
        all_blocks, stride, size = caches.blocks, self._stride, caches.block_size
        loads = {
            rank: RankBacklog(
                count, ahead(rank, 0), max(0, all_blocks - held(rank) * stride) * size
            )
            for rank, count in counts.items()
        }
        return choose(
            loads,
            cached,
            len(sequence.prompt),
            most_running=caches.most_running,
            first=self._next,
        )

    def placed(self, sequence: RequestSequence, rank: int, computed: int = 0) -> None:
        """A rank was given a sequence. computed: tokens whose keys and values come along."""
        if not self.by_prefix:
            return
        keys = self._of(sequence)
        found = self._index.cached(keys, (rank,)).get(rank, 0)
        tokens = len(sequence.prompt) + len(sequence.generated)
        ahead = max(0, tokens - max(found, computed))
        self._placed[sequence.id] = _Placed(rank, keys.keys, ahead)
        self._index.expect(rank, keys.keys)
        self._ahead[rank] += ahead

    def computed(self, sequence_id: str) -> None:
        """Its rank has said something of it, or has it no more."""
        placed = self._placed.pop(sequence_id, None)
        if placed is not None:
            self._index.settle(placed.rank, placed.keys)
            self._ahead[placed.rank] -= placed.ahead

    def closed(self, sequence_id: str) -> None:
        """It is over."""
        self.computed(sequence_id)
        self._keys.pop(sequence_id, None)

    def _of(self, sequence: RequestSequence) -> PromptKeys:
        """Of its prompt. What it has said itself is on the rank that it comes from, and moves with
        it."""
        found = self._keys.get(sequence.id)
        if found is None:
            found = self._keys[sequence.id] = self._look_up(sequence)
        return found

    def _look_up(self, sequence: RequestSequence) -> PromptKeys:
        caches, params = self._caches, sequence.params
        # a prompt whose log probabilities are asked for is computed whole
        if caches is None or not caches.prefix_cache or params.prompt_logprobs is not None:
            return _NO_KEYS
        return prompt_keys(sequence.prompt, caches.block_size, self._stride, params.cache_salt)
