"""Promises of the page at `/` and of the stream it reads, without a browser."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import msgspec
import pytest
from support.large_head import RANKS, LargeHead
from support.served_head import Running

import flexpert.server
from flexpert.cluster.views import ClusterEvent, ClusterView, PlacementView, RankView
from flexpert.server import live_feed
from flexpert.server.dashboard_files import FILES, PATHS
from flexpert.server.live_view import NOT_TOLD, change, median_and_tail

HTML = {"accept": "text/html,application/xhtml+xml"}
KEY = {"authorization": "Bearer secret"}
FOLDER = Path(flexpert.server.__file__).parent / "dashboard"


def events_of(answered: httpx.Response) -> Iterator[tuple[str, dict]]:
    name = ""
    for line in answered.iter_lines():
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            yield name, json.loads(line.removeprefix("data: "))


def view(*ranks: RankView, **fields: object) -> ClusterView:
    placement = PlacementView(layers=1, experts=2, replicas=2, experts_per_rank={})
    known = {"epoch": 1, "model": "m", "max_ranks": 8, "placement": placement, "operation": None}
    return ClusterView(ranks=list(ranks), **{**known, **fields})


def test_a_browser_gets_the_page_and_a_program_what_it_got_before(server: Running) -> None:
    page = httpx.get(server.url, headers=HTML)
    assert page.status_code == 200
    assert page.headers["content-type"].startswith("text/html")
    for accept in ("*/*", "application/json"):
        answered = httpx.get(server.url, headers={"accept": accept})
        assert (answered.status_code, answered.json()["error"]["type"]) == (
            404,
            "invalid_request_error",
        )
    assert httpx.post(server.url, headers=HTML).status_code == 404


def test_the_page_runs_only_what_this_server_gives(server: Running) -> None:
    page = httpx.get(server.url, headers=HTML)
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert not re.search(r"<script(?![^>]*\bsrc=)|\son\w+=|style=|javascript:", page.text)
    for name in FILES:
        if name.endswith((".js", ".css", ".html")) and not name.startswith("vendor/"):
            elsewhere = re.findall(r"https?://[^\s\"')]+", FILES[name].content.decode())
            assert not elsewhere, name


def test_every_file_is_served_and_nothing_else(server: Running) -> None:
    for path in PATHS:
        answered = httpx.get(server.url + path, headers=HTML)
        assert answered.status_code == 200, path
        again = {**HTML, "if-none-match": answered.headers["etag"]}
        assert httpx.get(server.url + path, headers=again).status_code == 304
    page = FILES["index.html"].content.decode()
    referred = re.findall(r'(?:src|href)="(dashboard/[^"]+)"', page)
    assert {f"/{name}" for name in referred} <= PATHS
    for name in ("index.html", "", "../app.py", "%2e%2e/app.py", "vendor", "vendor/uplot.LICENSE"):
        assert httpx.get(f"{server.url}/dashboard/{name}").status_code == 404
    assert (FOLDER / "vendor/uplot.LICENSE").read_text().startswith("The MIT License")


def test_without_the_key_a_browser_sees_the_page_and_nothing_of_the_service(
    closed_server: Running,
) -> None:
    for path in PATHS:
        assert httpx.get(closed_server.url + path, headers=HTML).status_code == 200
    for path in ("/cluster", "/cluster/stream", "/cluster/placement", "/cluster/events"):
        assert httpx.get(closed_server.url + path).status_code == 401


def test_the_stream_begins_with_the_whole_and_goes_on_with_what_is_different(
    server: Running,
) -> None:
    with httpx.stream("GET", f"{server.url}/cluster/stream") as answered:
        events = events_of(answered)
        name, first = next(events)
        assert name == "snapshot"
        assert first["cluster"] == httpx.get(f"{server.url}/cluster").json()
        asked = httpx.post(f"{server.url}/cluster/operations", json={"ranks": 3}).json()
        seen = []
        for name, data in events:
            seen.append(name)
            if name == "operation" and data["data"]["state"] == "done":
                assert data["data"]["id"] == asked["id"]
            if name == "change" and data["ranks"]:
                assert [rank["id"] for rank in data["ranks"]] == [2]
                assert data["cluster"]["epoch"] == first["cluster"]["epoch"] + 1
                break
        assert "operation" in seen
    server.until(lambda: server.app.state.feed.watchers == 0 and server.head.listening == 0)


def test_who_reads_too_slowly_is_told_and_let_go(server: Running) -> None:
    feed = server.app.state.feed
    with httpx.stream("GET", f"{server.url}/cluster/stream") as answered:
        events = events_of(answered)
        next(events)
        one = ClusterEvent(kind="warning", time=1.0, data={"error": "x"})

        def flood() -> None:
            for _ in range(live_feed.MOST_WAITING + 1):
                feed._tell(msgspec.json.encode(one))

        server.call(flood)
        assert "overrun" in [name for name, _ in events]  # and the stream ends
    server.until(lambda: feed.watchers == 0)


def test_no_more_watch_than_there_is_room_for(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_feed, "MOST_WATCHERS", 1)
    with httpx.stream("GET", f"{server.url}/cluster/stream") as answered:
        events = events_of(answered)  # which ends the stream when it is dropped
        next(events)
        refused = httpx.get(f"{server.url}/cluster/stream")
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "overloaded")


def test_what_is_different_is_told_and_no_more() -> None:
    old = RankView(id=0, state="active", host="h", pid=1)
    new = msgspec.structs.replace(old, id=1, pid=2)
    busy = msgspec.structs.replace(old, running=3)
    told = change(view(old), view(busy, new, epoch=2))
    assert told.cluster == {"epoch": 2}
    assert told.ranks[0] == {"id": 0, "running": 3}
    assert told.ranks[1] == msgspec.structs.asdict(new)
    assert change(view(old, new), view(new)).left == [0]
    same = change(view(old), view(old))
    assert (same.cluster, same.ranks, same.left) == ({}, [], [])


def test_what_is_told_each_second_grows_with_the_ranks_and_not_with_their_pairs() -> None:
    head = LargeHead()
    before, after = head.cluster(), head.cluster()
    told = change(before, after)
    assert len(told.ranks) == RANKS
    assert not any(NOT_TOLD & one.keys() for one in told.ranks)
    assert len(msgspec.json.encode(told)) < 300 * RANKS
    waited = msgspec.structs.replace(after.ranks[0], waited_for={1: 9.0}, wire_bytes={1: 9})
    ranks = [waited, *after.ranks[1:]]
    assert change(after, msgspec.structs.replace(after, ranks=ranks)).ranks == []


def test_times_are_a_median_and_a_tail() -> None:
    assert median_and_tail([]) is None
    assert median_and_tail([0.002]) == (2.0, 2.0)
    assert median_and_tail([place / 1000 for place in range(101)]) == (50.0, 95.0)


def test_a_dry_run_says_what_would_move_and_begins_nothing(server: Running) -> None:
    url = f"{server.url}/cluster/operations"
    preview = httpx.post(url, json={"ranks": 4, "dry_run": True})
    assert preview.status_code == 200
    assert (preview.json()["add"], preview.json()["moved_experts"]) == ([2, 3], 16)
    assert httpx.get(f"{server.url}/cluster").json()["operation"] is None
    assert httpx.post(url, json={"ranks": 9, "dry_run": True}).status_code == 400


def test_a_layer_that_there_is_not_is_400(server: Running) -> None:
    placement = httpx.get(f"{server.url}/cluster/placement", params={"layer": 3}).json()
    held = sorted(expert for experts in placement["held"].values() for expert in experts)
    assert held == list(range(16))
    for layer in ("4", "-1", "x"):
        answered = httpx.get(f"{server.url}/cluster/placement", params={"layer": layer})
        assert answered.status_code == 400
