"""Threads that share work do each piece once, and end together when one fails."""

from __future__ import annotations

import os
import threading

import pytest

from flexpert.parallel import MOST_THREADS, _Pieces, read_threads, run_parallel


def left_over() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("read-")]


@pytest.mark.parametrize("threads", [1, 2, 8])
@pytest.mark.parametrize("count", [0, 1, 500])
def test_each_piece_is_done_once(count: int, threads: int) -> None:
    done: list[int] = []
    run_parallel(range(count), done.append, threads)
    assert sorted(done) == list(range(count))
    assert left_over() == []


def test_as_many_work_at_once_as_were_asked_for() -> None:
    together = threading.Barrier(4)
    run_parallel(range(4), lambda _: together.wait(30), threads=4)
    assert left_over() == []


def test_an_error_is_raised_and_the_others_stop() -> None:
    for _ in range(20):
        done: list[int] = []
        failed, together = threading.Event(), threading.Barrier(4)

        def work(
            piece: int,
            done: list[int] = done,
            failed: threading.Event = failed,
            together: threading.Barrier = together,
        ) -> None:
            done.append(piece)
            if piece < 4:
                together.wait(30)
            if piece == 2:
                failed.set()
                raise OSError("piece 2")
            failed.wait(30)

        with pytest.raises(OSError, match="piece 2"):
            run_parallel(range(100_000_000), work, threads=4)
        assert sorted(done)[:4] == [0, 1, 2, 3]
        assert len(done) < 100_000_000
        assert left_over() == []


def test_the_first_error_is_kept() -> None:
    pieces = _Pieces(range(10))
    first = OSError("first")
    taken = pieces.take()
    assert next(taken) == 0
    pieces.fail(first)
    pieces.fail(ValueError("second"))
    assert pieces.error is first
    assert list(taken) == []


def test_an_error_of_the_only_thread_ends_the_work() -> None:
    done = []

    def work(piece: int) -> None:
        done.append(piece)
        if piece == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_parallel(range(10), work, threads=1)
    assert done == [0, 1, 2, 3]


def test_a_process_that_may_have_no_more_threads_works_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def start(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    done: list[int] = []
    run_parallel(range(10), done.append, threads=4)
    assert done == list(range(10))


def test_threads_are_few_and_no_more_than_cores() -> None:
    assert 1 <= read_threads() <= min(MOST_THREADS, len(os.sched_getaffinity(0)))
