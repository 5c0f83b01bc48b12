"""The GPU a figure was measured on: what it can do at best, and how launches are timed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec
import torch

from flexpert.bench.statistics import SpreadUs
from flexpert.errors import FlexpertError

Launch = Callable[[], object]

_MOVED_BYTES = 2**31
_PRODUCT = 8192


class MeasuredGpu(msgspec.Struct, frozen=True):
    """A GPU and its ceilings, measured when the benchmark began.

    bytes_per_s: of its memory, the best of copying and summing up; flops: of a bf16 product.
    """

    name: str
    driver: str
    torch: str
    triton: str
    bytes_per_s: float
    flops: float

    def line(self) -> str:
        return (
            f"{self.name}, torch {self.torch}, triton {self.triton}; its memory gives "
            f"{self.bytes_per_s / 1e12:.2f} TB/s, a bf16 product does "
            f"{self.flops / 1e12:.0f} TFLOP/s"
        )

    def roofline_s(self, nbytes: float, flops: float) -> float:
        """The least time that memory and arithmetic allow."""
        return max(nbytes / self.bytes_per_s, flops / self.flops)


def gpu_of_rank(rank: int, gpus: int) -> int:
    """Index of a rank's GPU: ranks are dealt out in turn, and share where there are fewer GPUs."""
    return rank % gpus


def most_sharing(ranks: int, gpus: int) -> int:
    """Ranks on the GPU that has most of them."""
    return -(-ranks // gpus)


def set_rank_device(rank: int) -> torch.device:
    """The GPU of a rank, from now on the current one of its process."""
    device = torch.device("cuda", gpu_of_rank(rank, torch.cuda.device_count()))
    torch.cuda.set_device(device)
    return device


def measure_gpu(device: torch.device) -> MeasuredGpu:
    """What the GPU can do at best now."""
    import triton

    return MeasuredGpu(
        name=torch.cuda.get_device_name(device),
        driver=torch.version.cuda or "",
        torch=str(torch.__version__),  # a string of a class of its own
        triton=triton.__version__,
        bytes_per_s=_memory_rate(device),
        flops=_product_rate(device),
    )


def _memory_rate(device: torch.device) -> float:
    """The best of a copy, which writes as much as it reads, and a sum, which only reads."""
    source = torch.empty(_MOVED_BYTES // 4, dtype=torch.float32, device=device).normal_()
    target = torch.empty_like(source)
    ways: list[tuple[Launch, int]] = [
        (lambda: target.copy_(source), 2 * _MOVED_BYTES),
        (lambda: torch.neg(source, out=target), 2 * _MOVED_BYTES),
        (lambda: source.sum(), _MOVED_BYTES),
    ]
    return max(
        nbytes / SpreadUs.of(replay_us([launch] * 4, repeat=5)).p50 * 1e6 for launch, nbytes in ways
    )


def _product_rate(device: torch.device) -> float:
    a = torch.randn(_PRODUCT, _PRODUCT, dtype=torch.bfloat16, device=device)
    return 2 * _PRODUCT**3 / SpreadUs.of(replay_us([lambda: a @ a], repeat=10)).p50 * 1e6


def replay_us(
    launches: Sequence[Launch], *, repeat: int, before: Launch | None = None
) -> list[float]:
    """Microseconds of one launch, in `repeat` replays of a graph of all.

    Args:
        before: runs before each replay and is not timed: new data, a flush of the L2.

    Raises:
        FlexpertError: they cannot be captured, because one waits for the GPU.
    """
    for launch in launches:
        launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for launch in launches:
                launch()
    except RuntimeError as error:
        raise FlexpertError(f"no CUDA graph can be made of it: {error}") from error
    graph.replay()
    return timed_us([graph.replay], repeat=repeat, before=before, parts=len(launches))


def timed_us(
    launches: Sequence[Launch], *, repeat: int, before: Launch | None = None, parts: int = 1
) -> list[float]:
    """Microseconds between two events around all launches, divided by `parts`."""
    times = []
    for _ in range(repeat):
        if before is not None:
            before()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        for launch in launches:
            launch()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / parts)
    return times


def flusher(device: torch.device) -> Launch:
    """Throws everything else out of the L2."""
    room = torch.empty(2**28, dtype=torch.uint8, device=device)
    return room.zero_
