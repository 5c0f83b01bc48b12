"""What every baseline does, and which there are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

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


@dataclass(slots=True)
class Site:
    """Where a baseline runs.

    gather: every rank's value by rank, given this rank's; all ranks call it. See `ranks.gather`.
    store: the same for all ranks.
    channel: of our buffer.
    """

    rank: int
    work: Workload
    store: Store
    gather: Callable[[Any], list[Any]]
    channel: str
    fp8: Scales | None
    timeout_s: float
    pool: list[Input]

    def input(self, turn: int) -> Input:
        return self.pool[turn % len(self.pool)]


@dataclass(frozen=True, slots=True)
class Kind:
    """One row of the table.

    family: what `--baselines` calls it; "ours" is always there.
    time: what its figures contain.
    exact: dispatched rows must equal what was sent, bit for bit.
    checked: it computes results at all.
    """

    name: str
    family: str
    make: Callable[[Site], Baseline]
    time: str
    exact: bool = True
    checked: bool = True


def _ours(**options: Any) -> Callable[[Site], Baseline]:
    def make(site: Site) -> Baseline:
        from flexpert.bench.comm.ours import Ours

        return Ours(site, **options)

    return make


def _gloo(name: str, **options: Any) -> Callable[[Site], Baseline]:
    def make(site: Site) -> Baseline:
        from flexpert.bench.comm import gloo

        baseline: Baseline = getattr(gloo, name)(site, **options)
        return baseline

    return make


def _nixl(*, packed: bool) -> Callable[[Site], Baseline]:
    def make(site: Site) -> Baseline:
        from flexpert.bench.comm.nixl_writes import NixlWrites

        return NixlWrites(site, packed=packed)

    return make


def _memcpy(site: Site) -> Baseline:
    from flexpert.bench.comm.memcpy import Memcpy

    return Memcpy(site)


OURS = "flexpert"
MEMCPY = "memcpy"

_ROWS = "rows stay where they arrived"
KINDS = (
    Kind(OURS, "ours", _ours(), f"{_ROWS}; one partial sum a token and rank comes back"),
    Kind(
        "flexpert, x gathered",
        "ours",
        _ours(gather=True),
        "as flexpert, and each expert's rows copied together in dispatch",
    ),
    Kind(
        "flexpert, reduce=home",
        "ours",
        _ours(reduce="home"),
        f"{_ROWS}; one row a (token, expert) comes back and is summed at home",
    ),
    Kind(
        "flexpert, fp8",
        "ours",
        _ours(quantise=True),
        f"quantised on the way; {_ROWS}; results come back in the full dtype",
        exact=False,
    ),
    Kind(
        "gloo all-to-all, row per rank",
        "gloo",
        _gloo("RowPerRank"),
        "all-gather of the routing, permutation, all_to_all_single of deduplicated rows; partial "
        "sums by embedding_bag, all_to_all_single back, sum",
    ),
    Kind(
        "gloo all-to-all, row per expert",
        "gloo",
        _gloo("RowPerExpert"),
        "all-gather of the counts, permutation, all_to_all_single of one row a (token, expert); "
        "permutation, all_to_all_single back, weighted sum by embedding_bag",
    ),
    Kind(
        "gloo all-gather + reduce-scatter",
        "allgather",
        _gloo("Gather"),
        "one all_gather of tokens with routing; partial sums by embedding_bag, reduce_scatter",
    ),
    Kind(
        "gloo all-gather + all-reduce",
        "allgather",
        _gloo("Gather", all_reduce=True),
        "as above with all_reduce, of which the own part is taken",
    ),
    Kind(
        "NIXL, write per peer",
        "nixl",
        _nixl(packed=True),
        "permutation into one piece a peer, one descriptor each, notification; partial sums by "
        "embedding_bag, the same way back, sum",
    ),
    Kind(
        "NIXL, write per row",
        "nixl",
        _nixl(packed=False),
        "one descriptor a row, from where the row lies; the rest as above",
    ),
    Kind(
        MEMCPY,
        "memcpy",
        _memcpy,
        "the deduplicated bytes there and back, copied in one piece a peer; no routing, no "
        "waiting, no sums",
        checked=False,
    ),
)
GPU_RIVALS = ("nixl_ep", "interface", "torch", "checks")  # of --device cuda, see cuda/baselines.py
RIVALS = tuple(dict.fromkeys(kind.family for kind in KINDS if kind.family != "ours"))


def kind_named(name: str) -> Kind:
    return next(kind for kind in KINDS if kind.name == name)
