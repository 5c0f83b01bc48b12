"""Keys and values that processes share, whoever of them is killed or stopped."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest

from flexpert.comm import CommError
from flexpert.comm.host import memfd
from flexpert.comm.nixl_ep import shared_store
from flexpert.comm.nixl_ep.shared_store import SharedStore, Under

HOLDER = """
import fcntl, sys
fcntl.flock(int(sys.argv[1]), fcntl.LOCK_EX)
print(flush=True)
input()
"""
WRITER = """
import sys
from flexpert.comm.nixl_ep.shared_store import SharedStore
store = SharedStore(int(sys.argv[1]))
print(flush=True)
number = 0
while True:
    number += 1
    store.set("count", str(number))
    store.set("long", str(number % 10) * (number * 37 % 5000))
    store.delete_key("long")
"""


@pytest.fixture
def path() -> Iterator[str]:
    """Each opening of it is as another process's."""
    fd = memfd.create("flexpert-test", 0)
    yield f"/proc/self/fd/{fd}"
    os.close(fd)


def opened(path: str) -> SharedStore:
    return SharedStore(os.open(path, os.O_RDWR))


def test_what_one_sets_the_other_finds(path: str) -> None:
    one, other = opened(path), opened(path)
    one.set("a", b"\x00\xff" * 10000)
    one.set("b", "text")
    assert other.multi_get(["b", "a"]) == [b"text", b"\x00\xff" * 10000]
    assert other.delete_key("a")
    assert not one.delete_key("a")
    assert one.check(["b"])
    assert not one.check(["a", "b"])
    with pytest.raises(KeyError):
        one.multi_get(["a"])


def test_a_key_is_set_if_it_is_as_expected(path: str) -> None:
    store = opened(path)
    assert store.compare_set("a", "-", "x") == b"-"  # missing
    assert not store.check(["a"])
    assert store.compare_set("a", "", "x") == b"x"
    assert store.compare_set("a", "y", "z") == b"x"
    assert store.compare_set("a", "x", "z") == b"z"


def test_of_many_only_one_is_first(path: str) -> None:
    stores = [opened(path) for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        for turn in range(20):
            calls = [
                pool.submit(store.compare_set, f"turn {turn}", "", str(number))
                for number, store in enumerate(stores)
            ]
            assert len({call.result() for call in calls}) == 1


def test_prefixes_keep_pairs_apart(path: str) -> None:
    one, other = Under("x", opened(path)), Under("y", opened(path))
    one.set("key", "1")
    assert not other.check(["key"])
    other.set("key", "2")
    assert one.multi_get(["key"]) == [b"1"]
    assert one.compare_set("key", "1", "3") == b"3"
    assert one.delete_key("key")
    assert other.check(["key"])


def test_a_wait_ends_when_the_key_comes_or_the_time_is_over(path: str) -> None:
    one, other = Under("x", opened(path)), Under("x", opened(path))
    with pytest.raises(TimeoutError, match=r"no .*key within 0\.05 s"):
        one.wait(["key"], timedelta(seconds=0.05))
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(one.wait, ["key", "more"], timedelta(seconds=30))
        other.set("key", "")
        time.sleep(0.05)
        assert not waiting.done()
        other.set("more", "")
        waiting.result(30)


def test_the_memory_does_not_grow(path: str) -> None:
    store = opened(path)
    for number in range(200):
        store.set("key", "x" * (1000 + number % 7))
    assert os.stat(path).st_size < 4000


@pytest.mark.slow
def test_a_writer_that_is_killed_leaves_what_it_wrote_last(path: str) -> None:
    for turn in range(5):
        fd = os.open(path, os.O_RDWR)
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(fd)], pass_fds=[fd], stdout=subprocess.PIPE
        )
        os.close(fd)
        assert writer.stdout
        writer.stdout.readline()
        time.sleep(0.01 + 0.007 * turn)
        writer.kill()
        writer.communicate()
        store = opened(path)
        (count,) = store.multi_get(["count"])
        assert int(count) > 0
        long = store.multi_get(["long"])[0] if store.check(["long"]) else b""
        assert len(set(long)) <= 1
        store.set("count", "0")
        store.close()


def test_a_stopped_process_keeps_nobody_for_ever(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_store, "_LOCK_LIMIT_S", 0.1)
    fd = os.open(path, os.O_RDWR)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(fd)],
        pass_fds=[fd],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    os.close(fd)
    try:
        assert holder.stdout
        holder.stdout.readline()
        os.kill(holder.pid, signal.SIGSTOP)
        store = opened(path)
        with pytest.raises(CommError, match="stopped"):
            store.set("a", "b")
    finally:
        holder.kill()
        holder.communicate()
    store.set("a", "b")
    assert store.check(["a"])


def test_a_closed_store_says_so_and_closes_nothing_else(path: str) -> None:
    store = opened(path)
    store.close()
    reused = os.open(path, os.O_RDWR)
    store.close()
    with pytest.raises(CommError, match="closed"):
        store.check(["a"])
    fcntl.flock(reused, fcntl.LOCK_EX)
    os.close(reused)
