"""Promises to those who drive the service from outside: operations they find again, a cursor."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from support.served_head import Running
from support.waiting import wait_until

from flexpert.cluster.listeners import MOST_KEPT, Listeners
from flexpert.cluster.progress_watch import ProgressWatch
from flexpert.cluster.views import ClusterEvent
from flexpert.errors import CursorLost

EXAMPLE = Path(__file__).parents[2] / "examples" / "reconcile.py"
BEGIN = "/cluster/operations"


@pytest.fixture
def http(server: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url) as client:
        yield client
    server.until(lambda: server.head._running_operation() is None)


def test_the_same_operation_id_is_the_same_operation(server: Running, http: httpx.Client) -> None:
    body = {"ranks": 3, "operation_id": "resize-42"}
    first, again = (http.post(BEGIN, json=body) for _ in range(2))
    assert (first.status_code, first.json()["id"]) == (202, "resize-42")
    assert again.json()["id"] == "resize-42"
    server.until(lambda: server.head._running_operation() is None)
    over = http.post(BEGIN, json=body)
    assert (over.status_code, over.json()["state"]) == (202, "done")
    other = http.post(BEGIN, json={"ranks": 2, "operation_id": "resize-42"})
    assert (other.status_code, other.json()["error"]["code"]) == (409, "operation_conflict")
    assert http.get(f"{BEGIN}/resize-42").json()["state"] == "done"


@pytest.mark.parametrize("id", ["", " a", "a/b", "x" * 129, "-a", 7])
def test_an_operation_id_that_is_none_is_refused(http: httpx.Client, id: object) -> None:
    refused = http.post(BEGIN, json={"ranks": 3, "operation_id": id})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "operation_id")


def test_sglangs_name_of_the_size_is_taken(server: Running, http: httpx.Client) -> None:
    assert http.get("/is_scaling_elastic_ep").json()["is_scaling_elastic_ep"] is False
    assert http.post("/scale_elastic_ep", json={"new_ep_size": 4}).status_code == 200
    assert server.head.ranks == [0, 1, 2, 3]
    both = {"new_ep_size": 3, "new_data_parallel_size": 4}
    assert http.post("/scale_elastic_ep", json=both).status_code == 400
    same = {"new_ep_size": 3, "new_data_parallel_size": 3}
    assert http.post("/scale_elastic_ep", json=same).status_code == 200


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_how_scaling_goes_is_told_to_get_and_post(
    server: Running, http: httpx.Client, method: str
) -> None:
    server.head.behaviour.operation_s = 0.5
    http.post(BEGIN, json={"ranks": 3, "operation_id": f"how-{method}"})
    told = http.request(method, "/is_scaling_elastic_ep").json()
    assert told["is_scaling_elastic_ep"] is True
    assert (told["operation_id"], told["requested_size"]) == (f"how-{method}", 3)
    assert (told["effective_ep_size"], told["pending_ep_size"]) == (2, 3)
    server.until(lambda: server.head._running_operation() is None)
    server.head.behaviour.operation_fails = True
    http.post("/scale_elastic_ep", json={"new_ep_size": 5})
    told = http.request(method, "/is_scaling_elastic_ep").json()
    assert told["is_scaling_elastic_ep"] is False
    assert told["error"] == told["last_error"] == "rank 2 ran out of memory"
    assert (told["requested_size"], told["pending_ep_size"]) == (5, None)


def numbers(lines: Iterator[str], count: int) -> list[int]:
    ids = (int(line[4:]) for line in lines if line.startswith("id: "))
    return list(itertools.islice(ids, count))


@pytest.mark.parametrize("way", ["since", "last-event-id"])
def test_a_listener_goes_on_from_its_cursor(server: Running, http: httpx.Client, way: str) -> None:
    cursor = http.get("/cluster").json()["cursor"]
    happened = ClusterEvent(kind="warning", time=1.0, data={"error": "x"})

    def some() -> None:
        for _ in range(3):
            server.head.listeners.publish(happened)

    server.call(some)
    query = {"since": cursor + 1} if way == "since" else {}
    headers = {"last-event-id": str(cursor + 1)} if way != "since" else {}
    with http.stream("GET", "/cluster/events", params=query, headers=headers) as answered:
        lines = answered.iter_lines()
        assert numbers(lines, 2) == [cursor + 2, cursor + 3]
        server.call(some)
        assert numbers(lines, 3) == [cursor + 4, cursor + 5, cursor + 6]


def test_a_cursor_that_is_lost_is_410(server: Running, http: httpx.Client) -> None:
    latest = http.get("/cluster").json()["cursor"]
    lost = http.get("/cluster/events", params={"since": latest + 1})
    assert (lost.status_code, lost.json()["error"]["code"]) == (410, "cursor_lost")
    assert http.get("/cluster/events", params={"since": "x"}).status_code == 400


def test_no_event_is_skipped_in_silence() -> None:
    listeners = Listeners()
    for _ in range(MOST_KEPT + 10):
        listeners.publish(ClusterEvent(kind="warning", time=1.0, data={}))
    listeners.check(10)
    with pytest.raises(CursorLost, match="GET /cluster"):
        listeners.check(9)


def test_wedged_is_work_without_a_step_and_busy_is_not() -> None:
    clock = [0.0]
    watch = ProgressWatch(30.0, lambda: clock[0])
    clock[0] = 100.0
    assert watch.stuck_s(unfinished=0) is None
    watch.made()
    clock[0] = 129.0
    assert watch.stuck_s(unfinished=5) is None
    clock[0] = 131.0
    assert watch.stuck_s(unfinished=5) == 31.0
    watch.made()
    assert watch.stuck_s(unfinished=500) is None


def test_the_example_controller_survives_its_own_kills(server: Running, tmp_path: Path) -> None:
    """One operation for each wish, however often the controller is killed in the middle of it."""
    server.head.behaviour.operation_s = 1.0
    wish, memory = tmp_path / "desired.txt", tmp_path / "state.json"
    environment = {**os.environ, "RECONCILE_EVERY_S": "0.05"}
    begun = len(server.head._operations)

    def start() -> subprocess.Popen[bytes]:
        command = [sys.executable, str(EXAMPLE), server.url, str(wish), str(memory)]
        return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)

    for ranks in (4, 2):
        wish.write_text(str(ranks))
        for _ in range(2):
            controller = start()
            try:
                wait_until(lambda: server.head._running_operation() is not None, 10)
            finally:
                controller.kill()
                controller.wait()
        controller = start()
        try:
            wait_until(lambda ranks=ranks: server.head.ranks == list(range(ranks)), 10)
        finally:
            controller.kill()
            controller.wait()
    new = list(server.head._operations.values())[begun:]
    assert [one.target for one in new] == [[0, 1, 2, 3], [0, 1]]
    assert json.loads(memory.read_text())["number"] == 2
