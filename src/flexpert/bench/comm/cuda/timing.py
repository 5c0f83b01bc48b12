"""How a phase is timed on a GPU.

"shot": the L2 is filled with something else, all ranks meet on the device, and a stamp of the GPU's
clock stands right before and right after the phase, all in one graph: nothing waits for the host.
What two stamps in a row are apart is taken off. The median is over many replays.

"steady": many exchanges in one graph, inputs in turn; the time of a replay over their number.

"eager": many exchanges launched one by one. A call is timed on the host, which waits for nothing in
it; and all of them on the device, over their number.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import globaltimer

FLUSH_BYTES = 256 << 20  # several times the L2 of any GPU so far
_MOST_STAMPS = 1 << 16
_EVENT: Any = torch.cuda.Event


@triton.jit
def _stamp(times, count):  # type: ignore[no-untyped-def]
    tl.store(times + tl.atomic_add(count, 1), globaltimer())


def _nothing(turn: int) -> None:
    pass


def captured(run: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """A graph of what `run` launches; it has run once before."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


class Shots:
    """Single phases after a flush. meet: launches a barrier of all ranks."""

    def __init__(self, meet: Callable[[], None], device: torch.device) -> None:
        # read, not written: else each line that is loaded waits for another to be written back
        self._flush = torch.ones(FLUSH_BYTES // 4, dtype=torch.float32, device=device)
        self._sum = torch.zeros((), dtype=torch.float32, device=device)
        self._times = torch.zeros(_MOST_STAMPS, dtype=torch.int64, device=device)
        self._count = torch.zeros(1, dtype=torch.int32, device=device)
        self._meet = meet
        self._stamp()
        meet()
        torch.cuda.synchronize()

    def _stamp(self) -> None:
        _stamp[(1,)](self._times, self._count, num_warps=1)

    def times(
        self, phases: Sequence[Callable[[int], object]], pool: int, replays: int
    ) -> list[list[float]]:
        """µs: [phases][pool · replays]. phases: launch one input's phase each, in this order."""

        def run() -> None:
            for turn in range(pool):
                for phase in (*phases, _nothing):
                    torch.sum(self._flush, 0, out=self._sum)
                    self._meet()
                    self._stamp()
                    phase(turn)
                    self._stamp()

        graph = captured(run)
        self._count.zero_()
        for _ in range(replays):
            graph.replay()
        torch.cuda.synchronize()
        kinds = len(phases) + 1
        stamps = self._times[: replays * pool * kinds * 2].view(-1, kinds, 2)
        taken = (stamps[..., 1] - stamps[..., 0]).double().cpu() / 1e3
        empty = float(taken[:, -1].median())
        return [(taken[:, at] - empty).tolist() for at in range(len(phases))]


def events() -> tuple[torch.cuda.Event, torch.cuda.Event]:
    """A begin and an end, to be recorded."""
    made: list[Any] = [_EVENT(enable_timing=True) for _ in range(2)]
    return made[0], made[1]


def steady_times(graph: torch.cuda.CUDAGraph, exchanges: int, turns: int) -> list[float]:
    """µs of one exchange in each of `turns` replays of a graph that holds `exchanges` of them."""
    marks = []
    for _ in range(turns):
        begin, end = events()
        begin.record()
        graph.replay()
        end.record()
        marks.append((begin, end))
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) * 1e3 / exchanges for begin, end in marks]


class EagerTimes:
    """Exchanges that are launched one by one; µs.

    dispatch, combine: of the host, one for each call. pair: of the device, one for each round.
    """

    def __init__(self) -> None:
        self.dispatch: list[float] = []
        self.combine: list[float] = []
        self.pair: list[float] = []

    def add_round(
        self,
        dispatch: Callable[[int], object],
        combine: Callable[[int], object],
        turns: Sequence[int],
    ) -> None:
        """turns: inputs of the exchanges, in their order. Returns when the device is done."""
        begin, end = events()
        begin.record()
        for turn in turns:
            begun = time.perf_counter()
            dispatch(turn)
            between = time.perf_counter()
            combine(turn)
            over = time.perf_counter()
            self.dispatch.append((between - begun) * 1e6)
            self.combine.append((over - between) * 1e6)
        end.record()
        torch.cuda.synchronize()
        self.pair.append(begin.elapsed_time(end) * 1e3 / len(turns))


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second, read and written, of a large copy on the device."""
    size = 1 << 30
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = []
    for _ in range(10):
        begin, end = events()
        begin.record()
        target.copy_(source)
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return float(2 * size / sorted(times)[len(times) // 2])
