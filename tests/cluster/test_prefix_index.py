"""Where a prompt goes, and that what the head knows of prefix caches is what ranks have."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from flexpert.cluster.journal import Entry, Journal
from flexpert.cluster.prefix_index import PrefixIndex, RankBacklog, choose
from flexpert.cluster.request_routing import RankCaches, Router
from flexpert.engine.arrivals import Arrivals
from flexpert.engine.block_keys import (
    KeyLog,
    key_of,
    pack_keys,
    prompt_keys,
    stride_of,
    unpack_keys,
)
from flexpert.engine.blocks import BlockPool, OutOfBlocks, block_digest, chain
from flexpert.engine.rank_protocol import Contradiction
from flexpert.engine.request import (
    BlockChanges,
    HeldKV,
    KVMigration,
    RequestSequence,
    SamplingParams,
    TokenEvent,
)

SIZE = 2
BLOCKS = 7
TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=9)


# ---- the choice ---------------------------------------------------------------------------------


def test_a_prefix_outweighs_a_little_load_and_not_much() -> None:
    loads = {0: RankBacklog(4), 1: RankBacklog(0)}
    assert choose(loads, {0: 480}, 512).rank == 0
    far_busier = {0: RankBacklog(20), 1: RankBacklog(0)}
    decision = choose(far_busier, {0: 480}, 512)
    assert (decision.rank, decision.cached, decision.reason) == (1, 0, "load")


def test_prompts_that_wait_to_be_computed_count() -> None:
    assert choose({0: RankBacklog(1, ahead=2000), 1: RankBacklog(1)}, {0: 480}, 512).rank == 1
    assert choose({0: RankBacklog(1, ahead=200), 1: RankBacklog(1)}, {0: 480}, 512).rank == 0


def test_a_rank_where_it_would_wait_for_the_end_of_an_answer_is_not_chosen() -> None:
    loads = {0: RankBacklog(8), 1: RankBacklog(7)}
    assert choose(loads, {0: 10**6}, 10**6 + 1, most_running=8).rank == 1
    everybody = {0: RankBacklog(8), 1: RankBacklog(8)}
    assert choose(everybody, {0: 10**6}, 10**6 + 1, most_running=8).rank == 0


def test_what_is_new_goes_where_it_displaces_nothing() -> None:
    loads = {0: RankBacklog(0, free=0), 1: RankBacklog(0, free=10_000)}
    assert choose(loads, {0: 200}, 1200).rank == 1
    assert choose(loads, {0: 900}, 1200).rank == 0


def test_equal_ranks_take_turns_and_of_equal_costs_the_fewest_sequences_decide() -> None:
    idle = {0: RankBacklog(0), 2: RankBacklog(0), 5: RankBacklog(0)}
    assert [choose(idle, {}, 10, first=first).rank for first in range(7)] == [0, 2, 2, 5, 5, 5, 0]
    assert choose({0: RankBacklog(1, ahead=0), 1: RankBacklog(0, ahead=64)}, {}, 10).rank == 1


@given(
    st.dictionaries(
        st.integers(0, 9),
        st.tuples(st.integers(0, 70), st.integers(0, 9000), st.integers(0, 9000)),
        min_size=1,
    ),
    st.dictionaries(st.integers(0, 9), st.integers(0, 4000)),
    st.integers(4001, 9000),
)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_more_of_the_prefix_or_less_to_do_never_loses_a_rank_its_choice(
    loads: dict[int, tuple[int, int, int]], cached: dict[int, int], prompt: int
) -> None:
    made = {rank: RankBacklog(*load) for rank, load in loads.items()}
    chosen = choose(made, cached, prompt)
    assert chosen.rank in made
    assert chosen.cached == cached.get(chosen.rank, 0)
    better = {**cached, chosen.rank: chosen.cached + 1}
    assert choose(made, better, prompt).rank == chosen.rank
    load = made[chosen.rank]
    less = RankBacklog(max(0, load.sequences - 1), load.ahead // 2, load.free + 1)
    assert choose({**made, chosen.rank: less}, cached, prompt).rank == chosen.rank


# ---- keys ---------------------------------------------------------------------------------------


def test_keys_are_those_of_the_ranks_blocks_with_and_without_a_salt() -> None:
    tokens = list(range(9))
    for salt in ("", "a"):
        digests = chain(tokens, SIZE, [], 4, salt)
        found = prompt_keys(tokens, SIZE, 1, salt)
        assert found.keys == [key_of(digest) for digest in digests]
        assert list(found.ends) == [2, 4, 6, 8]
        assert unpack_keys(pack_keys(digests)) == tuple(found.keys)
    assert not set(prompt_keys(tokens, SIZE, 1, "").keys) & set(
        prompt_keys(tokens, SIZE, 1, "a").keys
    )
    assert prompt_keys([1, 2], SIZE, 1, "").keys == []  # the last token is computed in any case


@given(st.lists(st.integers(0, 2**40), max_size=40), st.integers(1, 5), st.integers(0, 8))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_a_chain_is_the_same_in_one_go_and_block_by_block(
    tokens: list[int], size: int, known: int
) -> None:
    blocks = len(tokens) // size
    one_by_one: list[bytes] = []
    for index in range(blocks):
        parent = one_by_one[-1] if one_by_one else b""
        one_by_one.append(block_digest(parent, tokens[index * size : (index + 1) * size]))
    assert chain(tokens, size, one_by_one[:known], blocks) == one_by_one


def test_of_a_cache_of_millions_of_blocks_the_same_share_of_keys_is_told_and_looked_up() -> None:
    stride = stride_of(2**20)
    assert stride == 8
    tokens = list(range(4001))
    all_keys = prompt_keys(tokens, SIZE, 1, "").keys
    some = prompt_keys(tokens, SIZE, stride, "")
    assert list(some.keys) == [key for key in all_keys if key % stride == 0]
    assert 60 < len(some.keys) < 190  # of 1024 that are looked up
    assert list(some.ends) == [2 * (all_keys.index(key) + 1) for key in some.keys]
    log = KeyLog(stride)
    for digest in chain(tokens, SIZE, [], 1024):
        log.set(digest, True)
    changes = log.take()
    assert changes is not None
    assert set(unpack_keys(changes.added)) == set(some.keys)


def test_what_comes_and_goes_between_two_reports_is_not_told() -> None:
    log, (first, second) = KeyLog(1), chain([1, 2, 3, 4], SIZE, [], 2)
    log.set(first, True)
    log.set(second, True)
    log.set(first, False)
    assert log.take() == BlockChanges(pack_keys([second]), b"")
    log.set(second, False)
    log.set(second, True)
    assert log.take() is None


# ---- the index against the caches of ranks ------------------------------------------------------


class CachedRank:
    """What of a rank concerns its prefix cache, through the parts that real ones have."""

    def __init__(self) -> None:
        self.pool, self.log = BlockPool(BLOCKS, SIZE, prefix_cache=True), KeyLog(1)
        self.pool.watch = self.log.set
        self.held: list[tuple[list[int], list[int]]] = []

    def compute(self, tokens: list[int]) -> None:
        found = self.pool.match_prefix(tokens)
        full = len(tokens) // SIZE
        self.pool.share(found)
        try:
            blocks = found + self.pool.allocate(-(-len(tokens) // SIZE) - len(found))
        except OutOfBlocks:
            self.pool.free(found)
            return
        for block, digest in zip(
            blocks[len(found) : full], chain(tokens, SIZE, [], full)[len(found) :], strict=True
        ):
            self.pool.publish(block, digest)
        self.held.append((tokens, blocks))


class Caches(RuleBasedStateMachine):
    """Ranks compute, finish, are lost, leave with their sequences, and come to another head."""

    def __init__(self) -> None:
        super().__init__()
        self.ranks = {rank: CachedRank() for rank in range(3)}
        self.untold: set[int] = set()
        self.index = PrefixIndex(BLOCKS)

    @rule(rank=st.integers(0, 2), tokens=TOKENS)
    def compute(self, rank: int, tokens: list[int]) -> None:
        self.ranks[rank].compute(tokens)
        self.untold.add(rank)

    @rule(rank=st.integers(0, 2), data=st.data())
    def finish(self, rank: int, data: st.DataObject) -> None:
        held = self.ranks[rank].held
        if held:
            _, blocks = held.pop(data.draw(st.integers(0, len(held) - 1)))
            self.ranks[rank].pool.free(blocks)

    @rule()
    def report(self) -> None:
        for rank in self.untold:
            changes = self.ranks[rank].log.take() or BlockChanges()
            self.index.learn(rank, unpack_keys(changes.added), unpack_keys(changes.removed))
        self.untold.clear()

    @rule(rank=st.integers(0, 2))
    def lose(self, rank: int) -> None:
        self.ranks[rank] = CachedRank()
        self.index.forget(rank)
        self.untold.discard(rank)

    @rule(leaver=st.integers(0, 2), destination=st.integers(0, 2))
    def leave(self, leaver: int, destination: int) -> None:
        """Its sequences move with their blocks, where there is room for them."""
        if leaver == destination:
            return
        here, there = self.ranks[destination], self.ranks[leaver]
        moves = [
            KVMigration(_sequence(str(number), tokens), HeldKV(str(number), len(tokens), blocks))
            for number, (tokens, blocks) in enumerate(there.held)
        ]
        arrivals = Arrivals(here.pool)
        arrivals.reserve(moves, spare=0)
        arrivals.settle()
        for move in moves:
            here.held.append((move.sequence.prompt, arrivals.take(move.held.id)))
        self.untold.add(destination)
        self.lose(leaver)

    @rule()
    def take_over(self) -> None:
        self.index = PrefixIndex(BLOCKS)
        for rank, found in self.ranks.items():
            found.log.take()
            self.index.reset(rank, unpack_keys(pack_keys(found.pool.digests)))
        self.untold.clear()

    @precondition(lambda self: not self.untold)
    @rule(tokens=TOKENS, among=st.sets(st.integers(0, 2)))
    def look_up(self, tokens: list[int], among: set[int]) -> None:
        found = self.index.cached(prompt_keys(tokens, SIZE, 1, ""), among)
        known = {r: len(self.ranks[r].pool.match_prefix(tokens)) * SIZE for r in among}
        assert found == {rank: count for rank, count in known.items() if count}

    @invariant()
    def counts_hold(self) -> None:
        for rank, found in self.ranks.items():
            if rank not in self.untold:
                assert self.index.blocks(rank) == len(list(found.pool.digests))


TestCaches = Caches.TestCase
TestCaches.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, derandomize=True
)


# ---- the journal --------------------------------------------------------------------------------


def _sequence(name: str, prompt: list[int], **params: Any) -> RequestSequence:
    made = SamplingParams(max_tokens=8, temperature=0, **params)
    return RequestSequence(id=name, prompt=prompt, generated=[], params=made, eos=())


class Places:
    """A journal whose ranks are told of by hand."""

    def __init__(self, **changed: Any) -> None:
        self.caches = RankCaches(
            **{
                "blocks": 10**4,
                "block_size": 16,
                "most_running": 64,
                "prefix_cache": True,
                **changed,
            }
        )
        self.router = Router()
        self.router.set_caches(self.caches)
        self.journal = Journal(router=self.router)
        self.decisions: list[str] = []
        self.router.on_decision = lambda decision: self.decisions.append(decision.reason)
        self.entries: dict[str, Entry] = {}

    def ask(self, name: str, prompt: list[int], ranks: range = range(4), **params: Any) -> int:
        made = SamplingParams(max_tokens=8, temperature=0, **params)
        entry = self.entries[name] = self.journal.open(name, prompt, made, (), lambda _: None)
        rank = self.journal.assign(entry, ranks)
        assert rank is not None
        return rank

    def computes(self, name: str) -> None:
        """Its rank reports its blocks, and the first token."""
        entry = self.entries[name]
        assert entry.rank is not None
        request = entry.request
        keys = prompt_keys([*request.prompt, 0], 16, 1, request.params.cache_salt)
        added = b"".join(key.to_bytes(8, "little") for key in keys.keys)
        self.router.learn(entry.rank, BlockChanges(added))
        self.journal.publish(entry.rank, TokenEvent(name, len(entry.generated), [1], None, None))


def prompts(group: int, own: int = 0) -> list[int]:
    return [*(1000 * group + token for token in range(512)), *(7 * own + i for i in range(16))]


def test_a_conversation_comes_back_to_its_rank_and_another_one_goes_elsewhere() -> None:
    places = Places()
    first = places.ask("a", prompts(1))
    places.computes("a")
    other = places.ask("b", prompts(2))
    places.computes("b")
    for name in "ab":
        places.journal.close(name)
    assert first != other
    assert places.ask("a again", [*prompts(1), 5, 6, 7]) == first
    assert places.ask("b again", [*prompts(2), 5, 6, 7]) == other
    assert places.ask("salted", prompts(2), cache_salt="x") not in (first, other)
    assert places.decisions == ["none", "none", "prefix", "prefix", "none"]


def test_a_burst_with_a_new_prefix_goes_where_its_first_went_until_that_is_too_busy() -> None:
    places = Places()
    went = [places.ask(str(n), prompts(1, n)) for n in range(32)]
    assert len(set(went[:5])) == 1
    assert {went.count(rank) for rank in set(went)} <= set(range(6, 11))  # spread by the load
    for name in range(32):
        places.journal.close(str(name))
    assert places.ask("later", prompts(1)) != went[0] or places.decisions[-1] == "none"


def test_a_prefix_is_no_longer_expected_of_a_rank_that_does_not_get_to_it() -> None:
    places = Places()
    rank = places.ask("a", prompts(1))
    assert places.ask("b", prompts(1, 1)) == rank
    places.journal.close("a")
    places.journal.close("b")
    places.ask("c", prompts(1, 2))
    assert places.decisions == ["none", "prefix", "none"]


def test_after_a_loss_what_is_asked_again_is_chosen_by_what_others_have() -> None:
    places = Places()
    rank = places.ask("a", prompts(1))
    places.computes("a")
    other = places.ask("b", prompts(1, 1), ranks=range(rank + 1, rank + 2))
    places.computes("b")
    places.router.forget(rank)
    (moves,) = places.journal.hand_over(rank, [], {0, 1, 2, 3} - {rank}).items()
    assert moves[0] == other
    assert places.router.blocks(rank) == 0


def test_sequences_with_one_prefix_leave_together_and_are_found_where_they_went() -> None:
    places = Places()
    names = [f"{group}.{n}" for group in (1, 2, 3) for n in range(3)]
    for name in names:
        places.ask(name, prompts(int(name[0]), int(name[2])), ranks=range(1))
        places.computes(name)
    held = [HeldKV(name, 512, list(range(32))) for name in names]
    moves = places.journal.assign_destinations(held, (1, 2, 3))
    went = {move.sequence.id[0]: rank for rank, some in moves.items() for move in some}
    assert sorted(went.values()) == [1, 2, 3]  # each prefix to one of them
    assert all(went[move.sequence.id[0]] == rank for rank, some in moves.items() for move in some)
    places.journal.hand_over(0, held, (1, 2, 3))
    places.router.forget(0)
    for name in names:
        places.journal.close(name)
    places.ask("new", prompts(1, 9), ranks=range(1, 4))
    assert places.decisions[-1] == "none"  # until the destinations tell of the blocks


def test_a_rank_that_tells_what_cannot_be_is_not_believed() -> None:
    places = Places(blocks=4)
    with pytest.raises(Contradiction, match="5 blocks in its prefix cache"):
        places.router.learn(0, BlockChanges(b"".join(bytes([n]) * 8 for n in range(5))))
    with pytest.raises(Contradiction, match="no keys"):
        places.router.learn(0, BlockChanges(b"1234567"))
    with pytest.raises(Contradiction, match="no keys"):
        places.router.reset(0, b"1")


def test_where_routing_is_by_the_fewest_nothing_is_looked_up() -> None:
    router = Router("fewest")
    router.set_caches(Places().caches)
    request = _sequence("a", prompts(1))
    assert [router.choose(request, {1: 3, 2: 1, 4: 1}) for _ in range(2)] == [2, 2]
    router.placed(request, 2)
    router.computed("a")
    router.closed("a")


def test_prompt_logprobs_are_computed_whole_and_so_prefer_no_rank() -> None:
    places = Places()
    places.ask("a", prompts(1))
    places.computes("a")
    places.ask("b", prompts(1), prompt_logprobs=0)
    assert places.decisions == ["none", "none"]


def test_unfinished_sequences_leave_nothing_behind() -> None:
    places = Places()
    for n in range(20):
        places.ask(str(n), prompts(n % 3, n))
        if n % 2:
            places.computes(str(n))
    for n in range(20):
        places.journal.close(str(n))
    router = places.router
    assert not router._keys
    assert not router._placed
    assert not any(router._ahead.values())
    assert not any(router._index._expected.values())
