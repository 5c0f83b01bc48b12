"""What every baseline of `flexpert bench comm` does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch

from flexpert.bench.comm.workload import Input, Workload
from flexpert.comm.buffer import Scales
from flexpert.errors import FlexpertError

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]


class Unavailable(FlexpertError):  # noqa: N818 - reads as what it says
    """A baseline cannot run here; the message says why."""


class Baseline(Protocol):
    """One way to exchange, on one rank. Its memory is allocated before it is timed. All ranks make
    the same turn at the same time; a turn is an input of the pool.

    `dispatch` ends when this rank can hand each of its experts its rows: they lie somewhere, and
    it is known where each row of each expert is. `combine` begins with one row of expert results
    for each (token, local expert), by slot, then source rank, then token, in `y_room`, and ends
    with the weighted sums [tokens, hidden] of this rank's own tokens.
    """

    def dispatch(self, turn: int) -> None: ...

    def combine(self) -> torch.Tensor: ...

    def rows(self) -> torch.Tensor:
        """[pairs, hidden] of the last dispatch, copied together for the check; not timed."""

    def y_room(self) -> torch.Tensor:
        """[pairs, hidden] for the results of the last dispatch; not timed."""

    def close(self) -> None: ...


@runtime_checkable
class CountsLinkBytes(Protocol):
    """A baseline that knows what it sends to other machines."""

    def link_bytes(self) -> int:
        """Bytes written to ranks on other machines so far, messages included."""


@dataclass(slots=True)
class Site:
    """Where a baseline runs.

    gather: every rank's value by rank, given this rank's; all ranks call it. See `ranks.gather`.
    store: the same for all ranks.
    channel: of our buffer.
    machine: name of the one on which the rank is taken to be, for our buffer; None: this one.
    """

    rank: int
    work: Workload
    store: Store
    gather: Callable[[Any], list[Any]]
    channel: str
    fp8: Scales | None
    timeout_s: float
    pool: list[Input]
    machine: str | None = None

    def input(self, turn: int) -> Input:
        return self.pool[turn % len(self.pool)]
