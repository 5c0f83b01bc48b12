"""The result of `flexpert bench elastic` as a picture, by matplotlib."""

from __future__ import annotations

from pathlib import Path

from flexpert.bench.elastic import ElasticReport
from flexpert.bench.elastic_page import page_data
from flexpert.errors import FlexpertError

_COLOURS = {
    **{"up": "#1a7f4b", "down": "#8a3ab9", "swap": "#0c8599"},
    **{"rebalance": "#a15c00", "kill": "#c02636", "stop": "#e8590c"},
}
_TITLES = (
    *("throughput, tokens/s", "time to first token, ms\n(median)"),
    "inter-token latency, ms\n(99 of a hundred are below)",
)


def draw_elastic(report: ElasticReport, path: Path) -> None:
    """Throughput, first tokens and gaps over time, with the events; a band and a dashed line are
    the undisturbed part and its median.

    Raises: FlexpertError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    data = page_data(report)
    figure = Figure(figsize=(11, 8), layout="constrained")
    every = figure.subplots(3, 1, sharex=True)
    times = data.series[0]
    for axes, values, base, title, marker in zip(
        every, data.series[1:], data.baseline, _TITLES, ("", ".", "."), strict=True
    ):
        shown = [float("nan") if value is None else value for value in values]
        axes.plot(times, shown, linewidth=1.1, color="#3a56d4", marker=marker)
        for begin, end in data.undisturbed:
            axes.axvspan(begin, end, color="#3a56d4", alpha=0.08, linewidth=0)
        if base is not None:
            axes.axhline(base, color="#5a6272", linestyle="--", linewidth=1.0)
        named: set[str] = set()
        for at, label, _ in data.events:
            axes.axvline(
                at,
                color=_COLOURS[label],
                linewidth=1.0,
                label=None if label in named else label,
            )
            named.add(label)
        axes.set_ylabel(title)
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
    if data.events:
        handles, names = every[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=len(_COLOURS))
    every[-1].set_xlabel("seconds")
    altered = "" if report.altered is None else f", {report.altered} altered"
    every[0].set_title(
        f"{report.clients} streaming clients, {report.answers} answers, {len(report.lost)} lost"
        f"{altered}\n{report.machine.line()}",
        fontsize=9,
    )
    try:
        figure.savefig(path, dpi=110)
    except OSError as error:
        raise FlexpertError(f"cannot write {path}: {error.strerror}") from None
