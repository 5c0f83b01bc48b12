"""nixl_ep.utils: the event of an operation that may still be under way."""

from __future__ import annotations

from types import TracebackType
from typing import Protocol

import torch

from flexpert.compat.nixl_ep.device_exchange import on_gpu


class DeviceEvent(Protocol):
    """Something that happens later."""

    def current_stream_wait(self) -> None:
        """Return when it has happened."""


class EventHandle:
    """The event of what was launched on the current stream of the GPU until now. On a CPU it has
    happened: a call has finished when it returns."""

    def __init__(self) -> None:
        self._event = torch.cuda.current_stream().record_event() if on_gpu() else None

    def current_stream_wait(self) -> None:
        """What is launched on the current stream from now on comes after it."""
        if self._event is not None:
            torch.cuda.current_stream().wait_event(self._event)


class EventOverlap:
    """An event to wait for, as a call or as the end of a `with` block.

    event: None where nothing is under way.
    extra_tensors: kept alive as long as this object.
    """

    def __init__(
        self,
        event: DeviceEvent | None = None,
        extra_tensors: tuple[torch.Tensor, ...] | None = None,
    ) -> None:
        self.event = event
        self.extra_tensors = extra_tensors

    def current_stream_wait(self) -> None:
        """Wait for the event: of dispatch and combine, this is where the rows are received."""
        if self.event is not None:
            self.event.current_stream_wait()

    def __enter__(self) -> EventOverlap:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.current_stream_wait()
