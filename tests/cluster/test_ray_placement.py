"""On which nodes of Ray ranks are placed, and what is said when there is no room."""

from __future__ import annotations

import pytest

from flexpert.cluster.hosts.ray_placement import NoRoomError, Strategy, choose_nodes, demand_of
from flexpert.cluster.hosts.ray_protocol import RayNode
from flexpert.config import load_config
from flexpert.errors import ConfigError


def node(name: str, cpus: float, **free: float) -> RayNode:
    total = {"CPU": 4.0, **dict.fromkeys(free, 1.0)}
    return RayNode(id=name * 8, host=f"host-{name}", free={"CPU": cpus, **free}, total=total)


def place(
    cpus: dict[str, float],
    count: int,
    strategy: Strategy,
    ranks: dict[str, int] | None = None,
    avoided: str = "",
) -> str:
    chosen = choose_nodes(
        [node(name, free) for name, free in cpus.items()],
        {"CPU": 1.0},
        count,
        strategy,
        ranks={name * 8: held for name, held in (ranks or {}).items()},
        avoided={name * 8 for name in avoided},
    )
    return "".join(sorted(name[0] for name in chosen))


@pytest.mark.parametrize(
    ("cpus", "count", "strategy", "ranks", "expected"),
    [
        ({"a": 4, "b": 4, "c": 4}, 3, "SPREAD", {}, "abc"),
        ({"a": 4, "b": 1}, 4, "SPREAD", {}, "aaab"),
        ({"a": 4, "b": 2, "c": 4}, 2, "SPREAD", {"a": 1, "c": 1}, "bc"),
        ({"a": 2, "b": 3}, 3, "PACK", {}, "bbb"),
        ({"a": 2, "b": 3}, 4, "PACK", {}, "abbb"),
        ({"a": 2, "b": 3}, 2, "PACK", {"a": 1}, "aa"),
        ({"a": 2, "b": 3}, 2, "STRICT_SPREAD", {}, "ab"),
        ({"a": 2, "b": 3}, 3, "STRICT_PACK", {}, "bbb"),
        ({"a": 2, "b": 3}, 2, "STRICT_PACK", {"a": 1}, "aa"),
        ({"a": 0.99995}, 1, "SPREAD", {}, "a"),
    ],
)
def test_each_strategy(
    cpus: dict[str, float],
    count: int,
    strategy: Strategy,
    ranks: dict[str, int],
    expected: str,
) -> None:
    assert place(cpus, count, strategy, ranks) == expected


@pytest.mark.parametrize(
    ("cpus", "count", "strategy", "ranks", "found"),
    [
        ({"a": 1, "b": 0.5}, 2, "SPREAD", {}, 1),
        ({"a": 4, "b": 4}, 2, "STRICT_SPREAD", {"a": 1}, 1),
        ({"a": 2, "b": 2}, 3, "STRICT_PACK", {}, 0),
        ({"a": 2, "b": 4}, 3, "STRICT_PACK", {"a": 1}, 2),
        ({}, 1, "PACK", {}, 0),
    ],
)
def test_no_room(
    cpus: dict[str, float], count: int, strategy: Strategy, ranks: dict[str, int], found: int
) -> None:
    with pytest.raises(NoRoomError, match=rf"no room for {count} more rank.* only for {found}: "):
        place(cpus, count, strategy, ranks)


def test_what_is_missing_is_said_of_each_node() -> None:
    nodes = [node("a", 0.0, GPU=1.0), node("b", 3.0, GPU=0.0)]
    with pytest.raises(NoRoomError) as refused:
        choose_nodes(nodes, {"CPU": 2.0, "GPU": 1.0}, 1, "SPREAD", ranks={"aaaaaaaa": 2})
    assert str(refused.value) == (
        "Ray has no room for 1 more rank with 2 CPU, 1 GPU each (SPREAD), only for 0: node "
        "aaaaaaaa (host-a) has 0 of 4 CPU, 1 of 1 GPU free and 2 of our ranks; node bbbbbbbb "
        "(host-b) has 3 of 4 CPU, 0 of 1 GPU free and 0 of our ranks"
    )


def test_a_long_list_of_nodes_is_cut() -> None:
    with pytest.raises(NoRoomError, match=r"; and 12 more nodes$"):
        place(dict.fromkeys("abcdefghijklmnopqrst", 0.0), 1, "SPREAD")


def test_a_node_that_does_not_answer_is_avoided() -> None:
    assert place({"a": 4, "b": 1}, 1, "SPREAD", avoided="a") == "b"
    with pytest.raises(NoRoomError, match="0 of our ranks, and did not answer lately"):
        place({"a": 4, "b": 1}, 2, "SPREAD", avoided="a")


def test_what_a_rank_needs() -> None:
    assert demand_of(load_config(environment={})) == {"CPU": 1.0}
    given = {
        "engine.device": "cuda",
        "cluster.ray_cpus_per_rank": "2.5",
        "cluster.ray_resources": '{"rack1": 0.1}',
    }
    needed = demand_of(load_config(environment={}, overrides=given))
    assert needed == {"CPU": 2.5, "GPU": 1.0, "rack1": 0.1}


@pytest.mark.parametrize(
    ("setting", "value", "complaint"),
    [
        ("ray_resources", "rack1", "is no JSON object; write for example"),
        ("ray_resources", "[1]", "is no JSON object"),
        ("ray_resources", '{"rack1": 0}', "'rack1': 0 is no amount"),
        ("ray_resources", '{"rack1": 1e400}', "no amount"),
        ("ray_resources", '{"GPU": 2}', "GPU of a rank are"),
        ("ray_cpus_per_rank", "0", "greater than 0"),
        ("ray_address", "ray://head:10001", "write auto, or HOST:PORT"),
        ("ray_address", "head", "write auto, or HOST:PORT"),
        ("ray_strategy", "spread", "SPREAD"),
        ("wait_for_resources", "-1s", "greater than or equal to 0"),
        ("spare_ranks", "1", "spare_ranks needs launcher=local"),
    ],
)
def test_wrong_settings(setting: str, value: str, complaint: str) -> None:
    given = {"cluster.launcher": "ray", f"cluster.{setting}": value}
    with pytest.raises(ConfigError, match=complaint):
        load_config(environment={}, overrides=given)
