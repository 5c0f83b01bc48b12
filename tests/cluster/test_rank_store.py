"""The head's store for ranks that meet: what a rank may do there, and what it may not."""

from __future__ import annotations

import pytest

from flexpert.cluster.rank_store import MOST_BYTES, RankStore
from flexpert.engine.epoch import to_mend
from flexpert.engine.rank_protocol import Contradiction, Prepare, StoreRequest
from flexpert.moe.placement import replan

KEY = "flexpert/0>1"


def _store() -> RankStore:
    store = RankStore()
    assert store.answer(0, StoreRequest(1, "set", KEY, "hello")) == "hello"
    return store


def test_what_is_written_is_read_by_the_other_and_gone_with_the_writer() -> None:
    store = _store()
    assert store.answer(1, StoreRequest(1, "compare_set", KEY)) == "hello"
    store.forget(1)
    assert len(store) == 1
    store.forget(0)
    assert len(store) == 0


def test_who_is_written_to_may_delete() -> None:
    store = _store()
    assert store.answer(1, StoreRequest(1, "delete", KEY)) == ""
    assert len(store) == 0


@pytest.mark.parametrize(
    ("rank", "request_"),
    [
        (1, StoreRequest(1, "set", KEY, "forged")),
        (1, StoreRequest(1, "compare_set", KEY, "forged", "hello")),
        (2, StoreRequest(1, "compare_set", KEY)),
        (2, StoreRequest(1, "delete", KEY)),
        (0, StoreRequest(1, "set", "flexpert/0>1/../x", "y")),
        (0, StoreRequest(1, "set", KEY, "y" * (MOST_BYTES + 1))),
    ],
)
def test_what_is_no_business_of_a_rank_is_refused(rank: int, request_: StoreRequest) -> None:
    store = _store()
    with pytest.raises(Contradiction):
        store.answer(rank, request_)
    assert store.answer(1, StoreRequest(2, "compare_set", KEY)) == "hello"


def test_only_links_to_other_machines_are_mended_by_both_of_a_pair() -> None:
    members = dict.fromkeys(range(4), b"")
    machines = {0: "a", 1: "a", 2: "b", 3: "b"}
    broken = [(0, 1), (0, 2), (3, 1), (0, 7)]
    plan = Prepare(
        2, members, replan(None, range(4), layers=1, experts=4), machines=machines, mend=broken
    )
    found = {rank: to_mend(plan, rank) for rank in range(4)}
    assert found == {0: {2}, 1: {3}, 2: {0}, 3: {1}}
