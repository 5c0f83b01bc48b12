"""What the first rank found of the model's modules, later ranks are told."""

from __future__ import annotations

import logging

import pytest
from support.service import Service, answer_all, requests, running
from test_blame import Ranks

from flexpert.engine import rank_protocol as msg
from flexpert.models.fusion_verdicts import MOST_BYTES


def told(ranks: Ranks) -> dict[int, bytes]:
    """Rank → the verdicts that its last process was started with."""
    return dict(call.args for call in ranks.head.spawn.call_args_list)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ([b"first", b"second", b"third"], b"first"),
        ([b"", b"second", b"third"], b"second"),
        ([b"?" * (MOST_BYTES + 1), b"", b"third"], b"third"),
        ([b"", b"", b""], b""),
    ],
    ids=["first", "the first with some", "too long", "none"],
)
def test_a_later_rank_is_told_the_first_verdicts(found: list[bytes], expected: bytes) -> None:
    ranks = Ranks()
    ranks.coordinator.begin_first(3)
    assert told(ranks) == {0: b"", 1: b"", 2: b""}
    for rank, verdicts in enumerate(found):
        hello = msg.Hello(100 + rank, "here", b"", b"", b"", verdicts=verdicts)
        ranks.coordinator.on_report(rank, hello)
    ranks.enter(0, 1, 2)
    ranks.end(1)
    ranks.enter(0, 2)
    ranks.replace()
    assert told(ranks) == {0: b"", 1: expected, 2: b""}


@pytest.mark.slow
def test_a_newcomer_tries_nothing_and_answers_stay_the_same(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG, "flexpert")
    work = requests(12)

    def answers(service: Service) -> list[list[int]]:
        found = service.run(answer_all(service.head, work, clients=6))
        return [answer.tokens for answer in found]

    with running(
        cluster__ranks=1, engine__deterministic=True, engine__kv_memory="32MiB"
    ) as service:
        before = answers(service)
        assert service.change(ranks=2).state == "done"
        assert answers(service) == before
        assert service.change(remove=[0]).state == "done"  # all on the newcomer
        assert answers(service) == before
    came_up = {line[:6]: line for line in caplog.messages if " came up: " in line}
    assert "kernels by trials" in came_up["rank 0"]
    assert "kernels by verdicts" in came_up["rank 1"]
