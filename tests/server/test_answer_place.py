"""Promises to a client that asks for the rest of an answer."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from flexpert.errors import RequestError
from flexpert.server.answer_place import AnswerPlace


def places(last: str, steps: list[list[int]]) -> list[tuple[bytes, bool]]:
    answer = SimpleNamespace(tokens=[])
    place = AnswerPlace(SimpleNamespace(answers=[answer]), last)  # type: ignore[arg-type]
    seen = []
    for step in steps:
        answer.tokens += step
        new = place.advance()
        seen.append((place.id, new))
    return seen


STEPS = [[5], [6], [7, 8], [9]]


def test_the_rest_is_what_comes_after_the_latest_event() -> None:
    whole = places("", STEPS)
    assert all(new for _, new in whole)
    for had, (last, _) in enumerate(whole):
        again = places(last.decode(), STEPS)
        assert [id for id, _ in again] == [id for id, _ in whole]
        assert [new for _, new in again] == [number > had for number in range(len(STEPS))]


@pytest.mark.parametrize("last", ["", "3", "x-00000000", "3-xyz", "-1-00000000"])
def test_an_id_that_is_none_of_ours_gives_the_whole_answer(last: str) -> None:
    assert all(new for _, new in places(last, STEPS))


@pytest.mark.parametrize("other", [[[5], [1], [7, 8]], [[5, 6, 7, 8]], [[5], [6, 7], [8]]])
def test_what_does_not_go_on_from_what_the_client_has_is_refused(other: list[list[int]]) -> None:
    last, _ = places("", STEPS)[1]
    with pytest.raises(RequestError, match="without Last-Event-ID"):
        places(last.decode(), other)
