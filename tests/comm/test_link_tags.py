"""Two ranks come to the same tags without asking each other; needs neither Triton nor a GPU."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexpert.comm.cuda.cuda_layout import LINK_SHIFT, MAX_EPOCH, MAX_LINK, UNVOTED, tag
from flexpert.comm.cuda.link_tags import Beginning, LinkTags


def pair() -> tuple[LinkTags, LinkTags]:
    """Rank 0's and rank 1's, which have met."""
    both = LinkTags(), LinkTags()
    both[0].meet(1, b"a" * 16, b"b" * 16)
    both[1].meet(0, b"b" * 16, b"a" * 16)
    return both


def begun(both: tuple[LinkTags, LinkTags], exchanges: tuple[int, int] = (0, 0)) -> int:
    """The tag of a link that begins on both sides."""
    first = both[0].begin(1, 0, exchanges[0])
    assert first == both[1].begin(0, 0, exchanges[1])
    assert first.anew
    return first.tag


@given(st.lists(st.sampled_from(["mask", "vote", "meet", "epoch"]), max_size=12))
def test_both_sides_count_alike_and_no_tag_comes_twice(changes: list[str]) -> None:
    both = pair()
    seen = [begun(both)]
    votes = epoch = 0
    for number, change in enumerate(changes, 1):
        if change == "mask":
            both[0].end(1, seen[-1], 2 * number, whole=True)
            both[1].end(0, seen[-1], 5 * number, whole=True)
            first = both[0].begin(1, epoch, 2 * number + 1)
            assert first == both[1].begin(0, epoch, 5 * number + 1)
            assert first == Beginning(first.tag, anew=True)
            seen.append(first.tag)
        elif change == "vote":
            votes += 1
            seen.append(both[0].agree(1, epoch, votes))
            assert seen[-1] == both[1].agree(0, epoch, votes)
        elif change == "epoch":
            epoch += 1
            for own in both:
                own.begin_epoch()
        else:
            both[0].meet(1, b"a" * 16, b"b" * 16)
            both[1].meet(0, b"b" * 16, b"a" * 16)
            first = both[0].begin(1, epoch, 0)
            assert first == both[1].begin(0, epoch, 7)
            seen.append(first.tag)
    assert len(set(seen)) == len(seen)


def test_a_tag_fits_a_flag_and_is_none_that_a_vote_gives() -> None:
    found = begun(pair())
    assert 0 < found < 2**63
    assert found & ((1 << LINK_SHIFT) - 1) == 0
    assert found >= UNVOTED > tag(MAX_EPOCH, MAX_LINK)


def test_processes_that_never_met_have_other_tags() -> None:
    a, b = LinkTags(), LinkTags()
    a.meet(1, b"a" * 16, b"b" * 16)
    b.meet(1, b"a" * 16, b"c" * 16)
    assert a.begin(1, 0, 0).tag != b.begin(1, 0, 0).tag


def test_a_link_goes_on_if_there_was_no_exchange_since() -> None:
    own, _ = both = pair()
    first = begun(both)
    own.end(1, first, 3, whole=True)
    assert own.begin(1, 0, 3) == Beginning(first, anew=False)
    own.end(1, first, 3, whole=True)
    assert own.begin(1, 0, 4).tag != first


@pytest.mark.parametrize("exchanges", [3, 4])
def test_a_link_that_broke_must_be_given_up_by_the_peer_first(exchanges: int) -> None:
    own, _ = both = pair()
    first = begun(both)
    own.end(1, first, 3, whole=False)
    second = own.begin(1, 0, exchanges)
    assert second.anew
    assert second.await_end == first
    own.take_back(1)  # it did not: the next attempt has the same tag
    assert own.begin(1, 0, exchanges) == second
