"""One buffer a process: made by the first, grown by others, closed by the last."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from support.comm_ranks import spec_of

from flexpert.comm import CommError
from flexpert.comm.manager import BufferManager


def test_all_get_the_same_buffer_and_the_last_one_closes_it() -> None:
    manager = BufferManager()
    with ThreadPoolExecutor(8) as pool:
        buffers = list(pool.map(lambda _: manager.get(1, spec_of(2)), range(24)))
    assert all(buffer is buffers[0] for buffer in buffers)
    for _ in range(23):
        manager.release()
    buffers[0].barrier(timeout_s=1.0)
    manager.release()
    with pytest.raises(CommError, match="closed"):
        buffers[0].post_vote(b"")
    with pytest.raises(ValueError, match="release without get"):
        manager.release()
    assert manager.get(1, spec_of(2)) is not buffers[0]
    manager.release()


def test_it_grows_with_what_is_asked_and_shrinks_when_told() -> None:
    manager = BufferManager()
    with pytest.raises(ValueError, match="no buffer to resize"):
        manager.resize(4)
    buffer = manager.get(1, spec_of(2))
    manager.get(1, replace(spec_of(7), max_tokens=3))
    assert buffer.spec.capacity == 7
    manager.resize(3)
    assert buffer.spec.capacity == 3
    manager.resize(9)
    assert buffer.spec.capacity == 9
    with pytest.raises(ValueError, match="rank 1 must stay below"):
        manager.resize(1)
    buffer.close()


def test_what_does_not_fit_is_refused_with_the_reason() -> None:
    manager = BufferManager()
    buffer = manager.get(1, spec_of(2))
    for rank, spec, message in (
        (0, spec_of(2), "is rank 1, and not rank 0"),
        (1, spec_of(2, hidden=73), "rows of 72"),
        (1, spec_of(2, dtype=torch.float32), r"not of 72 torch\.float32"),
        (1, spec_of(2, max_tokens=17), "ask for the largest sizes first"),
        (1, spec_of(2, topk=5), "ask for the largest sizes first"),
    ):
        with pytest.raises(ValueError, match=message):
            manager.get(rank, spec)
    manager.release()
    with pytest.raises(CommError, match="closed"):
        buffer.post_vote(b"")
