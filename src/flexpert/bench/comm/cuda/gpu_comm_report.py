"""The figures of `flexpert bench comm --device cuda` as a table (pure)."""

from __future__ import annotations

from rich.console import RenderableType
from rich.table import Table

from flexpert.bench.comm.cuda.gpu_comm_run import INTERFACE, OURS, GpuPoint, GpuReport
from flexpert.bench.report_table import figures_table, no_figures, with_note
from flexpert.bench.statistics import SpreadUs

_PHASES = ("dispatch_us", "combine_us", "pair_us")
_CAPTURED = ("dispatch µs", "combine µs", "pair µs")
_EAGER = ("dispatch, host µs", "combine, host µs", "pair, device µs")
_HOW = (
    "slowest rank of each exchange; roofline: bytes over the copy bandwidth. dispatch and combine: "
    "one graph replay after a flush of the L2; pair: both, steady, many in one graph"
)
_HOW_EAGER = (
    "launched one by one. dispatch and combine: the host's time for a call, in which it waits for "
    "nothing, of all ranks; pair: the device's for both, many in a row, slowest rank"
)


def gpu_text(report: GpuReport) -> RenderableType:
    """A table for each number of tokens, then what was measured on."""
    return with_note(
        [_table(point, eager=report.eager) for point in report.points],
        f"medians (p10 to p90), {_HOW_EAGER if report.eager else _HOW}\n"
        f"{', '.join(sorted(set(report.devices)))}, copy bandwidth "
        f"{report.bandwidth / 1e12:.2f} TB/s, fp8 {report.fp8}\n{report.machine.line()}",
    )


def _table(point: GpuPoint, *, eager: bool) -> Table:
    work = point.workload
    title = (
        f"{work.ranks} ranks, {work.tokens} tokens each, hidden {work.hidden}, top-{work.topk} of "
        f"{work.experts} experts, {work.dtype}"
    )
    table = figures_table(title, "baseline", _EAGER if eager else _CAPTURED)
    for result in point.results:
        if result.skipped is not None:
            table.add_row(result.baseline, no_figures(result.skipped, wrong=result.wrong))
        else:
            table.add_row(result.baseline, *(_spread(getattr(result, p)) for p in _PHASES))
    if not eager:
        phases_us = (point.roofline.dispatch_us, point.roofline.combine_us)
        table.add_row("roofline", *(f"{us:.1f}" for us in (*phases_us, sum(phases_us))))
    for name in (OURS, INTERFACE) if eager else (OURS,):
        ratios = [point.ratio(phase, name) for phase in _PHASES]
        if any(ratio is not None for ratio in ratios):
            row = ("" if r is None else f"{r:.2f}" for r in ratios)
            table.add_row(f"{name} / nixl_ep", *row)
    return table


def _spread(spread: SpreadUs | None) -> str:
    return "" if spread is None else f"{spread.p50:.1f} ({spread.p10:.1f} to {spread.p90:.1f})"
