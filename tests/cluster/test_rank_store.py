"""The store that ranks of different machines meet through takes only what is theirs."""

from __future__ import annotations

import pytest

from flexpert.cluster.rank_store import MOST_BYTES, RankStore
from flexpert.engine.rank_protocol import Contradiction, StoreRequest


def request(operation: str, key: str, value: str = "", expected: str = "") -> StoreRequest:
    return StoreRequest(0, operation, key, value, expected)  # type: ignore[arg-type]


def test_it_answers_as_a_tcp_store() -> None:
    store = RankStore()
    assert store.answer(1, request("compare_set", "flexpert/0>1", "-", "-")) == "-"
    assert store.answer(0, request("set", "flexpert/0>1", "offer")) == "offer"
    assert store.answer(1, request("compare_set", "flexpert/0>1", "-", "-")) == "offer"
    assert store.answer(0, request("compare_set", "flexpert/0>1", "new", "offer")) == "new"
    assert store.answer(0, request("compare_set", "flexpert/0>1", "newer", "offer")) == "new"
    assert store.answer(0, request("compare_set", "flexpert/word/0>2", "first")) == "first"
    assert store.answer(1, request("delete", "flexpert/0>1")) == ""
    assert len(store) == 1
    store.forget(0)
    assert len(store) == 0


@pytest.mark.parametrize(
    ("rank", "asked"),
    [
        (1, request("set", "flexpert/0>1", "x")),
        (1, request("compare_set", "flexpert/0>1", "x")),
        (2, request("compare_set", "flexpert/0>1", "-", "-")),
        (2, request("delete", "flexpert/0>1")),
        (0, request("set", "flexpert/0>1", "x" * (MOST_BYTES + 1))),
        (0, request("set", "elsewhere/0>1", "x")),
        (0, request("set", "flexpert/0>1/../2", "x")),
    ],
)
def test_what_is_not_a_ranks_own_cuts_it_off(rank: int, asked: StoreRequest) -> None:
    with pytest.raises(Contradiction):
        RankStore().answer(rank, asked)


def test_a_rank_fills_no_memory() -> None:
    store = RankStore()

    def fill() -> None:
        for number in range(5000):
            word = "".join(chr(97 + int(digit)) for digit in f"{number:04}")
            store.answer(0, request("set", f"flexpert/{word}/0>1", "x"))

    with pytest.raises(Contradiction):
        fill()
    assert len(store) < 5000
