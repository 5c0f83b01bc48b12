"""Latency over tokens as a picture, by matplotlib."""

from __future__ import annotations

from pathlib import Path

from flexpert.bench.comm.run import Report
from flexpert.errors import ConfigError, FlexpertError

SUFFIXES = (".png", ".svg")


def check_plot(path: Path) -> None:
    """Before anything is measured. Raises: ConfigError: no such picture can be drawn."""
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"--plot {path}: must end with {' or '.join(SUFFIXES)}")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ConfigError(
            "--plot needs matplotlib: pip install 'flexpert[bench]', or leave it out"
        ) from None


def draw(report: Report, path: Path) -> None:
    """Median dispatch + combine of each contender over tokens, both axes logarithmic.

    Raises: FlexpertError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6), layout="constrained")
    axes = figure.add_subplot()
    lines: dict[str, list[tuple[int, float]]] = {}
    for point in report.points:
        for result in point.results:
            if result.total_us is not None:
                spot = (point.workload.tokens, result.total_us.p50)
                lines.setdefault(result.contender, []).append(spot)
    for name, spots in sorted(lines.items(), key=lambda line: -line[1][-1][1]):
        ours = name.startswith("flexpert")
        tokens, totals = zip(*sorted(spots), strict=True)
        axes.plot(
            tokens,
            totals,
            label=f"{name}: {totals[-1]:,.0f} µs",
            marker="o",
            linewidth=2.5 if ours else 1.3,
            linestyle="--" if name == "memcpy" else "-",
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    every = sorted({point.workload.tokens for point in report.points})
    axes.set_xticks(every, [str(tokens) for tokens in every])
    axes.set_xlabel("tokens of each rank")
    axes.set_ylabel("dispatch + combine, µs (median)")
    axes.grid(True, which="both", alpha=0.25)
    axes.legend(
        title=f"at {every[-1]} tokens", loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8
    )
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
