"""The figures of `flexpert bench comm --device cuda` as a table (pure)."""

from __future__ import annotations

from rich.console import RenderableType
from rich.table import Table

from flexpert.bench.comm.cuda.gpu_comm_run import GpuPoint, GpuReport
from flexpert.bench.report_table import figures_table, no_figures, with_note
from flexpert.bench.statistics import SpreadUs

_PHASES = ("dispatch_us", "combine_us", "pair_us")


def gpu_text(report: GpuReport) -> RenderableType:
    """A table for each number of tokens, then what was measured on."""
    return with_note(
        [_table(point) for point in report.points],
        "medians (p10 to p90), slowest rank of each exchange; roofline: bytes over the copy "
        "bandwidth. dispatch and combine: one graph "
        "replay after a flush of the L2; pair: both, steady, many in one graph\n"
        f"{', '.join(sorted(set(report.devices)))}, copy bandwidth "
        f"{report.bandwidth / 1e12:.2f} TB/s, fp8 {report.fp8}\n{report.machine.line()}",
    )


def _table(point: GpuPoint) -> Table:
    work = point.workload
    title = (
        f"{work.ranks} ranks, {work.tokens} tokens each, hidden {work.hidden}, top-{work.topk} of "
        f"{work.experts} experts, {work.dtype}"
    )
    table = figures_table(title, "baseline", ("dispatch µs", "combine µs", "pair µs"))
    for result in point.results:
        if result.skipped is not None:
            table.add_row(result.baseline, no_figures(result.skipped, wrong=result.wrong))
        else:
            table.add_row(result.baseline, *(_spread(getattr(result, p)) for p in _PHASES))
    phases_us = (point.roofline.dispatch_us, point.roofline.combine_us)
    table.add_row("roofline", *(f"{us:.1f}" for us in (*phases_us, sum(phases_us))))
    ratios = [point.ratio(phase) for phase in _PHASES]
    if any(ratio is not None for ratio in ratios):
        table.add_row("flexpert / nixl_ep", *("" if r is None else f"{r:.2f}" for r in ratios))
    return table


def _spread(spread: SpreadUs | None) -> str:
    return "" if spread is None else f"{spread.p50:.1f} ({spread.p10:.1f} to {spread.p90:.1f})"
