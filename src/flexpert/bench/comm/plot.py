"""Latency over tokens as a picture, by matplotlib."""

from __future__ import annotations

from pathlib import Path

from flexpert.bench.comm.baseline_kinds import KINDS, MEMCPY, OURS
from flexpert.bench.comm.comm_run import CommReport
from flexpert.errors import ConfigError, FlexpertError

SUFFIXES = (".png", ".svg")

# in the order of KINDS: ours blue, gloo red, all-gather orange, NIXL green, memcpy black
_COLOURS = (
    *("#08519c", "#6baed6", "#3182bd", "#756bb1"),
    *("#a50f15", "#fb6a4a", "#d94801", "#fd8d3c"),
    *("#006d2c", "#74c476", "#222222"),
)


def check_plot(path: Path) -> None:
    """Before anything is measured. Raises: ConfigError: no such picture can be drawn."""
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"--plot {path}: must end with {' or '.join(SUFFIXES)}")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ConfigError(
            "--plot needs matplotlib: pip install 'flexpert[plot]', or leave it out"
        ) from None


def draw(report: CommReport, path: Path) -> None:
    """Median dispatch + combine of each baseline over tokens, both axes logarithmic.

    Raises: FlexpertError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6), layout="constrained")
    axes = figure.add_subplot()
    lines: dict[str, list[tuple[int, float]]] = {}
    for point in report.points:
        for result in point.results:
            if result.total_us is not None:
                spot = (point.workload.tokens, result.total_us.p50)
                lines.setdefault(result.baseline, []).append(spot)
    every = sorted({point.workload.tokens for point in report.points})
    ends: list[tuple[float, str, str]] = []
    for name, spots in lines.items():
        tokens, totals = zip(*sorted(spots), strict=True)
        ours = name.startswith(OURS)
        drawn = axes.plot(
            tokens,
            totals,
            color=_COLOURS[[kind.name for kind in KINDS].index(name)],
            marker="o",
            markersize=5 if ours else 3.5,
            linewidth=2.4 if ours else 1.3,
            linestyle="--" if name == MEMCPY else "-",
        )
        ends.append((totals[-1], f"{name}: {totals[-1]:,.0f} µs", str(drawn[0].get_color())))
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(every, [str(tokens) for tokens in every])
    axes.set_xlabel("tokens of each rank")
    axes.set_ylabel("dispatch + combine, µs (median)")
    axes.grid(True, which="both", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    # names stand at the right in the order in which the lines end, so that they never overlap
    for place, (_, text, colour) in enumerate(sorted(ends)):
        height = (place + 0.5) / max(len(ends), 8)
        axes.text(1.03, height, text, color=colour, transform=axes.transAxes, va="center")
    axes.text(1.03, -0.04, f"at {every[-1]} tokens", transform=axes.transAxes, va="center")
    work = report.points[0].workload
    axes.set_title(
        f"{work.ranks} ranks, hidden {work.hidden}, top-{work.topk} of {work.experts} experts, "
        f"{work.dtype}\n{report.machine.line()}",
        fontsize=9,
    )
    try:
        figure.savefig(path, dpi=130)
    except OSError as error:
        raise FlexpertError(f"cannot write {path}: {error.strerror}") from None
