"""Promises of the control API and of vLLM's elastic endpoints."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator

import httpx
import pytest
from support.fake_head import FakeHead
from support.served_head import Running

from flexpert.cluster.listeners import MOST_WAITING
from flexpert.cluster.views import ClusterEvent
from flexpert.server.control import ControlRoutes
from flexpert.server.http_metrics import ServerMetrics
from flexpert.server.live_feed import LiveFeed


def finish(server: Running) -> None:
    """Let the operation that runs come to its end."""
    server.until(lambda: server.head._running_operation() is None)


@pytest.fixture
def http(server: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url) as client:
        yield client
    finish(server)


def test_the_cluster_is_shown(http: httpx.Client) -> None:
    view = http.get("/cluster").json()
    assert [rank["id"] for rank in view["ranks"]] == [0, 1]
    assert view["operation"] is None
    assert view["placement"]["replicas"] == 16


def test_a_change_is_accepted_watched_and_done(server: Running, http: httpx.Client) -> None:
    accepted = http.post("/cluster/operations", json={"ranks": 4})
    assert accepted.status_code == 202
    operation = accepted.json()
    assert (operation["state"], operation["target"]) == ("preparing", [0, 1, 2, 3])
    assert http.get("/cluster").json()["operation"]["id"] == operation["id"]
    again = http.post("/cluster/operations", json={"ranks": 4})
    assert (again.status_code, again.json()["id"]) == (202, operation["id"])
    other = http.post("/cluster/operations", json={"ranks": 5})
    assert (other.status_code, other.json()["error"]["code"]) == (409, "operation_conflict")
    finish(server)
    done = http.get(accepted.headers["location"]).json()
    assert (done["state"], done["pause_ms"]) == ("done", 3.0)


def test_ranks_join_and_leave_in_one_change(http: httpx.Client) -> None:
    accepted = http.post("/cluster/operations", json={"add": 2, "remove": [1]})
    assert (accepted.status_code, len(accepted.json()["target"])) == (202, 3)


def test_experts_move_between_the_same_ranks(http: httpx.Client) -> None:
    proposed = http.get("/cluster/balance")
    assert (proposed.status_code, proposed.json()["balance"]["mode"]) == (200, "off")
    accepted = http.post("/cluster/operations", json={"rebalance": True})
    assert (accepted.status_code, accepted.json()["target"]) == (202, [0, 1])


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, None),
        ({"ranks": 2, "add": 1}, None),
        ({"ranks": 2, "rebalance": True}, None),
        ({"rebalance": False}, None),
        ({"ranks": 0}, "ranks"),
        ({"ranks": "4"}, "ranks"),
        ({"rank": 4}, "rank"),
        ({"add": -1}, "add"),
        ({"ranks": 9}, None),
    ],
)
def test_a_wrong_change_is_400(
    http: httpx.Client, body: dict[str, object], param: str | None
) -> None:
    refused = http.post("/cluster/operations", json=body)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == param


def test_a_change_can_be_taken_back_until_it_is_over(http: httpx.Client) -> None:
    id = http.post("/cluster/operations", json={"ranks": 3}).json()["id"]
    assert http.delete(f"/cluster/operations/{id}").json()["state"] == "cancelled"
    assert http.delete(f"/cluster/operations/{id}").status_code == 409
    unknown = http.get("/cluster/operations/none")
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "operation_not_found")


def read_events(lines: Iterator[str]) -> Iterator[tuple[str, dict[str, object]]]:
    name = ""
    for line in lines:
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            yield name, json.loads(line.removeprefix("data: "))


def test_events_begin_with_the_whole_view_and_miss_nothing(
    server: Running, http: httpx.Client
) -> None:
    with http.stream("GET", "/cluster/events") as answered:
        assert answered.headers["content-type"].startswith("text/event-stream")
        events = read_events(answered.iter_lines())
        name, view = next(events)
        assert (name, view["epoch"]) == ("cluster", server.head.epoch)
        httpx.post(f"{server.url}/cluster/operations", json={"ranks": 3})
        name, event = next(events)
        assert (name, event["kind"]) == ("operation", "operation")
        states = [event["data"]["state"]]
        while states[-1] == "preparing":
            states.append(next(events)[1]["data"]["state"])
        assert states[-1] == "done"
    server.until(lambda: server.head.listening == 0)


def create_routes(head: FakeHead) -> ControlRoutes:
    closing = asyncio.Event()
    return ControlRoutes(head, closing, LiveFeed(head, ServerMetrics(), closing))


def test_events_are_listened_for_before_the_view_is_taken() -> None:
    async def listening_with_first_event() -> int:
        head = FakeHead()
        events = create_routes(head)._events()
        await anext(events)
        listening = head.listening
        await events.aclose()
        return listening

    assert asyncio.run(listening_with_first_event()) == 1


def test_a_listener_that_does_not_read_is_let_go(server: Running, http: httpx.Client) -> None:
    """Its last event says so; it listens anew and has the whole view again."""
    with http.stream("GET", "/cluster/events") as answered:
        events = read_events(answered.iter_lines())
        assert next(events)[0] == "cluster"
        happened = ClusterEvent(kind="warning", time=1.0, data={"error": "x"})

        def too_many() -> None:  # the loop does nothing else meanwhile
            for _ in range(MOST_WAITING + 2):
                server.head.listeners.publish(happened)

        server.call(too_many)
        assert server.head.listening == 0
        # what it had been handed before may come first
        *before, last = list(events)
        assert [name for name, _ in before] in ([], ["warning"])
        assert last[0] == "overrun"
    with http.stream("GET", "/cluster/events") as answered:
        assert next(read_events(answered.iter_lines()))[0] == "cluster"


def test_a_listener_that_keeps_up_gets_every_event(server: Running, http: httpx.Client) -> None:
    with http.stream("GET", "/cluster/events") as answered:
        events = read_events(answered.iter_lines())
        next(events)
        for number in range(3):

            def some(number: int = number) -> None:
                for place in range(MOST_WAITING // 2):
                    data = {"number": number * (MOST_WAITING // 2) + place}
                    server.head.listeners.publish(ClusterEvent(kind="rank", time=1.0, data=data))

            server.call(some)
            for place in range(MOST_WAITING // 2):
                name, event = next(events)
                assert name == "rank"
                assert event["data"] == {"number": number * (MOST_WAITING // 2) + place}


def test_events_that_fail_are_logged_and_the_client_is_told(
    server: Running,
    http: httpx.Client,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def broken(since: int | None = None) -> AsyncIterator[ClusterEvent]:
        yield ClusterEvent(kind="warning", time=1.0, data={})
        raise RuntimeError("secret detail")

    monkeypatch.setattr(server.head, "events", broken)
    with http.stream("GET", "/cluster/events") as answered:
        text = answered.read().decode()
    assert text.endswith("\n\n")
    assert "internal error" in text.rsplit("data: ", 1)[1]
    assert "secret" not in text
    assert "secret detail" in caplog.text


def test_quiet_event_streams_are_kept_alive(
    http: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flexpert.server.control.KEEP_ALIVE_S", 0.02)
    with http.stream("GET", "/cluster/events") as answered:
        assert any(line == ": keep-alive" for line in answered.iter_lines())


def test_vllms_scaling_waits_until_it_is_done(server: Running, http: httpx.Client) -> None:
    assert http.post("/is_scaling_elastic_ep").json()["is_scaling_elastic_ep"] is False
    done = http.post("/scale_elastic_ep", json={"new_data_parallel_size": 4})
    assert done.status_code == 200
    assert "4" in done.json()["message"]
    assert server.head.ranks == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"new_data_parallel_size": 0},
        {"new_data_parallel_size": "4"},
        {"new_data_parallel_size": 4, "drain_timeout": 0},
        {"new_data_parallel_size": 9},
    ],
)
def test_vllms_scaling_refuses_wrong_bodies(http: httpx.Client, body: dict[str, object]) -> None:
    assert http.post("/scale_elastic_ep", json=body).status_code == 400


def test_vllms_scaling_that_takes_too_long_is_408_and_taken_back(
    server: Running, http: httpx.Client
) -> None:
    server.head.behaviour.operation_s = 1.5
    body = {"new_data_parallel_size": 3, "drain_timeout": 1}
    late = http.post("/scale_elastic_ep", json=body)
    assert late.status_code == 408
    assert "taken back" in late.json()["error"]["message"]
    assert server.head.ranks == [0, 1]


def test_vllms_scaling_that_joined_anothers_change_leaves_it_alone(
    server: Running, http: httpx.Client
) -> None:
    server.head.behaviour.operation_s = 1.3
    http.post("/cluster/operations", json={"ranks": 3})
    assert http.post("/is_scaling_elastic_ep").json()["is_scaling_elastic_ep"] is True
    body = {"new_data_parallel_size": 3, "drain_timeout": 1}
    assert http.post("/scale_elastic_ep", json=body).status_code == 408
    finish(server)
    assert server.head.ranks == [0, 1, 2]


def test_vllms_scaling_that_fails_is_500(server: Running, http: httpx.Client) -> None:
    server.head.behaviour.operation_fails = True
    failed = http.post("/scale_elastic_ep", json={"new_data_parallel_size": 3})
    assert failed.status_code == 500
    assert "out of memory" in failed.json()["error"]["message"]
