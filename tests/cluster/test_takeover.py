"""`serve --takeover`: another head gets ranks, requests and port of one that runs."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from support.served import Served, free_port, served
from support.waiting import wait_until

pytestmark = pytest.mark.slow
STREAMS = 16
PROMPTS = 4
TOKENS = 400
LONG = 800  # of an answer that is under way while heads come and go


@contextmanager
def head(folder: Path, port: int, *flags: str) -> Iterator[Served]:
    state = ("--state-dir", str(folder), "--deterministic")
    with served(*state, *flags, port=port) as service:
        yield service


@contextmanager
def started(folder: Path, port: int, *flags: str) -> Iterator[Served]:
    """A head that is to take over; nobody waits until it serves."""
    state = ("--state-dir", str(folder), "--deterministic", "--takeover")
    with served(*state, *flags, port=port, ready=False) as service:
        yield service


def body(number: int, tokens: int = TOKENS, **more: object) -> dict[str, object]:
    asked = {"prompt": [20 + number % PROMPTS, 30, 40], "max_tokens": tokens, "temperature": 0}
    return {**asked, "ignore_eos": True, **more}


class Listener:
    """Asks for one streamed answer after the other, until it is told to stop, and for none twice.

    gap_s: the longest time between two events of one.
    """

    def __init__(self, url: str, number: int, expected: str, tokens: int = TOKENS) -> None:
        self.url, self.number, self.expected, self.tokens = url, number, expected, tokens
        self.stopped = False
        self.events = 0
        self.gap_s = 0.0

    def listen(self) -> None:
        while not self.stopped:
            heard = self.events
            try:
                self.ask()
            except httpx.TransportError:  # who is told to stop may find nobody who listens
                if not self.stopped or self.events > heard:
                    raise

    def ask(self) -> None:
        asked = body(self.number, self.tokens, stream=True)
        pieces, latest = [], 0.0
        with httpx.stream("POST", f"{self.url}/v1/completions", json=asked, timeout=90) as answer:
            assert answer.status_code == 200, answer.read()
            for line in answer.iter_lines():
                if line == "data: [DONE]":
                    assert "".join(pieces) == self.expected
                    return
                if line.startswith("data: "):
                    part = json.loads(line[6:])
                    assert "error" not in part, part
                    now = time.monotonic()
                    self.gap_s = max(self.gap_s, now - latest if latest else 0.0)
                    latest = now
                    self.events += 1
                    pieces.append(part["choices"][0]["text"])
        raise AssertionError("the stream ended before its end")


def whole(url: str, number: int, tokens: int = TOKENS) -> str:
    answer = httpx.post(f"{url}/v1/completions", json=body(number, tokens), timeout=90)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])


class Caller:
    """Asks one short question after the other, on connections that it keeps, until it is told to
    stop. longest_s: that one took."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.stopped = False
        self.count = 0
        self.longest_s = 0.0

    def call(self) -> None:
        with httpx.Client(base_url=self.url, timeout=60) as client:
            while not self.stopped:
                began = time.monotonic()
                asked = body(self.count, 4)
                for answer in (
                    client.post("/v1/completions", json=asked),
                    client.get("/cluster"),
                    client.get("/v1/models"),
                ):
                    assert answer.status_code == 200, answer.text
                self.count += 1
                self.longest_s = max(self.longest_s, time.monotonic() - began)


class Watcher:
    """Listens to the cluster's events, and listens again from the last it has had."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.stopped = False
        self.numbers: list[int] = []

    def watch(self) -> None:
        cursor = int(httpx.get(f"{self.url}/cluster").json()["cursor"])
        while not self.stopped:
            since = self.numbers[-1] if self.numbers else cursor
            try:
                with httpx.stream(
                    "GET", f"{self.url}/cluster/events?since={since}", timeout=0.5
                ) as answer:
                    assert answer.status_code == 200, answer.read()
                    for line in answer.iter_lines():
                        if line.startswith("id: "):
                            self.numbers.append(int(line[4:]))
            except httpx.ReadTimeout:
                pass


def instances(service: Served) -> dict[int, tuple[str, int]]:
    """Id → instance and pid."""
    ranks = service.http("GET", "/cluster").json()["ranks"]
    return {rank["id"]: (rank["instance"], rank["pid"]) for rank in ranks}


def said(service: Served) -> str:
    return service.log.read_text()


def ended(service: Served) -> str:
    """What it has said, when it has ended as it should."""
    assert service.process.wait(60) == 0
    return said(service)


def test_a_head_hands_over_under_load_and_no_client_sees_anything(tmp_path: Path) -> None:
    port, state = free_port(), tmp_path / "state"
    with ThreadPoolExecutor(STREAMS + 8) as pool, head(state, port) as first:
        url = first.url
        undisturbed = [whole(url, number) for number in range(PROMPTS)]
        listeners = [Listener(url, n, undisturbed[n % PROMPTS]) for n in range(STREAMS)]
        caller, watcher = Caller(url), Watcher(url)
        tasks = [pool.submit(caller.call), pool.submit(watcher.watch)]
        tasks += [pool.submit(one.listen) for one in listeners]
        wait_until(lambda: all(one.events > 5 for one in listeners), 60)
        ranks = instances(first)
        asked = {"input": "In the beginning", "max_output_tokens": 4, "store": True}
        kept = httpx.post(f"{url}/v1/responses", json=asked, timeout=60).json()["id"]
        with head(state, port, "--takeover", "--log-level", "debug") as second:
            waiting = pool.submit(whole, url, 1, 4 * TOKENS)  # it is answered by either
            wait_until(lambda: "another head goes on" in said(first), 240)
            calls, events = caller.count, [one.events for one in listeners]
            wait_until(lambda: caller.count > calls + 3, 60)
            wait_until(
                lambda: all(one.events > n + 5 for one, n in zip(listeners, events, strict=True)),
                60,
            )
            open_ = re.search(r"(\d+) connections are served here", said(first))
            assert open_ is not None
            assert int(open_[1]) > STREAMS // 2, "there were streams to be handed over"
            assert instances(second) == ranks
            asked["previous_response_id"] = kept
            goes_on = httpx.post(f"{url}/v1/responses", json=asked, timeout=60)
            assert goes_on.status_code == 200, goes_on.text
            done = second.scale(3)  # of the new head
            assert done["state"] == "done"
            for one in (*listeners, caller, watcher):
                one.stopped = True
            for task in tasks:
                task.result(90)
            assert waiting.result(90)[: len(undisturbed[1])] == undisturbed[1]
            gap_s = max(one.gap_s for one in listeners)
            print(f"longest gap of a stream {gap_s:.3f} s, longest call {caller.longest_s:.3f} s")
            assert "has the service, and nothing is left" in ended(first)
            numbers = watcher.numbers
            assert numbers == list(range(numbers[0], numbers[-1] + 1)), "none lost, none twice"
            assert second.http("GET", f"/cluster/operations/{done['id']}").status_code == 200


def test_whatever_becomes_of_the_new_head_the_old_one_or_a_third_goes_on(tmp_path: Path) -> None:
    port, state = free_port(), tmp_path / "state"
    drain = ("--shutdown-timeout", "60")
    with ThreadPoolExecutor(8) as pool, head(state, port, *drain) as first:
        url = first.url
        expected = whole(url, 0, LONG)
        listeners = [Listener(url, 0, expected, LONG) for _ in range(2)]
        tasks = [pool.submit(one.listen) for one in listeners]
        ranks = instances(first)
        refused = r"engine.kv_block_size: the running ranks have 16, not 32"
        with started(state, port, "--kv-block-size", "32") as new:
            assert new.process.wait(240) == 2
            assert re.search(refused, said(new))
        with started(state, port) as new:
            wait_until(lambda: "while the head of process" in said(new), 240)
            new.process.kill()
            new.process.wait()
        assert "another head goes on" not in said(first)
        assert instances(first) == ranks
        assert whole(url, 0, LONG) == expected
        with started(state, port) as new:
            wait_until(lambda: "another head goes on" in said(first), 240, 0.001)
            for one in listeners:  # whose connections the first still has
                one.stopped = True
            new.process.kill()
            new.process.wait()
        first.process.terminate()  # it waits for them as when any head stops
        with head(state, port, "--resume") as third:
            for task in tasks:
                task.result(90)
            assert instances(third) == ranks
            assert whole(url, 0, LONG) == expected
            assert "stopping: running requests may finish" in ended(first)
