"""Who is checked and timed when on the GPUs, and the roofline of an exchange."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import msgspec

from flexpert.bench.comm.cuda.gpu_baselines import (
    INTERFACE,
    NIXL_EP,
    OURS,
    GpuKind,
    eager_kinds,
    gpu_kinds,
)
from flexpert.bench.comm.cuda.gpu_comm_rank import GpuRank, Phases
from flexpert.bench.comm.ranks import RankFailed, Ranks, Settings
from flexpert.bench.comm.workload import Workload, expert_table, make_input
from flexpert.bench.machine import Machine, this_machine
from flexpert.bench.statistics import SpreadUs
from flexpert.comm.quant import BLOCK

CHECKED_TURNS = 2
Note = Callable[[str], None]


class GpuResult(msgspec.Struct, frozen=True, kw_only=True):
    """One baseline at one number of tokens.

    dispatch_us, combine_us: one phase after a flush of the L2, the slowest rank of each exchange.
    pair_us: dispatch and combine in a steady run.
    Of an eager run: the host's time for each call, of all ranks; and the device's for the pair.
    skipped: why there are no figures, if there are none. wrong: it computed something else.
    """

    baseline: str
    dispatch_us: SpreadUs | None = None
    combine_us: SpreadUs | None = None
    pair_us: SpreadUs | None = None
    skipped: str | None = None
    wrong: bool = False


class Roofline(msgspec.Struct, frozen=True):
    """Bytes that the ranks of one GPU must read and write at least, and the time that takes."""

    dispatch_bytes: int
    combine_bytes: int
    dispatch_us: float
    combine_us: float

    @classmethod
    def of(cls, dispatch_bytes: int, combine_bytes: int, bandwidth: float) -> Roofline:
        """bandwidth: bytes a second."""
        times = (nbytes / bandwidth * 1e6 for nbytes in (dispatch_bytes, combine_bytes))
        return cls(dispatch_bytes, combine_bytes, *times)


class GpuPoint(msgspec.Struct, frozen=True, kw_only=True):
    workload: Workload
    roofline: Roofline
    results: list[GpuResult]

    def ratio(self, phase: str, name: str = OURS) -> float | None:
        """The median of a baseline over that of nixl_ep; phase: "dispatch_us", "combine_us" or
        "pair_us"."""
        by_name = {result.baseline: getattr(result, phase) for result in self.results}
        ours, theirs = by_name.get(name), by_name.get(NIXL_EP)
        return ours.p50 / theirs.p50 if ours and theirs else None


class GpuReport(msgspec.Struct, frozen=True, kw_only=True):
    """bandwidth: bytes a second of a large copy on the device, read and written. eager: launched
    one by one, not in graphs."""

    machine: Machine
    devices: list[str]
    bandwidth: float
    fp8: str
    contains: dict[str, str]
    points: list[GpuPoint]
    eager: bool = False

    @property
    def correct(self) -> bool:
        """Whether everything of ours is; what a baseline computes is its own affair."""
        ours = [r for point in self.points for r in point.results if r.baseline.startswith(OURS)]
        return not any(result.wrong for result in ours)


def run_gpu(
    workloads: Sequence[Workload],
    settings: Settings,
    baselines: Sequence[str],
    *,
    repeat: int,
    note: Note,
) -> GpuReport:
    """Check and time all baselines at every workload, which have the same number of ranks.

    Raises: FlexpertError: a rank failed.
    """
    all_kinds = (eager_kinds if settings.eager else gpu_kinds)(settings.fp8)
    kinds = [kind for kind in all_kinds if kind.family == "ours" or kind.family in baselines]
    ranks_count = workloads[0].ranks
    points: list[GpuPoint] = []
    note(f"starting {ranks_count} ranks")
    with Ranks(ranks_count, settings, GpuRank) as ranks:
        devices = ranks.all("device_name")
        bandwidth = ranks.all("bandwidth")[0]
        sharing = len(devices) // len(set(ranks.all("device_index")))
        for work in workloads:
            ranks.all("prepare", work)
            results = []
            for kind in kinds:
                results.append(_measured(ranks, work, kind, repeat, note, eager=settings.eager))
                note(f"  {results[-1]}")
            nbytes = exchanged_bytes(work, fp8=settings.fp8 is not None, sharing=sharing)
            points.append(
                GpuPoint(workload=work, roofline=Roofline.of(*nbytes, bandwidth), results=results)
            )
        ranks.all("prepare", workloads[0])  # closes what is open while everybody is there
    return GpuReport(
        machine=this_machine(),
        devices=devices,
        bandwidth=bandwidth,
        fp8=settings.fp8 or "none",
        contains={kind.name: kind.time for kind in kinds},
        points=points,
        eager=settings.eager,
    )


def _measured(
    ranks: Ranks, work: Workload, kind: GpuKind, repeat: int, note: Note, *, eager: bool
) -> GpuResult:
    note(f"{work.tokens} tokens: {kind.name}")
    if why := _first(ranks.all("build", kind.name)):
        ranks.all("drop", kind.name)
        return GpuResult(baseline=kind.name, skipped=why)
    wrong = _first(
        [w for turn in range(CHECKED_TURNS) for w in ranks.all("check", kind.name, turn)]
    )
    if wrong:
        ranks.all("drop", kind.name)
        return GpuResult(baseline=kind.name, skipped=wrong, wrong=True)
    measure = "measure_eager" if eager else "measure"
    by_rank: list[Phases] = ranks.all(measure, kind.name, repeat)
    # again: had a rank been left out meanwhile, these would be times of something else
    wrong = _first(ranks.all("check", kind.name, 0))
    ranks.all("drop", kind.name)
    if wrong:
        return GpuResult(baseline=kind.name, skipped=f"after it was timed: {wrong}", wrong=True)
    of_phase = _all if eager else _slowest
    return GpuResult(
        baseline=kind.name,
        dispatch_us=of_phase([phases.dispatch for phases in by_rank]),
        combine_us=of_phase([phases.combine for phases in by_rank]),
        pair_us=_slowest([phases.pair for phases in by_rank]),
    )


def _slowest(by_rank: Sequence[Sequence[float]]) -> SpreadUs:
    return SpreadUs.of([max(turn) for turn in zip(*by_rank, strict=True)])


def _all(by_rank: Sequence[Sequence[float]]) -> SpreadUs:
    return SpreadUs.of(itertools.chain.from_iterable(by_rank))


def exchanged_bytes(work: Workload, *, fp8: bool, sharing: int) -> tuple[int, int]:
    """Bytes (dispatch, combine) that `sharing` ranks on one GPU must move; of the first input.

    dispatch: each token is read once and written once to each rank that wants it.
    combine: each pair's result is read once; a partial sum is written for each (token, other rank)
    and read at home; the sums are written.
    """
    row = work.row_bytes
    sent_row = work.hidden + work.hidden // BLOCK * 4 if fp8 else row
    owner = expert_table(work).rank
    dispatch = combine = 0
    for rank in range(work.ranks):
        owners = owner[make_input(work, rank, 0).expert_ids]
        desired = [set(token) for token in owners.tolist()]
        copies = sum(len(ranks) for ranks in desired)
        away = sum(len(ranks - {rank}) for ranks in desired)
        dispatch += work.tokens * row + copies * sent_row
        combine += work.tokens * work.topk * row + 2 * away * row + work.tokens * row
    return dispatch * sharing // work.ranks, combine * sharing // work.ranks


def _first(answers: Sequence[str]) -> str:
    return next((answer for answer in answers if answer), "")


__all__ = ["INTERFACE", "OURS", "GpuReport", "RankFailed", "run_gpu"]
