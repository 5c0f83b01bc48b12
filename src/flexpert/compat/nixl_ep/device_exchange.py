"""What an exchange does differently on a CPU (cpu.py) and on a GPU (gpu.py), and which it is."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar, cast

import torch

from flexpert.comm.buffer import Buffer, ExpertTable, Received, Scales

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


@dataclass(frozen=True, slots=True, eq=False)
class DispatchSizes:
    """Of what kind the rows of a dispatch are; one object for all that return equal tensors.

    experts: local ones. ranks: that the tensors are for. max_tokens: of each. hidden: channels.
    """

    experts: int
    ranks: int
    max_tokens: int
    hidden: int
    fp8: Scales | None

    @property
    def limit(self) -> int:
        """Rows that an expert has room for."""
        return self.ranks * self.max_tokens

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of recv_x."""
        return self.experts, self.limit, self.hidden

    @property
    def dtype(self) -> torch.dtype:
        """Of recv_x."""
        return torch.bfloat16 if self.fp8 is None else torch.float8_e4m3fn

    @property
    def scale_columns(self) -> int:
        """Scales of a row: 4 bytes each; 0: none."""
        if self.fp8 is None:
            return 0
        return self.hidden // (512 if self.fp8 == "ue8m0" else 128)

    @property
    def scale_dtype(self) -> torch.dtype:
        return torch.int32 if self.fp8 == "ue8m0" else torch.float32


@dataclass(slots=True, eq=False)
class Returned:
    """The tensors that show a user what came; see `Buffer.dispatch`. Filled when it is received."""

    recv_x: torch.Tensor
    scales: torch.Tensor | None
    recv_count: torch.Tensor
    src_info: torch.Tensor
    layout_range: torch.Tensor


@dataclass(slots=True, eq=False)
class DeviceDispatched(Generic[A]):
    """A dispatch of the user's: what was sent, what is returned, how to combine it.

    experts: [tokens, k], of `Device.routes`.
    came: which rows came; None before.
    received: while these rows can be combined without sending anything again.
    """

    experts: torch.Tensor
    table: ExpertTable
    rows: DispatchSizes
    returned: Returned
    came: A | None = None
    received: Received | None = None

    @property
    def handle(self) -> Handle:
        returned, rows = self.returned, self.rows
        return returned.src_info, returned.layout_range, rows.max_tokens, rows.hidden


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
    def routes(self, experts: torch.Tensor) -> torch.Tensor:
        """[tokens, k]: what a dispatch to these experts is called with."""

    @abstractmethod
    def repeated(self, experts: torch.Tensor) -> torch.Tensor:
        """[tokens, k]: what it is called with again, when it is combined later.

        experts: of `routes`.
        """

    @abstractmethod
    def returned(self, rows: DispatchSizes) -> Returned:
        """Tensors for a dispatch, valid until the dispatch after the next; scales are
        column-major. src_info has memory of its own, by which a handle is known."""

    @abstractmethod
    def staged(self, shape: tuple[int, ...]) -> torch.Tensor:
        """[shape] bfloat16 for the user to write results into."""

    @abstractmethod
    def fill(self, done: DeviceDispatched[A], received: Received) -> A:
        """Write what came into the tensors of `done`."""

    @abstractmethod
    def again(self, done: DeviceDispatched[A], came: A, received: Received) -> A:
        """`came` of the dispatch that repeats `done`; the rows are where they were."""

    def remember(self, done: DeviceDispatched[A], x: torch.Tensor) -> None:
        """After a dispatch of x that was received at once: others like it may be direct."""

    def dispatch_directly(
        self, x: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor, rows: DispatchSizes
    ) -> tuple[Returned, Received, A] | None:
        """A dispatch in as few calls as can be: what `returned` and `fill` return, and what came;
        None: it cannot be done so, whatever the reason, and nothing was."""
        return None

    def combine_directly(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        weights: torch.Tensor,
        came: A,
        received: Received,
        out: torch.Tensor | None,
    ) -> torch.Tensor | None:
        """Likewise a combine."""
        return None

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
    ) -> torch.Tensor:
        """Send rows of x home, and receive the sums, [tokens, hidden of the core].

        x: [experts, limit, hidden], maybe narrower than the core's. weights: of `counting`. out:
        for the sums.
        """

    @abstractmethod
    def begin_combine(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        weights: torch.Tensor,
        came: A,
        received: Received,
        *,
        out: torch.Tensor | None,
    ) -> Callable[[], torch.Tensor]:
        """As `combine`, but that the result receives."""

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
