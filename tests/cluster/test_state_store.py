"""What a head writes down is what another reads; a disk that takes nothing costs only that."""

from __future__ import annotations

import sqlite3
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from support.waiting import wait_until

from flexpert.cluster import state_store
from flexpert.cluster.membership import Phase
from flexpert.cluster.saved_state import SavedCluster, SavedRun, decode_events, encode, runs_of
from flexpert.cluster.state_directory import StateDirectory
from flexpert.cluster.state_store import StateStore, load
from flexpert.config import ClusterConfig
from flexpert.engine.request import RequestSequence, SamplingParams, TokenEvent, TokenLogprobs
from flexpert.errors import ConfigError, ModelError

EMPTY = SavedCluster(
    epoch=3,
    members=frozenset({0, 1}),
    epochs=4,
    phase=Phase.IDLE,
    change=None,
    placement=None,
    desired=frozenset({0, 1}),
    ranks={0: "a", 1: "b"},
    verdicts=b"",
)


def sequence(name: str) -> RequestSequence:
    return RequestSequence(
        id=name, prompt=[1, 2], generated=[], params=SamplingParams(seed=1), eos=()
    )


def event(name: str, position: int, finish: str | None = None) -> TokenEvent:
    return TokenEvent(name, position, [7 + position], None, finish)


class Marks(dict[int, int]):
    """What was said to be written."""

    def __init__(self) -> None:
        self.changed = threading.Event()

    def __call__(self, marks: dict[int, int]) -> None:
        self.update(marks)


@pytest.fixture
def marks() -> Marks:
    return Marks()


def test_another_head_reads_what_was_written(tmp_path: Path, marks: Marks) -> None:
    store = StateStore(tmp_path / "state.sqlite", "{}", marks)
    store.start(keep=False)
    store.opened(sequence("r-1"))
    store.opened(sequence("r-2"))
    published = [event("r-1", position) for position in range(12)]
    for one in published:
        store.published(one)
        store.published(TokenEvent("r-2", one.position, [5], None, None))
    store.closed("r-2")
    store.mark(0, 12)
    wait_until(lambda: marks.get(0) == 12, 10)
    store.cluster(EMPTY, urgent=True)  # is there without a further word, as after SIGKILL
    saved = load(tmp_path / "state.sqlite")
    assert saved is not None
    assert saved.cluster == EMPTY
    (request,) = saved.requests
    assert request.sequence == sequence("r-1")
    assert request.events == published
    store.close(remove=False)
    again = StateStore(tmp_path / "state.sqlite", "{}", marks)
    again.start(keep=True)
    again.published(event("r-1", 12, "length"))
    again.opened(sequence("r-3"))
    again.close(remove=False)
    saved = load(tmp_path / "state.sqlite")
    assert saved is not None
    assert saved.requests[0].events == [*published, event("r-1", 12, "length")]
    again = StateStore(tmp_path / "state.sqlite", "{}", marks)
    again.start(keep=True)
    again.closed("r-1")  # all of it goes, whoever wrote it
    again.close(remove=False)
    with sqlite3.connect(tmp_path / "state.sqlite") as connection:
        assert connection.execute("SELECT id FROM requests").fetchall() == [("r-3",)]
        assert connection.execute("SELECT * FROM tokens").fetchall() == []
    again.close(remove=True)
    assert not list(tmp_path.iterdir())
    assert load(tmp_path / "state.sqlite") is None


def test_with_a_full_disk_serving_goes_on_and_later_all_is_written_anew(
    tmp_path: Path, marks: Marks, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = [True]
    connect = sqlite3.connect

    def small(*args: Any, **more: Any) -> sqlite3.Connection:
        connection: sqlite3.Connection = connect(*args, **more)
        if full[0]:
            connection.execute("PRAGMA max_page_count = 12")  # SQLite's own: the disk is full
        return connection

    monkeypatch.setattr(sqlite3, "connect", small)
    monkeypatch.setattr(state_store, "AGAIN_S", 0.1)
    path = tmp_path / "state.sqlite"
    store = StateStore(path, "{}", marks)
    store.start(keep=False)
    store.cluster(EMPTY, urgent=True)
    assert store.failure is None
    for number in range(3000):
        store.opened(sequence(f"r-{number}"))
    store.mark(1, 5)
    wait_until(lambda: store.failure is not None, 10)
    assert "full" in (store.failure or "")
    wait_until(lambda: marks.get(1) == 5, 10)  # ranks do not keep for ever what nobody writes
    assert not path.exists(), "what it has is not true any more, and must not be resumed"
    store.mark(1, 6)
    wait_until(lambda: marks.get(1) == 6, 10)
    full[0] = False
    wait_until(lambda: store.wants_all, 10)
    store.begin_again(EMPTY, [], [], [(sequence("r-1"), SavedRun(0, [7, 8]))])
    store.published(event("r-1", 2))  # before it is known whether that succeeds
    wait_until(lambda: store.failure is None, 10)
    store.published(event("r-1", 3))
    store.close(remove=False)
    saved = load(path)
    assert saved is not None
    assert saved.requests[0].events == [event("r-1", place) for place in range(4)]


@given(st.data())
def test_what_is_written_of_a_request_is_read_event_by_event(data: st.DataObject) -> None:
    events: list[TokenEvent] = []
    position = 0
    for _ in range(data.draw(st.integers(1, 12))):
        plain = data.draw(st.booleans())
        tokens = data.draw(
            st.lists(st.integers(0, 2**31), min_size=plain, max_size=1 if plain else 3)
        )
        ranked = [TokenLogprobs(-1.5, [4], [-0.5], 2)]
        events.append(
            TokenEvent("r-1", position, tokens, None, None)
            if plain
            else TokenEvent(
                "r-1",
                position + data.draw(st.integers(0, 2)),
                tokens,
                data.draw(st.sampled_from([None, [], ranked])),
                data.draw(st.sampled_from([None, "stop"])),
                data.draw(st.booleans()),
                data.draw(st.sampled_from([None, [], ranked])),
                data.draw(st.integers(0, 2)),
            )
        )
        position = events[-1].position + len(tokens)
    assert decode_events("r-1", encode(runs_of(events))) == events


def test_a_damaged_database_is_refused_with_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "state.sqlite"
    path.write_bytes(b"SQLite format 3\0" + b"\xff" * 4000)
    with pytest.raises(ModelError, match="without --resume"):
        load(path)


def test_hosts_may_join_a_head_that_can_be_resumed_and_ray_is_refused_with_the_reason() -> None:
    state = {"state_dir": "/tmp/state"}
    joined = ClusterConfig.model_validate({**state, "join_listen": "tcp://127.0.0.1:7000"})
    assert joined.state_dir == Path("/tmp/state")
    with pytest.raises(ValidationError, match="Ray ends what a job has started with the job"):
        ClusterConfig.model_validate({**state, "launcher": "ray"})


def test_a_directory_has_one_head_and_is_nobody_else_s(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    first = StateDirectory(folder)
    assert folder.stat().st_mode & 0o777 == 0o700
    with pytest.raises(ConfigError, match="used by a head that runs"):
        StateDirectory(folder)
    first.close()
    StateDirectory(folder).close()
    folder.chmod(0o750)
    with pytest.raises(ConfigError, match="chmod 700"):
        StateDirectory(folder)
    with pytest.raises(ConfigError, match="too long"):
        StateDirectory(tmp_path / ("x" * 120))
