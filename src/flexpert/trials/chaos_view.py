"""What a chaos run came to, for people: tables and a chart."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from flexpert.errors import FlexpertError
from flexpert.trials.chaos_report import BIN_S, ChaosResult, Seen, rates, sparkline


def show(console: Console, result: ChaosResult, seen: Seen) -> None:
    named = ", ".join(f"{count} {kind}" for kind, count in result.faults.items()) or "none"
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_row("faults", named)
    if result.without_effect:
        table.add_row("of them without effect", str(result.without_effect))
    if result.changes:
        table.add_row("changes", ", ".join(f"{n} {state}" for state, n in result.changes.items()))
    table.add_row("requests sent", str(result.sent))
    table.add_row("answered", str(result.answered))
    table.add_row("lost", str(result.lost))
    table.add_row("altered (--deterministic)", str(result.altered))
    table.add_row("tokens a second", f"{result.tokens_per_s:,.0f}")
    for name, before, after in (
        ("memory of the head, MiB", result.before.resident_mib, result.after.resident_mib),
        ("descriptors of the head", result.before.descriptors, result.after.descriptors),
        ("processes", result.before.processes, result.after.processes),
    ):
        table.add_row(name, f"{before} → {after}")
    for rank, now in sorted(result.after.ranks.items()):
        was = result.before.ranks.get(rank)
        if was:
            table.add_row(
                f"rank {rank}, MiB and descriptors",
                f"{was.private_mib} → {now.private_mib}, {was.descriptors} → {now.descriptors}",
            )
    console.print(table)
    if result.times:
        times = Table(title="ms after the fault: median, 90 %, longest", box=None, pad_edge=False)
        for column in ("", "detected", "next epoch", "first good step", "full capacity"):
            times.add_column(column, justify="right" if column else "left")
        for kind, found in result.times.items():
            cells = [
                "" if s is None else f"{s.median_ms:,.0f}  {s.p90_ms:,.0f}  {s.longest_ms:,.0f}"
                for s in (found.detect, found.epoch, found.first_good_step, found.full_capacity)
            ]
            times.add_row(kind, *cells)
        console.print(times)
    for text in result.unharmed:
        console.print(f"ended though it was not harmed: {text}", markup=False)
    for text in result.grown:
        console.print(f"grown: {text}", markup=False)
    console.print("tokens a second over time")
    console.print(sparkline(rates(seen, seen.began + result.duration_s)))
    for error in result.errors:
        console.print(f"lost: {error}", markup=False)
    if seen.last_lines:
        console.print("the service printed at last:")
        for line in seen.last_lines:
            console.print(f"  {line}", markup=False, highlight=False)
    if not result.back:
        console.print("not all ranks came back; see flexpert status and the service's log")
    console.print("PASS" if result.good else f"FAIL (seed {result.seed})")


def draw(seen: Seen, result: ChaosResult, path: Path) -> None:
    """Writes tokens a second over time, with the faults.

    Raises: FlexpertError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    axes = figure.add_subplot()
    values = rates(seen, seen.began + result.duration_s)
    axes.step([at * BIN_S for at in range(len(values))], values, where="post", linewidth=1.2)
    colours = {"kill": "#a50f15", "stop": "#d94801", "slow": "#756bb1", "oom": "#006d2c"}
    colours["partition"] = "#2171b5"
    shown: set[str] = set()
    for fault in seen.faults:
        axes.axvline(
            fault.at - seen.began,
            color=colours[fault.kind],
            linewidth=1.0,
            label=None if fault.kind in shown else fault.kind,
        )
        shown.add(fault.kind)
    axes.set_xlabel("seconds")
    axes.set_ylabel(f"tokens a second, in {BIN_S:g} s")
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    if shown:
        axes.legend(loc="lower right")
    axes.set_title(
        f"{result.ranks} ranks, {result.clients} clients, {len(seen.faults)} faults, "
        f"{result.lost} lost, {result.altered} altered\n{result.machine.line()}",
        fontsize=9,
    )
    try:
        figure.savefig(path, dpi=110)
    except OSError as error:
        raise FlexpertError(f"cannot write {path}: {error.strerror}") from None
