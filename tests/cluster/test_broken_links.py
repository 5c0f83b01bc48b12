"""Of ranks that live and do not reach each other, one is given up: the right one."""

from __future__ import annotations

import pytest

from flexpert.cluster.broken_links import accusations, whom_to_give_up


@pytest.mark.parametrize(
    ("pairs", "victim"),
    [
        (set(), None),
        ({(0, 3)}, 3),
        ({(3, 0)}, 0),
        ({(0, 3), (3, 0)}, 3),
        ({(3, 0), (3, 1), (3, 2)}, 3),
        ({(0, 1), (2, 1), (1, 0), (1, 2)}, 1),
        ({(1, 0), (1, 3), (0, 1), (3, 1)}, 1),
    ],
)
def test_who_is_reached_by_fewest_goes(pairs: set[tuple[int, int]], victim: int | None) -> None:
    assert whom_to_give_up(pairs) == victim


def test_on_one_machine_no_link_breaks() -> None:
    machines = {0: "a", 1: "a", 2: "b"}
    assert accusations(0, [1, 2, 7], machines) == {(0, 2)}
    assert accusations(0, [1], machines) == set()
    assert accusations(9, [1], machines) == set()
