"""agree: one decision an epoch, whoever dies, and nobody in it that was not heard from."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
import pytest
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from support.comm_ranks import Rank, spec_of

from flexpert.comm import Buffer, CommError, RankTimeout
from flexpert.comm.agreement import SuspectReport, View, accepted, agree, awaited
from flexpert.comm.errors import Evicted

LIMIT_S = 30.0
reports_of = st.dictionaries(
    st.integers(0, 7),
    st.sets(st.integers(0, 7), max_size=4).map(lambda s: SuspectReport(b"", tuple(sorted(s)))),
    min_size=1,
)


@given(reports_of)
def test_nobody_who_stays_suspects_one_who_stays(reports: dict[int, SuspectReport]) -> None:
    staying = accepted(reports)
    assert staying
    assert set(staying) <= set(reports)
    for a in staying:
        assert not set(reports[a].suspects) & set(staying) - {a}


@given(reports_of)
def test_who_is_not_party_to_any_suspicion_stays(reports: dict[int, SuspectReport]) -> None:
    parties = {
        party
        for rank, report in reports.items()
        for other in report.suspects
        if other in reports and other != rank
        for party in (rank, other)
    }
    assert set(reports) - parties <= set(accepted(reports))


def said(**suspects: tuple[int, ...]) -> dict[int, SuspectReport]:
    return {int(rank[1:]): SuspectReport(b"", who) for rank, who in suspects.items()}


def test_the_one_with_more_accusers_goes_and_of_two_equals_the_higher() -> None:
    assert accepted(said(r0=(1,), r1=(0,))) == (0,)
    assert accepted(said(r0=(1,), r1=())) == (0,)
    assert accepted(said(r0=(), r1=(0,), r2=(0,))) == (1, 2)
    assert accepted(said(r0=(3,), r1=(3,), r3=(0, 1))) == (0, 1)
    assert awaited((0, 1, 2, 3), said(r0=(3,), r1=())) == (2,)


@given(st.integers(0, 7), st.sets(st.integers(0, 7), min_size=3))
def test_one_that_suspects_everybody_goes_itself(accuser: int, ids: set[int]) -> None:
    everybody = ids | {accuser}
    reports = {rank: SuspectReport(b"") for rank in everybody}
    reports[accuser] = SuspectReport(b"", tuple(everybody - {accuser}))
    assert accepted(reports) == tuple(sorted(everybody - {accuser}))


def test_a_minority_hears_those_it_suspects_before_it_decides() -> None:
    assert awaited((0, 1, 2), said(r0=(1, 2))) == (1, 2)
    assert awaited((0, 1, 2), said(r0=(1, 2), r1=(0,))) == (2,)  # at odds: neither is most
    assert awaited((0, 1, 2), said(r0=(2,), r1=(2,))) == ()
    assert awaited((0, 1), said(r0=(1,))) == ()  # of two halves the one with the lowest
    assert awaited((0, 1), said(r1=(0,))) == (0,)


# ---- threads over a store -----------------------------------------------------------------------


@pytest.fixture(params=["tcp", "hash"])
def store(request: pytest.FixtureRequest) -> dist.Store:
    if request.param == "hash":
        return dist.HashStore()
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(16) as made:
        yield made


def life_of(rank: int, number: int = 0) -> bytes:
    return bytes([rank, number])


class Group:
    """Calls of agree by several ranks at once."""

    def __init__(self, store: dist.Store, pool: ThreadPoolExecutor) -> None:
        self.store = store
        self.pool = pool

    def ask(self, rank: int, view: View, suspects: tuple[int, ...] = (), **more: Any) -> Any:
        options = {"timeout_s": LIMIT_S, "patience_s": LIMIT_S, "life": life_of(rank)} | more
        return self.pool.submit(agree, self.store, rank, view, suspects=suspects, **options)


@pytest.fixture
def group(store: dist.Store, pool: ThreadPoolExecutor) -> Group:
    return Group(store, pool)


def test_survivors_agree_over_many_epochs_and_leave_few_keys(group: Group) -> None:
    view = View(0, (0, 1, 2, 5))
    for epoch in range(1, 12):
        gone = (5,) if epoch == 3 else ()
        calls = [group.ask(rank, view, gone) for rank in view.ranks if rank not in gone]
        views = {call.result(LIMIT_S) for call in calls}
        assert len(views) == 1
        view = views.pop()
        assert view == View(epoch, (0, 1, 2, 5) if epoch < 3 else (0, 1, 2))
    assert group.store.num_keys() < 40


def test_who_is_silent_is_left_out_and_learns_it_whenever_it_wakes(group: Group) -> None:
    view = View(0, (0, 1, 2))
    for epoch in (1, 2, 3, 4, 5, 6):
        calls = [group.ask(rank, view, patience_s=0.2) for rank in (1, 2)]
        view = calls[0].result(LIMIT_S)
        assert view == calls[1].result(LIMIT_S) == View(epoch, (1, 2))
    with pytest.raises(Evicted) as caught:
        group.ask(0, View(0, (0, 1, 2))).result(LIMIT_S)
    assert (caught.value.rank, caught.value.epoch, caught.value.ranks) == (0, 6, (1, 2))


def test_two_that_suspect_each_other_end_in_one_view(group: Group) -> None:
    view = View(4, (0, 1))
    calls = [group.ask(0, view, (1,)), group.ask(1, view, (0,))]
    assert calls[0].result(LIMIT_S) == View(5, (0,))
    with pytest.raises(Evicted, match="rank 1 was evicted: epoch 5 is rank 0"):
        calls[1].result(LIMIT_S)


def test_one_that_was_stopped_and_suspects_everybody_evicts_only_itself(group: Group) -> None:
    view = View(0, (0, 1, 2))
    woken = group.ask(0, view, (1, 2), patience_s=1.0)
    time.sleep(0.2)  # it is alone with its view of things
    assert not woken.done()
    others = [group.ask(rank, view, (0,), patience_s=1.0) for rank in (1, 2)]
    assert [call.result(LIMIT_S) for call in others] == [View(1, (1, 2))] * 2
    with pytest.raises(Evicted, match="rank 0 was evicted: epoch 1 is rank 1, 2"):
        woken.result(LIMIT_S)


def test_a_newcomer_is_in_the_next_view_and_its_id_is_not_that_of_the_old_process(
    group: Group,
) -> None:
    first = [group.ask(rank, View(0, (0, 1, 2)), (2,)) for rank in (0, 1)]
    view = first[0].result(LIMIT_S)
    assert view == first[1].result(LIMIT_S) == View(1, (0, 1))
    joining = group.ask(2, View(0, ()), joining=True, life=life_of(2, 1))
    time.sleep(0.05)
    second = [group.ask(rank, view) for rank in (0, 1)]
    views = {call.result(LIMIT_S) for call in (*second, joining)}
    assert len(views) == 1
    assert views.pop() == View(2, (0, 1, 2))
    with pytest.raises(Evicted):  # the old process wakes: its id is up, but it is not meant
        group.ask(2, View(0, (0, 1, 2)), life=life_of(2, 0)).result(LIMIT_S)


def test_who_comes_late_gets_what_was_decided(group: Group) -> None:
    view = View(0, (0, 1))
    both = [group.ask(rank, view) for rank in (0, 1)]
    decided = both[0].result(LIMIT_S)
    assert both[1].result(LIMIT_S) == decided
    assert group.ask(1, view).result(LIMIT_S) == decided


def test_waiting_has_a_limit_and_names_who_is_missing(group: Group) -> None:
    with pytest.raises(RankTimeout) as caught:
        group.ask(0, View(7, (0, 3)), timeout_s=0.2, patience_s=10.0).result(LIMIT_S)
    error = caught.value
    assert (error.ranks, error.phase, error.epoch, error.limit_s) == ((3,), "agree", 8, 0.2)


class Mortal:
    """A store whose user dies at the n-th operation."""

    def __init__(self, store: dist.Store, operations: int) -> None:
        self.store = store
        self.left = operations

    def __getattr__(self, name: str) -> Any:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return getattr(self.store, name)


@pytest.mark.parametrize("operations", range(0, 36, 2))
def test_the_decider_may_die_at_any_moment(operations: int, pool: ThreadPoolExecutor) -> None:
    store = dist.HashStore()
    group = Group(store, pool)
    view = View(0, (0, 1, 2))

    def die() -> None:
        with contextlib.suppress(KeyboardInterrupt):  # with many operations it outlives the call
            agree(Mortal(store, operations), 0, view, life=life_of(0), patience_s=0.1)  # type: ignore[arg-type]

    dying = pool.submit(die)
    # one that is not scheduled for that long would be left out, as it should be
    others = [group.ask(rank, view, patience_s=0.4) for rank in (1, 2)]
    views = [call.result(LIMIT_S) for call in others]
    dying.result(LIMIT_S)
    assert views[0] == views[1]
    assert views[0].epoch == 1
    assert {1, 2} <= set(views[0].ranks)


def test_a_store_that_is_gone_is_a_clear_error(pool: ThreadPoolExecutor) -> None:
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    client = dist.TCPStore("127.0.0.1", server.port, is_master=False)
    waiting = Group(client, pool).ask(0, View(0, (0, 1)), patience_s=LIMIT_S)
    threading.Event().wait(0.1)
    del server
    with pytest.raises(CommError, match="store that ranks agree through"):
        waiting.result(LIMIT_S)


# ---- processes ----------------------------------------------------------------------------------


def agrees(buffer: Buffer, port: int, view: View, suspects: tuple[int, ...]) -> View | str:
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    try:
        return agree(store, buffer.rank, view, suspects=suspects, patience_s=LIMIT_S)
    except Evicted as error:
        return str(error)


@pytest.mark.parametrize("signal_", [signal.SIGKILL, signal.SIGSTOP])
def test_processes_agree_without_one_that_is_killed_or_stopped(signal_: int) -> None:
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks = [Rank(rank, spec_of(3)) for rank in range(3)]
    try:
        lost = ranks[0].process.pid
        assert lost
        if signal_ == signal.SIGSTOP:
            os.kill(lost, signal_)
        ranks[0].ask(agrees, server.port, View(0, (0, 1, 2)), ())
        if signal_ == signal.SIGKILL:
            ranks[0].kill()
        for rank in (1, 2):
            ranks[rank].ask(agrees, server.port, View(0, (0, 1, 2)), (0,))
        assert [ranks[rank].answer() for rank in (1, 2)] == [View(1, (1, 2))] * 2
        if signal_ == signal.SIGSTOP:
            os.kill(lost, signal.SIGCONT)
            assert "rank 0 was evicted: epoch 1 is rank 1, 2" in ranks[0].answer()
    finally:
        for rank_ in ranks[0 if signal_ == signal.SIGSTOP else 1 :]:
            rank_.kill()


class Sleeper:
    """A store whose client is stopped, the whole process, in the call with this number."""

    def __init__(self, store: dist.Store, number: int) -> None:
        self.store = store
        self.left = number

    def __getattr__(self, name: str) -> Any:
        self.left -= 1
        if not self.left:
            os.kill(os.getpid(), signal.SIGSTOP)
        return getattr(self.store, name)


def falls_asleep(buffer: Buffer, port: int, view: View, call: int, timeout_s: float) -> str:
    """What comes of a call that waits for all others."""
    store: Any = Sleeper(dist.TCPStore("127.0.0.1", port, is_master=False), call)
    try:
        return str(agree(store, buffer.rank, view, timeout_s=timeout_s, patience_s=LIMIT_S))
    except CommError as error:
        return f"{type(error).__name__}: {error}"


def test_one_that_was_stopped_past_its_limit_learns_what_was_decided(
    pool: ThreadPoolExecutor,
) -> None:
    """Wherever in the call: the time that it was not there for is no reason to know nothing."""
    limit_s = 1.0
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    others = Group(dist.TCPStore("127.0.0.1", server.port, is_master=False), pool)
    sleeper = Rank(0, spec_of(3))
    process = psutil.Process(sleeper.process.pid)
    try:
        for epoch, call in ((0, 1), (2, 4), (4, 9)):  # its first look, its report, a later look
            view = View(epoch, (0, 1, 2))
            sleeper.ask(falls_asleep, server.port, view, call, limit_s)
            while process.status() != psutil.STATUS_STOPPED:
                assert not sleeper.pipe.poll(0.01), sleeper.answer()
            calls = [others.ask(rank, view, suspects=(0,)) for rank in (1, 2)]
            assert {call.result(LIMIT_S) for call in calls} == {View(epoch + 1, (1, 2))}
            time.sleep(limit_s + 1.1)
            process.resume()
            assert sleeper.answer().startswith("Evicted: ")
    finally:
        sleeper.kill()


# ---- what others have written -------------------------------------------------------------------


@settings(deadline=None, max_examples=150)
@given(
    st.dictionaries(
        st.sampled_from(["newest", "1/who", "2/who", "1/report/1", "1/decision", "2/decision"]),
        st.text(max_size=12)
        | st.binary(max_size=12).map(bytes.hex)
        | st.sampled_from(["0 1", "9" * 5000, "-1", "91c401", "80", "\udcff"]),
    )
)
def test_what_no_rank_has_written_is_a_clear_error_or_passed_over(values: dict[str, str]) -> None:
    store = Written({f"flexpert/agree/{key}": value for key, value in values.items()})
    try:
        view = agree(store, 0, View(0, (0,)), timeout_s=0.02, patience_s=0.005)
    except CommError:
        return
    assert 0 in view.ranks


class Written:
    """A store in this process, in which anything may lie."""

    def __init__(self, values: dict[str, str]) -> None:
        self.values = {
            key: value.encode("utf-8", "surrogateescape") for key, value in values.items()
        }

    def set(self, key: str, value: str) -> None:
        self.values[key] = value.encode()

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        found = self.values.get(key, b"")
        if found != expected.encode():
            return found or expected.encode()
        self.values[key] = desired.encode()
        return self.values[key]

    def delete_key(self, key: str) -> bool:
        return self.values.pop(key, None) is not None
