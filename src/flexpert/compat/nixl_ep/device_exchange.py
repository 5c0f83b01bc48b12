"""What an exchange does differently on a CPU (cpu.py) and on a GPU (gpu.py), and which it is."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar, cast

import torch

from flexpert.comm.buffer import Buffer, ExpertTable, Received

Handle = tuple[torch.Tensor, torch.Tensor, int, int]
Phase = Literal["dispatch", "combine"]
A = TypeVar("A")  # what a device remembers of the rows that a dispatch brought

VARIABLE = "FLEXPERT_NIXL_EP_DEVICE"


def desired() -> Literal["cpu", "cuda"]:
    """Where new buffers live: what `VARIABLE` says, else on the GPU if torch sees one.

    Raises: ValueError: it says something else than cpu or cuda.
    """
    asked = os.environ.get(VARIABLE) or ("cuda" if torch.cuda.is_available() else "cpu")
    if asked not in ("cpu", "cuda"):
        raise ValueError(f"{VARIABLE} is {asked!r}, must be 'cpu' or 'cuda'")
    return cast(Literal["cpu", "cuda"], asked)


def on_gpu() -> bool:
    """Whether new buffers are on a GPU; not so in Triton's interpreter."""
    return desired() == "cuda" and torch.cuda.is_available()


@dataclass(slots=True, eq=False)
class DeviceDispatched(Generic[A]):
    """A dispatch of the user's: what was sent, the tensors that show what came, how to combine it.

    experts: [tokens, k], of `Device.routes`.
    recv_x … layout_range: see `Buffer.dispatch`; filled when it is received.
    came: which rows came; None before.
    received: while these rows can be combined without sending anything again.
    """

    experts: torch.Tensor
    table: ExpertTable
    ranks: int
    max_tokens: int
    recv_x: torch.Tensor
    scales: torch.Tensor | None
    recv_count: torch.Tensor
    src_info: torch.Tensor
    layout_range: torch.Tensor
    came: A | None = None
    received: Received | None = None

    @property
    def limit(self) -> int:
        """Rows that an expert has room for."""
        return self.ranks * self.max_tokens

    @property
    def handle(self) -> Handle:
        return self.src_info, self.layout_range, self.max_tokens, self.recv_x.shape[2]


class Device(ABC, Generic[A]):
    """A buffer as `Exchange` uses it.

    core: the buffer.
    at: where all tensors are.
    own_rows_wait: rows for this rank itself are read from x only when they are received.
    """

    core: Buffer
    at: torch.device
    own_rows_wait: bool

    @abstractmethod
    def waited(self, phase: Phase) -> torch.Tensor:
        """[capacity] int64: nanoseconds that this phase has waited for each rank so far."""

    @abstractmethod
    def routes(self, experts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[tokens, k] each: what a dispatch to these experts is called with; and what it is called
        with again, when it is combined later."""

    @abstractmethod
    def recv_x(
        self,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        scale_columns: int,
        scale_dtype: torch.dtype,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """recv_x of this shape and its scales, column-major; None without scales."""

    @abstractmethod
    def staged(self, shape: tuple[int, ...]) -> torch.Tensor:
        """[shape] bfloat16 for the user to write results into."""

    @abstractmethod
    def fill(self, done: DeviceDispatched[A], received: Received) -> A:
        """Write what came into the tensors of `done`."""

    @abstractmethod
    def again(self, done: DeviceDispatched[A], came: A, received: Received) -> A:
        """`came` of the dispatch that repeats `done`; the rows are where they were."""

    @abstractmethod
    def discard(self, received: Received) -> None:
        """Combine nothing, since peers wait for a combine."""

    @abstractmethod
    def combine(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        weights: torch.Tensor,
        came: A,
        received: Received,
        *,
        out: torch.Tensor | None,
        later: bool,
    ) -> Callable[[], torch.Tensor]:
        """Send rows of x home; the result receives the sums, [tokens, hidden of the core].

        x: [experts, limit, hidden], maybe narrower than the core's. weights: of `counting`. out:
        for the sums.
        """

    @abstractmethod
    def counting(
        self, topk_idx: torch.Tensor, weights: torch.Tensor, done: DeviceDispatched[A]
    ) -> torch.Tensor:
        """[tokens, k] float32: the weights for `combine`.

        Raises: ValueError: topk_idx cannot be that of this dispatch.
        """

    def on_stream(self, work: Callable[[], None]) -> Callable[[], None]:
        """`work` for later, in the order of the current stream; what waits for it, then waits."""
        return work
