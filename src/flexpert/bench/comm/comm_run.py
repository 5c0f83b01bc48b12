"""Who is checked and timed when, and what becomes of the times."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence

import msgspec

from flexpert.bench.comm.baseline_kinds import KINDS, MEMCPY, OURS, BaselineKind
from flexpert.bench.comm.ranks import Ranks, Settings, Times
from flexpert.bench.comm.workload import Workload, deduplicated_rows
from flexpert.bench.machine import Machine, this_machine
from flexpert.bench.statistics import SpreadUs

CHUNK = 10  # exchanges of one baseline in a row
WARM_UP = 2  # more before them, which do not count

Note = Callable[[str], None]


class CommResult(msgspec.Struct, frozen=True, kw_only=True):
    """One baseline at one number of tokens.

    dispatch_us, combine_us, total_us: of an exchange, from the begin of the first rank to the end
        of the last. gb_per_s: deduplicated bytes of all ranks, there and back, by the median.
    link_bytes: between machines, there and back, messages included, mean of an exchange; None: not
        counted.
    times_ours, times_memcpy: medians of totals; 1.0 is equal, 2.0 takes twice as long.
    skipped: why there are no figures, if there are none. wrong: it computed something else.
    """

    baseline: str
    exchanges: int = 0
    dispatch_us: SpreadUs | None = None
    combine_us: SpreadUs | None = None
    total_us: SpreadUs | None = None
    gb_per_s: float | None = None
    link_bytes: float | None = None
    times_ours: float | None = None
    times_memcpy: float | None = None
    skipped: str | None = None
    wrong: bool = False


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """bytes: deduplicated, of all ranks, there and back, mean of an exchange."""

    workload: Workload
    bytes: float
    results: list[CommResult]


class CommReport(msgspec.Struct, frozen=True, kw_only=True):
    """contains: baseline → what its times contain."""

    machine: Machine
    channel: str
    fp8: str
    threads: int
    machines: int
    contains: dict[str, str]
    points: list[Point]

    @property
    def correct(self) -> bool:
        return not any(result.wrong for point in self.points for result in point.results)


def run_comm(
    workloads: Sequence[Workload],
    settings: Settings,
    baselines: Sequence[str],
    *,
    repeat: int,
    seconds: float | None = None,
    note: Note,
) -> CommReport:
    """Check and time all baselines at every workload, which have the same number of ranks.

    Args:
        baselines: families of baselines besides ours.
        repeat: exchanges of each baseline at each workload.
        seconds: instead, as many as fit into that time, for each workload.

    Raises: FlexpertError: a rank failed.
    """
    kinds = [
        kind
        for kind in KINDS
        if (kind.family == "ours" or kind.family in baselines)
        and (kind.exact or settings.fp8)
        and (not kind.machines or settings.machines > 1)
    ]
    points: list[Point] = []
    note(f"starting {workloads[0].ranks} ranks")
    with Ranks(workloads[0].ranks, settings) as ranks:
        for work in workloads:
            points.append(_point(ranks, work, kinds, repeat, seconds, note))
    return CommReport(
        machine=this_machine(),
        channel=settings.channel,
        fp8=settings.fp8 or "none",
        threads=settings.threads,
        machines=settings.machines,
        contains={kind.name: kind.time for kind in kinds},
        points=points,
    )


def _point(
    ranks: Ranks,
    work: Workload,
    kinds: Sequence[BaselineKind],
    repeat: int,
    seconds: float | None,
    note: Note,
) -> Point:
    ranks.all("prepare", work)
    ready: list[str] = []
    results: dict[str, CommResult] = {}
    for kind in kinds:
        note(f"{work.tokens} tokens: checking {kind.name}")
        if why := _first(ranks.all("build", kind.name)):
            results[kind.name] = CommResult(baseline=kind.name, skipped=why)
            continue
        wrong = _first(w for turn in range(2) for w in ranks.all("check", kind.name, turn))
        if wrong:
            results[kind.name] = CommResult(baseline=kind.name, skipped=wrong, wrong=True)
        else:
            ready.append(kind.name)
    before = {name: ranks.all("link_bytes", name) for name in ready}
    times = _rounds(ranks, work, ready, repeat, seconds, note)
    linked = {name: _link_bytes(ranks, name, before[name], len(times[name][0])) for name in ready}
    moved = _moved_bytes(work)
    spans = {name: _spans(taken) for name, taken in times.items()}
    ours, memcpy = (_median_total(spans.get(name)) for name in (OURS, MEMCPY))
    for name, taken in spans.items():
        total = _median_total(taken)
        assert total is not None
        results[name] = CommResult(
            baseline=name,
            exchanges=len(taken),
            dispatch_us=SpreadUs.of([dispatch for dispatch, _ in taken]),
            combine_us=SpreadUs.of([combine for _, combine in taken]),
            total_us=SpreadUs.of([sum(both) for both in taken]),
            gb_per_s=moved / total / 1e3,
            link_bytes=linked[name],
            times_ours=total / ours if ours else None,
            times_memcpy=total / memcpy if memcpy else None,
        )
    return Point(workload=work, bytes=moved, results=[results[kind.name] for kind in kinds])


def _rounds(
    ranks: Ranks,
    work: Workload,
    names: Sequence[str],
    repeat: int,
    seconds: float | None,
    note: Note,
) -> dict[str, list[Times]]:
    """name → times of each chunk by rank. All baselines take turns, in another order each round,
    so that what disturbs the machine for a while disturbs all of them."""
    taken: dict[str, list[list[Times]]] = {name: [] for name in names}
    shuffled = random.Random(work.seed)
    began, done, number = time.monotonic(), 0, 0
    order = list(names)
    while order:
        number += 1
        count = CHUNK if seconds is not None else min(CHUNK, repeat - done)
        shuffled.shuffle(order)
        for at, name in enumerate(order):
            note(f"{work.tokens} tokens: round {number}, {name} ({at + 1} of {len(order)})")
            taken[name].append(ranks.all("measure", name, done, count, WARM_UP))
        done += count
        if time.monotonic() - began >= seconds if seconds is not None else done >= repeat:
            break
    return {
        name: [[turn for chunk in chunks for turn in chunk[rank]] for rank in range(work.ranks)]
        for name, chunks in taken.items()
    }


def _link_bytes(ranks: Ranks, name: str, before: Sequence[int | None], timed: int) -> float | None:
    """Of all ranks, mean of an exchange. timed: how many there were; warm-ups came on top."""
    done = timed + -(-timed // CHUNK) * WARM_UP
    pairs = zip(before, ranks.all("link_bytes", name), strict=True)
    sent = [after - began for began, after in pairs if began is not None and after is not None]
    return sum(sent) / done if sent else None


def _spans(by_rank: list[Times]) -> list[tuple[float, float]]:
    """(dispatch, combine) in µs of each exchange, first begin to last end."""
    spans = []
    for turn in zip(*by_rank, strict=True):
        begin, dispatched, middle, end = zip(*turn, strict=True)
        spans.append(((max(dispatched) - min(begin)) / 1e3, (max(end) - min(middle)) / 1e3))
    return spans


def _median_total(spans: Sequence[tuple[float, float]] | None) -> float | None:
    return SpreadUs.of([sum(both) for both in spans]).p50 if spans else None


def _moved_bytes(work: Workload) -> float:
    rows = sum(
        int(deduplicated_rows(work, rank, turn).sum())
        for rank in range(work.ranks)
        for turn in range(work.pool)
    )
    return 2 * work.row_bytes * rows / work.pool


def _first(answers: object) -> str:
    """The first answer that is not empty."""
    assert not isinstance(answers, str)
    return next((str(answer) for answer in answers if answer), "")  # type: ignore[attr-defined]
