"""Which lost ranks are started again, and when."""

from __future__ import annotations

import pytest

from flexpert.cluster.restart_policy import HEALTHY_S, Policy, RestartPolicy


def made(policy: Policy = "on-failure") -> RestartPolicy:
    replacements = RestartPolicy(policy, limit=4, backoff_s=1.0, longest_backoff_s=3.0)
    replacements.set_desired({0, 1})
    return replacements


def test_a_lost_rank_is_due_at_once() -> None:
    r = made()
    r.active(1, 0.0)
    assert r.next_s({0, 1}, 10.0) is None
    r.exited(1, -9, 10.0)
    assert r.due({0}, 10.0) == {1}
    assert r.next_s({0}, 10.0) == 0.0


def test_short_lives_wait_longer_each_time_and_are_left_out_in_the_end() -> None:
    r = made()
    waits = []
    for _ in range(4):
        r.active(1, 0.0)
        r.exited(1, -9, 1.0)
        waits.append(r.next_s({0}, 1.0))
    assert waits == [0.0, 1.0, 2.0, None]
    assert r.left_out == {1}
    assert r.due({0}, 1e9) == frozenset()
    r.set_desired({0, 1})
    assert r.due({0}, 1e9) == {1}


def test_one_that_never_came_up_counts_as_short() -> None:
    r = made()
    for _ in range(4):
        r.exited(1, 1, 0.0)
    assert r.left_out == {1}


def test_a_healthy_life_makes_short_ones_forgotten() -> None:
    r = made()
    for _ in range(10):
        r.exited(1, -9, 0.0)
        r.active(1, 0.0)
        r.exited(1, -9, HEALTHY_S)
        assert r.next_s({0}, HEALTHY_S) == 0.0


@pytest.mark.parametrize(
    ("policy", "status", "again"),
    [
        ("always", 0, True),
        ("always", -9, True),
        ("on-failure", 0, False),
        ("on-failure", 1, True),
        ("never", -9, False),
    ],
)
def test_policies(policy: Policy, status: int, again: bool) -> None:
    r = made(policy)
    r.exited(1, status, 0.0)
    assert r.due({0}, 0.0) == ({1} if again else set())
    assert r.desired == ({0, 1} if again else {0})


def test_who_is_not_wanted_is_not_missed() -> None:
    r = made()
    r.exited(7, -9, 0.0)
    assert r.due({0, 1}, 0.0) == frozenset()
    assert r.left_out == frozenset()


def test_all_that_are_missing_are_due_when_the_last_one_is() -> None:
    r = made()
    r.set_desired({0, 1, 2})
    r.exited(1, -9, 0.0)
    for _ in range(2):
        r.exited(2, -9, 0.0)
    assert r.missing({0}) == {1, 2}
    assert (r.next_s({0}, 0.5), r.all_s({0}, 0.5)) == (0.0, 0.5)
    assert r.all_s({0}, 1.0) == 0.0
    assert r.all_s({0, 1, 2}, 0.0) == 0.0
