"""A store whose server stops: the calls come back, and all that wait through it have a limit."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection

import pytest
import torch.distributed as dist
from support.comm_ranks import LIMIT_S, context

from flexpert.comm import CommError
from flexpert.comm.agreement import View, agree, asked
from flexpert.comm.bounded import BoundedStore
from flexpert.comm.rendezvous import meet


class Nobody:
    """A host whom nobody comes to meet."""

    def greet(self) -> bytes:
        return b""

    def prepare(self, peer: int, greeting: bytes) -> bytes:
        return b""

    def open(self, peer: int, details: bytes) -> None:
        raise AssertionError("nobody came")

    def forget(self, peer: int) -> None:
        pass


def serve(pipe: Connection) -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    pipe.send(store.port)
    pipe.recv()


@pytest.fixture
def stopped() -> Iterator[dist.Store]:
    """A client of a server that was stopped, and goes on when the test is over."""
    pipe, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    try:
        assert pipe.poll(LIMIT_S)
        client = dist.TCPStore("127.0.0.1", pipe.recv(), is_master=False)
        assert process.pid
        os.kill(process.pid, signal.SIGSTOP)
        yield client
    finally:
        process.kill()
        process.join()


@pytest.mark.parametrize(
    "wait",
    [
        lambda store: agree(store, 1, View(0, (0, 1)), suspects=(0,), timeout_s=0.1),
        lambda store: meet(store, 1, [0], Nobody(), timeout_s=0.1),
        lambda store: asked(store, View(0, (0, 1))),
    ],
    ids=["agree", "meet", "asked"],
)
def test_a_stopped_server_ends_every_wait_with_the_reason(
    stopped: dist.Store, wait: Callable[[dist.Store], object]
) -> None:
    with pytest.raises(CommError, match="the process that serves it is stopped or cut off"):
        wait(stopped)


def test_after_one_call_without_an_answer_all_fail_at_once(stopped: dist.Store) -> None:
    with BoundedStore(stopped, 0.0) as store:
        for _ in range(50):
            with pytest.raises(CommError, match=r"no answer for 1\.0 s"):
                store.compare_set("key", "-", "-")


def test_calls_do_what_those_of_the_store_do_and_leave_no_thread() -> None:
    inner = dist.HashStore()
    before = set(threading.enumerate())  # also what earlier tests left in calls that still wait
    with BoundedStore(inner, LIMIT_S) as store:
        store.set("a", "1")
        assert inner.get("a") == b"1"
        assert store.compare_set("a", "1", "2") == b"2"
        assert store.compare_set("a", "1", "3") == b"2"
        assert store.compare_set("missing", "-", "-") == b"-"
        assert store.compare_set("new", "", "x") == b"x"
        store.delete_key("a")
        assert not inner.check(["a"])
        assert len(set(threading.enumerate()) - before) == 1
    assert set(threading.enumerate()) <= before


def test_what_the_store_raises_reaches_the_caller() -> None:
    class Broken:
        def set(self, key: str, value: str) -> None:
            raise TimeoutError("the store's own")

    with (
        BoundedStore(Broken(), LIMIT_S) as store,  # type: ignore[arg-type]
        pytest.raises(TimeoutError, match="the store's own"),
    ):
        store.set("key", "value")
