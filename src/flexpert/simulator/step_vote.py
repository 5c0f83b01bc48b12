"""What a vote costs a rank, by the number of ranks: real windows, all in this process, so that no
vote is waited for."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch

from flexpert.comm.buffer import BufferSpec
from flexpert.comm.host.host_buffer import HostBuffer

_STEPS = 200
_LIMIT_S = 30.0


def vote_us(ranks: int, steps: int = _STEPS) -> float:
    """Processor time of a rank for one vote of so many, in microseconds: it tells all others, and
    reads what they have told. The median of `steps`."""
    spec = BufferSpec(capacity=ranks, max_tokens=1, hidden=8, topk=1, dtype=torch.float32)
    buffers: list[HostBuffer] = []
    try:
        buffers += [HostBuffer(rank, spec, timeout_s=_LIMIT_S) for rank in range(ranks)]
        addresses = {buffer.rank: buffer.address for buffer in buffers}
        for buffer in buffers:
            buffer.connect(addresses)
        for buffer in buffers:
            buffer.set_active(tuple(range(ranks)), 1)
        times = []
        for _ in range(steps):
            begin = time.thread_time_ns()
            for buffer in buffers:
                buffer.post_vote(b"\1\0\0\0")
            for buffer in buffers:
                buffer.collect_votes(_LIMIT_S)
            times.append((time.thread_time_ns() - begin) / 1e3 / ranks)
        return float(np.median(times))
    finally:
        for buffer in buffers:
            buffer.close()


def extrapolated(ranks: Sequence[int], measured_us: Sequence[float], to: int) -> float:
    """By a straight line through what was measured: a vote writes and reads a line a rank."""
    slope, base = np.polyfit(np.array(ranks), np.array(measured_us), 1)
    return float(base + slope * to)
