"""What exchanges between devices have in common: the host's part of the contract.

Rows go from device to device in ways of their own. What is agreed by hosts goes through a
`HostBuffer` of the smallest size: addresses, votes, which links are up, whose process has exited.
"""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Generic, Literal, TypeVar

import torch

from flexpert.comm.buffer import (
    Buffer,
    BufferSpec,
    Channel,
    ExpertTable,
    MissingResults,
    OnTimeout,
    Pending,
    Received,
    Statistics,
)
from flexpert.comm.errors import CommError, Interrupted, RankLost, RankTimeout, StaleEpoch
from flexpert.comm.host.core import State
from flexpert.comm.host.host_buffer import HostBuffer
from flexpert.comm.interpreter import INTERPRETED

if TYPE_CHECKING:
    from collections.abc import Iterable

    from flexpert.comm.bounded import StoreKeys

T = TypeVar("T")

CPU = torch.device("cpu")

MOST_KINDS = 4096  # of arguments that are remembered
_CONTROL_HIDDEN = 16  # rows of the control buffer are never used


class Hook(Pending[T], Generic[T]):
    """A receiving half that is a function."""

    def __init__(self, receive: Callable[[float | None], T]) -> None:
        self._receive = receive

    def __call__(self, timeout_s: float | None = None) -> T:
        return self._receive(timeout_s)


class DeviceBuffer(Buffer):
    """The half of a `Buffer` that is the same for all devices.

    All launches must be on one stream, the current one of the caller.
    """

    def __init__(
        self,
        rank: int,
        spec: BufferSpec,
        *,
        timeout_s: float,
        on_timeout: OnTimeout,
        store: StoreKeys | None,
        device: torch.device,
        channel: Channel = "shm",
        machine: str | None = None,
        listener: Callable[[int, bool], None] | None = None,
    ) -> None:
        """channel, machine: see `make_buffer`. listener: see `HostBuffer`."""
        self.rank, self.spec, self.timeout_s = rank, spec, timeout_s
        self.device = device
        self.sequence = 0
        self._cuda = device.type == "cuda"
        self._lenient = on_timeout == "mask"
        self._store = store
        self._control = HostBuffer(
            rank,
            BufferSpec(spec.capacity, 1, _CONTROL_HIDDEN, 1, torch.float32),
            timeout_s=timeout_s,
            on_timeout=on_timeout,
            store=store,
            channel=channel,
            machine=machine,
            listener=listener,
        )
        self._lock = threading.RLock()  # exchanges and votes
        self._changes = threading.RLock()
        self._changed = False
        self._state = State.BETWEEN
        self._must_vote = False
        self._received: Received | None = None
        self._exchanges = 0
        self._room: torch.Tensor | None = None
        self._fitting: set[tuple[object, ...]] = set()  # kinds of arguments that were checked

    # ---- what a device adds -------------------------------------------------------------------

    @property
    @abstractmethod
    def most_rows(self) -> int:
        """Rows that one dispatch may bring."""

    @property
    @abstractmethod
    def _stopped(self) -> bool:
        """`interrupt` was called since the epoch began."""

    @abstractmethod
    def count(self, received: Received) -> int:
        """Rows of a dispatch; waits for the device."""

    # ---- membership ---------------------------------------------------------------------------

    @property
    def active(self) -> tuple[int, ...]:
        return self._control.active

    @property
    def epoch(self) -> int:
        return self._control.epoch

    @property
    def lost(self) -> dict[int, str]:
        return self._control.lost

    def channel(self, peer: int) -> Literal["self", "shm", "nixl"]:
        """ "shm" means memory that both GPUs reach, "nixl" that hosts exchange."""
        return self._control.channel(peer)

    def grow(self, capacity: int) -> None:
        if capacity != self.spec.capacity:
            raise ValueError(
                f"the memory of GPU ranks is made for capacity {self.spec.capacity}; "
                f"start with the largest capacity instead of growing to {capacity}"
            )

    def shrink(self, capacity: int) -> None:
        """Only disconnects; the memory keeps its size."""
        self._control.shrink(capacity)
        self.disconnect([peer for peer in self.connected if peer >= capacity])

    def unmask(self, ids: Iterable[int]) -> None:
        self._control.unmask(ids)

    # ---- votes --------------------------------------------------------------------------------

    def wait_for_vote(self, timeout_s: float | None) -> bool:
        return self._control.wait_for_vote(timeout_s)

    def ring(self) -> None:
        self._control.ring()

    # ---- the exchange -------------------------------------------------------------------------

    def combine_input(self, received: Received) -> torch.Tensor:
        """While a graph is captured: of the most rows there can be."""
        if self._room is None:
            shape = (self.most_rows, self.spec.hidden)
            self._room = torch.empty(shape, dtype=self.spec.dtype, device=self.device)
        return self._room if self._capturing else self._room[: self.count(received)]

    def statistics(self) -> Statistics:
        """Bytes and waits are not counted on the GPU: they are 0."""
        zero = dict.fromkeys(range(self.spec.capacity), 0)
        return Statistics(self._exchanges, zero, dict(zero), dict(zero))

    def holds(self, received: Received) -> bool:
        """Whether the rows of a dispatch still lie where they arrived."""
        return received is self._received and self._state is State.RECEIVED

    # ---- where this rank stands -----------------------------------------------------------------

    @property
    def _capturing(self) -> bool:
        return self._cuda and torch.cuda.is_current_stream_capturing()

    def _synchronize(self) -> None:
        if self._cuda:
            torch.cuda.current_stream(self.device).synchronize()

    def _check_whole(self) -> None:
        if self._state is State.CLOSED:
            raise CommError(f"the buffer of rank {self.rank} is closed")
        if self._stopped:
            raise Interrupted(f"rank {self.rank} was interrupted (epoch {self.epoch})")
        if self._state is State.BROKEN:
            raise StaleEpoch(
                f"epoch {self.epoch} is over for rank {self.rank}: an exchange was incomplete; "
                "begin another with set_active"
            )

    def _check_between(self, otherwise: str) -> None:
        self._check_whole()
        if self._state is not State.BETWEEN:
            raise CommError(f"{otherwise} (epoch {self.epoch})")

    def _check_voted(self, why: str) -> None:
        if self._must_vote:
            raise CommError(f"dispatch before the first vote of epoch {self.epoch}: {why}")

    def _check_turn(self, state: State, sequence: int, phase: str) -> None:
        if self._state is not state or sequence != self.sequence:
            raise StaleEpoch(
                f"{phase} {sequence} cannot be received now (epoch {self.epoch}); "
                f"call what begin_{phase} returned once, before anything else"
            )

    def _check_combines(self, received: Received) -> None:
        self._check_whole()
        if not self.holds(received):
            raise StaleEpoch(
                f"combine for dispatch {received.sequence} of epoch {received.epoch}, but the "
                f"last is {self.sequence} of epoch {self.epoch}, "
                + ("combined already" if self._state is State.BETWEEN else "not combined")
            )

    def _check_combined(self, received: Received) -> None:
        if received is not self._received or self._state is not State.BETWEEN:
            raise StaleEpoch(
                f"missing_results of dispatch {received.sequence} of epoch {received.epoch}: "
                "ask after its combine and before the next dispatch"
            )

    def _check_here(self, **tensors: torch.Tensor) -> None:
        for name, tensor in tensors.items():
            if tensor.device != self.device:
                raise ValueError(f"{name} must be on {self.device}, is on {tensor.device}")

    def _check_rows(self, name: str, tensor: torch.Tensor, rows: int | None) -> None:
        """rows: how many there must be; None: as many as there can be."""
        desired = self.most_rows if rows is None else rows
        kind = (tensor.dtype, tensor.shape, tensor.device, desired)
        if kind in self._fitting and tensor.is_contiguous():
            return
        if (
            tensor.dtype is not self.spec.dtype
            or tensor.ndim != 2
            or tensor.shape[0] not in (desired, self.most_rows)
            or tensor.shape[1] != self.spec.hidden
            or not tensor.is_contiguous()
            or tensor.device != self.device
        ):
            raise ValueError(
                f"{name} must be [{desired}, {self.spec.hidden}] {self.spec.dtype} on "
                f"{self.device}, contiguous; is {list(tensor.shape)} {tensor.dtype} on "
                f"{tensor.device}"
            )
        self._fits(kind)

    def _fits(self, kind: tuple[object, ...]) -> None:
        """Remember that arguments of this kind need not be looked at in every call."""
        if len(self._fitting) >= MOST_KINDS:
            self._fitting.clear()
        self._fitting.add(kind)

    def _failed(self, ranks: tuple[int, ...], phase: str, epoch: int, limit_s: float) -> CommError:
        """Of an exchange in which nothing came from these ranks."""
        lost, active = self.lost, self._control.active
        why = {r: lost.get(r, "masked") for r in ranks if r in lost or r not in active}
        if why:
            return RankLost(tuple(sorted(why)), phase, epoch, why)
        return RankTimeout(ranks, phase, epoch, limit_s)


def find_missing(
    expert_ids: torch.Tensor, weights: torch.Tensor, table: ExpertTable, back: torch.Tensor
) -> MissingResults | None:
    """What a combine lacks.

    expert_ids, weights, table: of the dispatch. back: [ids] bool, whose results came.
    """
    ids, experts = expert_ids.long(), table.rank.shape[0]
    known = (ids >= 0) & (ids < experts)
    if experts == 0 or not ids.numel():
        return None
    owner = table.rank.long()[ids.clamp(0, experts - 1)]
    choices = known & ~((owner >= 0) & back[owner.clamp(min=0)])
    if not bool(choices.any()):
        return None
    gone = sorted(set(owner[choices & (owner >= 0)].tolist()))
    return MissingResults(tuple(gone), torch.where(choices, weights, 0.0).sum(1), choices)


def default_device() -> torch.device:
    """The current GPU; in Triton's interpreter the CPU."""
    return CPU if INTERPRETED else torch.device("cuda", torch.cuda.current_device())
