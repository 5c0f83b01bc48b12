"""The order of work between host and device: waiting, copies from the host, captured graphs.

A CPU computes at once, so there is nothing to wait for; this is also how Triton's interpreter runs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from flexpert.comm.capture_guard import CAPTURE_GUARD
from flexpert.comm.cuda.cuda_runtime import new_stream

Replay = Callable[[], object]


class StreamEvent(Protocol):
    """A point in the work of a stream."""

    def record(self) -> None:
        """It is now: behind all that was launched so far."""

    def synchronize(self) -> None:
        """Wait until the device has come to it; at once if it was never recorded."""


class DeviceStream(Protocol):
    """What the calling thread launches on one device, in order.

    device: where tensors of this stream lie.
    """

    device: torch.device

    def synchronize(self) -> None:
        """Wait until all that was launched is computed."""

    def aside(self) -> contextlib.AbstractContextManager[object]:
        """What this thread launches within goes to a stream that no other thread uses meanwhile,
        and none captures on; it neither waits for other streams' work nor holds it up. Whoever
        needs the result waits for the stream before it leaves, or for an event afterwards."""

    def event(self) -> StreamEvent:
        """A new one, not recorded yet."""

    def host_buffer(self, size: int) -> Tensor:
        """[size] uint8 zeros on the host, from which the device copies without the host."""

    def graph_pool(self) -> object:
        """For `capture`: graphs of one pool, which never run at once, share their memory."""

    def capture(
        self, compute: Callable[[], Tensor], pool: object, *, warm: bool = False
    ) -> tuple[Replay, Tensor]:
        """A graph of `compute`: (how to replay it, where its result is then).

        Args:
            compute: reads and writes memory of fixed places, and does not wait for the device.
            warm: all kernels it launches are loaded; else it is computed once before.
        """


class _Now:
    """The event of a device that is never behind."""

    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        pass


class HostStream:
    """The stream of a CPU. There are no graphs: a replay computes again, over the same memory."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")

    def synchronize(self) -> None:
        pass

    def aside(self) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext()

    def event(self) -> StreamEvent:
        return _Now()

    def host_buffer(self, size: int) -> Tensor:
        return torch.zeros(size, dtype=torch.uint8, device="cpu")

    def graph_pool(self) -> object:
        return None

    def capture(
        self, compute: Callable[[], Tensor], pool: object, *, warm: bool = False
    ) -> tuple[Replay, Tensor]:
        result = compute().clone()
        return lambda: result.copy_(compute()), result


class CudaStream:
    """The stream of a GPU: torch's current one in the calling thread.

    Its other streams are not from torch's pool: that hands out the same 32 again and again, so that
    one thread's copy would be launched on the stream on which another one captures.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._capturing: torch.cuda.Stream | None = None  # all captures are launched on
        self._free: list[torch.cuda.Stream] = []  # for `aside`

    def synchronize(self) -> None:
        torch.cuda.current_stream(self.device).synchronize()

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        try:
            stream = self._free.pop()
        except IndexError:
            stream = new_stream(self.device)
        try:
            with torch.cuda.stream(stream):
                yield
        finally:
            self._free.append(stream)

    def event(self) -> StreamEvent:
        event: StreamEvent = torch.cuda.Event()  # type: ignore[no-untyped-call]
        return event

    def host_buffer(self, size: int) -> Tensor:
        with CAPTURE_GUARD.apart():
            return torch.zeros(size, dtype=torch.uint8, pin_memory=True, device="cpu")

    def graph_pool(self) -> object:
        pool: object = torch.cuda.graph_pool_handle()
        return pool

    def capture(
        self, compute: Callable[[], Tensor], pool: Any, *, warm: bool = False
    ) -> tuple[Replay, Tensor]:
        current = torch.cuda.current_stream(self.device)
        if self._capturing is None:
            self._capturing = new_stream(self.device)
        stream = self._capturing
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            if not warm:
                compute()  # compiles and loads what is still to be
                stream.synchronize()
            graph, result = _captured(compute, pool)
        current.wait_stream(stream)
        return graph.replay, result


def _captured(compute: Callable[[], Tensor], pool: Any) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """Captured on the current stream."""
    graph = torch.cuda.CUDAGraph()
    with CAPTURE_GUARD.capturing():
        # thread_local: another thread may load weights meanwhile
        graph.capture_begin(pool, capture_error_mode="thread_local")
        try:
            result = compute()
        except BaseException:
            with contextlib.suppress(RuntimeError):  # of the broken capture
                graph.capture_end()
            raise
        graph.capture_end()
    return graph, result


def stream_of(device: torch.device) -> DeviceStream:
    """The stream of a device."""
    return CudaStream(device) if device.type == "cuda" else HostStream()
