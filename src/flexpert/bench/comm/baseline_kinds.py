"""Which baselines `flexpert bench comm` has; their libraries are imported when one is made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from flexpert.bench.comm.baseline import Baseline, Site


@dataclass(frozen=True, slots=True)
class BaselineKind:
    """One row of the table.

    family: what `--baselines` calls it; "ours" is always there.
    time: what its figures contain.
    exact: dispatched rows must equal what was sent, bit for bit.
    checked: it computes results at all.
    machines: it differs from the others between machines only.
    """

    name: str
    family: str
    make: Callable[[Site], Baseline]
    time: str
    exact: bool = True
    checked: bool = True
    machines: bool = False


def _ours(**options: Any) -> Callable[[Site], Baseline]:
    def make(site: Site) -> Baseline:
        from flexpert.bench.comm.ours import HostExchangeBaseline

        return HostExchangeBaseline(site, **options)

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
    BaselineKind(OURS, "ours", _ours(), f"{_ROWS}; one partial sum a token and rank comes back"),
    BaselineKind(
        "flexpert, x gathered",
        "ours",
        _ours(gather=True),
        "as flexpert, and each expert's rows copied together in dispatch",
    ),
    BaselineKind(
        "flexpert, reduce=home",
        "ours",
        _ours(reduce="home"),
        f"{_ROWS}; one row a (token, expert) comes back and is summed at home",
    ),
    BaselineKind(
        "flexpert, fp8",
        "ours",
        _ours(quantise=True),
        f"quantised on the way; {_ROWS}; results come back in the full dtype",
        exact=False,
    ),
    BaselineKind(
        "flexpert, row per rank",
        "ours",
        _ours(two_level=False),
        "as flexpert, and each rank of another machine is sent its rows itself",
        machines=True,
    ),
    BaselineKind(
        "flexpert, row per expert",
        "ours",
        _ours(two_level=False, split=True),
        "as row per rank, and a token is copied and sent for each of its experts; the results are "
        "summed at home",
        machines=True,
    ),
    BaselineKind(
        "gloo all-to-all, row per rank",
        "gloo",
        _gloo("RowPerRank"),
        "all-gather of the routing, permutation, all_to_all_single of deduplicated rows; partial "
        "sums by embedding_bag, all_to_all_single back, sum",
    ),
    BaselineKind(
        "gloo all-to-all, row per expert",
        "gloo",
        _gloo("RowPerExpert"),
        "all-gather of the counts, permutation, all_to_all_single of one row a (token, expert); "
        "permutation, all_to_all_single back, weighted sum by embedding_bag",
    ),
    BaselineKind(
        "gloo all-gather + reduce-scatter",
        "allgather",
        _gloo("Gather"),
        "one all_gather of tokens with routing; partial sums by embedding_bag, reduce_scatter",
    ),
    BaselineKind(
        "gloo all-gather + all-reduce",
        "allgather",
        _gloo("Gather", all_reduce=True),
        "as above with all_reduce, of which the own part is taken",
    ),
    BaselineKind(
        "NIXL, write per peer",
        "nixl",
        _nixl(packed=True),
        "permutation into one piece a peer, one descriptor each, notification; partial sums by "
        "embedding_bag, the same way back, sum",
    ),
    BaselineKind(
        "NIXL, write per row",
        "nixl",
        _nixl(packed=False),
        "one descriptor a row, from where the row lies; the rest as above",
    ),
    BaselineKind(
        MEMCPY,
        "memcpy",
        _memcpy,
        "the deduplicated bytes there and back, copied in one piece a peer; no routing, no "
        "waiting, no sums",
        checked=False,
    ),
)
# of --device cuda, see cuda/gpu_baselines.py
GPU_BASELINE_FAMILIES = ("nixl_ep", "interface", "torch", "nccl", "checks")
EAGER_BASELINE_FAMILIES = ("nixl_ep", "interface", "launches")
BASELINE_FAMILIES = tuple(dict.fromkeys(kind.family for kind in KINDS if kind.family != "ours"))


def kind_named(name: str) -> BaselineKind:
    return next(kind for kind in KINDS if kind.name == name)
