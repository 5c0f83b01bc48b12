"""The block pool against a model of it: nothing leaked, nothing shared wrongly."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from flexpert.engine.blocks import BlockPool, OutOfBlocks, block_digest, chain

SIZE = 2
TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=9)


def put(pool: BlockPool, tokens: list[int]) -> list[int]:
    """What a sequence does with its prompt: match, take, compute, publish."""
    found = pool.match_prefix(tokens)
    pool.share(found)
    blocks = found + pool.allocate(-(-len(tokens) // SIZE) - len(found))
    full = len(tokens) // SIZE
    for block, digest in zip(
        blocks[len(found) : full], chain(tokens, SIZE, [], full)[len(found) :], strict=True
    ):
        pool.publish(block, digest)
    return blocks


def test_a_prefix_is_found_again_but_never_the_whole_prompt() -> None:
    pool = BlockPool(8, SIZE, prefix_cache=True)
    blocks = put(pool, [1, 2, 3, 4])
    pool.free(blocks)
    assert pool.match_prefix([1, 2, 3, 4]) == blocks[:1]
    assert pool.match_prefix([1, 2, 3, 4, 5]) == blocks
    assert pool.match_prefix([1, 2, 9, 4, 5]) == blocks[:1]
    assert pool.match_prefix([3, 4, 5]) == []  # same tokens at another place
    assert pool.used == 0
    assert pool.free_count == 8


def test_what_is_discarded_is_not_found_and_free_unless_somebody_holds_it() -> None:
    pool = BlockPool(8, SIZE, prefix_cache=True)
    blocks = put(pool, [1, 2, 3, 4])
    first, second = chain([1, 2, 3, 4], SIZE, [], 2)
    pool.discard(first)
    assert pool.published(first) == blocks[0]
    pool.free(blocks)
    pool.discard(second)
    assert pool.match_prefix([1, 2, 3, 4, 5]) == blocks[:1]
    assert (pool.idle, pool.free_count, pool.unused) == (1, 8, 7)


def test_without_prefix_cache_nothing_is_found() -> None:
    pool = BlockPool(8, SIZE, prefix_cache=False)
    pool.free(put(pool, [1, 2, 3, 4]))
    assert pool.match_prefix([1, 2, 3, 4, 5]) == []
    assert pool.idle == 0


def test_eviction_takes_the_least_recently_used_and_a_prefix_from_its_end() -> None:
    pool = BlockPool(4, SIZE, prefix_cache=True)
    old, new = put(pool, [1, 1, 1, 1]), put(pool, [2, 2, 2, 2])
    pool.free(old)
    pool.free(new)
    taken = pool.allocate(1)
    assert taken == old[1:]
    assert pool.match_prefix([1, 1, 1, 1, 1]) == old[:1]
    assert pool.match_prefix([2, 2, 2, 2, 2]) == new


def test_free_blocks_are_taken_before_cached_ones() -> None:
    pool = BlockPool(4, SIZE, prefix_cache=True)
    pool.free(put(pool, [1, 1, 1, 1]))
    pool.allocate(2)
    assert pool.idle == 2


def test_too_many_blocks_are_refused_and_nothing_is_taken() -> None:
    pool = BlockPool(4, SIZE, prefix_cache=True)
    pool.allocate(3)
    with pytest.raises(OutOfBlocks, match="2 KV blocks asked for, 1 are free"):
        pool.allocate(2)
    assert pool.free_count == 1


def test_misuse_is_an_error() -> None:
    pool = BlockPool(4, SIZE, prefix_cache=True)
    (block,) = pool.allocate(1)
    pool.publish(block, b"a")
    with pytest.raises(ValueError, match="not a private block"):
        pool.publish(block, b"b")
    pool.free([block])
    with pytest.raises(ValueError, match="more often"):
        pool.free([block])


def test_freeing_private_blocks_reverses_allocation() -> None:
    pool = BlockPool(8, SIZE, prefix_cache=True)
    first = pool.allocate(3)
    second = pool.allocate(2)
    pool.free(second)
    pool.free(first)
    assert pool.allocate(5) == first + second


def test_a_digest_names_all_tokens_before_it() -> None:
    assert block_digest(b"", [1, 2]) != block_digest(block_digest(b"", [0, 0]), [1, 2])
    assert chain([1, 2, 3, 4], 2, [block_digest(b"", [1, 2])], 2) == chain([1, 2, 3, 4], 2, [], 2)


class Pool(RuleBasedStateMachine):
    """Sequences come and go; `content` is what was written into each block."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(7, SIZE, prefix_cache=True)
        self.held: list[tuple[list[int], list[int]]] = []
        self.content: dict[int, list[int]] = {}

    @rule(tokens=TOKENS)
    def come(self, tokens: list[int]) -> None:
        found = self.pool.match_prefix(tokens)
        assert len(found) * SIZE < len(tokens)
        for index, block in enumerate(found):
            assert self.content[block] == tokens[: (index + 1) * SIZE]
        busy = {block for _, blocks in self.held for block in blocks}
        try:
            blocks = put(self.pool, tokens)
        except OutOfBlocks:
            self.pool.free(found)
            return
        assert blocks[: len(found)] == found
        assert not busy & set(blocks[len(found) :])
        for index, block in enumerate(blocks[len(found) :], len(found)):
            self.content[block] = tokens[: (index + 1) * SIZE]
        self.held.append((tokens, blocks))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def go(self, data: st.DataObject) -> None:
        at = data.draw(st.integers(0, len(self.held) - 1))
        _, blocks = self.held.pop(at)
        self.pool.free(blocks)

    @invariant()
    def counts_and_contents_hold(self) -> None:
        held = [block for _, blocks in self.held for block in blocks]
        assert self.pool.used == len(set(held))
        assert all(self.pool.refs(block) == held.count(block) for block in range(7))
        for tokens, blocks in self.held:
            for index, block in enumerate(blocks):
                assert self.content[block] == tokens[: (index + 1) * SIZE]


TestPool = Pool.TestCase
TestPool.settings = settings(
    max_examples=100, stateful_step_count=40, deadline=None, derandomize=True
)
