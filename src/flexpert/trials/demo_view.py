"""How a demonstration looks: live in a terminal, line by line elsewhere, and its summary."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from flexpert.cluster.formatting import describe_change, ids
from flexpert.display.render import ranks_table
from flexpert.trials.demo_report import DemoChange, DemoProgress, DemoResult, Gaps

# every so many refreshes a line about the traffic, where there is no terminal
_LINE_EVERY = 8


class LiveView:
    """Redraws in place. A context manager."""

    def __init__(self, console: Console) -> None:
        self._live = Live(console=console, auto_refresh=False, transient=True)
        self._console = console

    def __enter__(self) -> LiveView:
        self._live.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._live.__exit__(kind, error, trace)

    def note(self, line: str) -> None:
        self._live.update(Group(Spinner("dots", Text(line, style="dim"))), refresh=True)

    def refresh(self, progress: DemoProgress) -> None:
        self._live.update(picture(progress), refresh=True)


class LineView:
    """Prints what is new."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._stage = ""
        self._refreshes = 0
        self._reported: set[int] = set()
        self._began: set[int] = set()

    def note(self, line: str) -> None:
        self._print(line)

    def refresh(self, progress: DemoProgress) -> None:
        if progress.stage != self._stage:
            self._stage = progress.stage
            self._print(f"== {progress.stage}")
        for number, change in enumerate(progress.changes):
            if number not in self._began and change.operation:
                self._began.add(number)
                self._print(f"-- {describe_change(change.operation)}")
            if number not in self._reported and change.ended is not None:
                self._reported.add(number)
                self._print(f"-- {change_text(change)}")
        self._refreshes += 1
        if self._refreshes % _LINE_EVERY == 0:
            self._print(traffic_text(progress))

    def _print(self, line: str) -> None:
        self._console.print(line, soft_wrap=True, highlight=False, markup=False)


def picture(progress: DemoProgress) -> RenderableType:
    """The run as it is now."""
    parts: list[RenderableType] = [
        Text.assemble(("flexpert demo  ", "bold"), progress.stage),
        Text(traffic_text(progress)),
    ]
    if progress.cluster:
        parts.append(ranks_table(progress.cluster.ranks, progress.cluster.max_ranks))
    for change in progress.changes:
        style = "" if change.ended is None else "red" if _failed(change) else "green"
        parts.append(Text(change_text(change), style=style))
    return Panel(Group(*parts), expand=False)


def traffic_text(progress: DemoProgress) -> str:
    ranks = [r.id for r in progress.cluster.ranks if r.state != "gone"] if progress.cluster else []
    text = f"ranks {ids(ranks)}: {progress.tokens_per_s:,.0f} tokens/s"
    if progress.sent:
        text += (
            f", {progress.sent} requests sent, {progress.answered} answered, "
            f"{progress.equal} equal, {progress.lost} lost"
        )
    return text


def change_text(change: DemoChange) -> str:
    """A change with its phases and its pause."""
    if change.operation is None:
        return f"refused: {change.error}" if change.error else "asking for a change"
    operation = change.operation
    phases = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in operation.phases.items())
    text = f"{describe_change(operation)}: {operation.state}"
    if phases:
        text += f" ({phases})"
    if operation.pause_ms is not None:
        text += f", pause {operation.pause_ms:.1f} ms"
    if operation.error:
        text += f": {operation.error}"
    return text


def _failed(change: DemoChange) -> bool:
    return change.operation is None or change.operation.state != "done"


def summary(result: DemoResult) -> RenderableType:
    """What is left on the screen."""
    counts = Table(box=None, show_header=False)
    counts.add_column()
    counts.add_column(justify="right")
    bad = "bold red"
    different = result.answered - result.equal
    counts.add_row("requests sent", str(result.sent))
    counts.add_row("answered", str(result.answered))
    counts.add_row("lost", Text(str(result.lost), style=bad if result.lost else "green"))
    counts.add_row(
        "equal to the undisturbed run",
        Text(f"{result.equal} of {result.answered}", style=bad if different else "green"),
    )
    counts.add_row(
        "tokens",
        f"{result.output_tokens:,} in {result.duration_s:.1f} s, "
        f"{result.output_tokens_per_s:,.0f} a second",
    )
    gaps = Table(
        title="what moved, and gaps between two tokens of a stream", title_justify="left", box=None
    )
    for name in ("", "took", "pause", "experts", "requests", "KV", "median", "longest"):
        gaps.add_column(name, justify="right" if name else "left")
    gaps.add_row("steady", "", "", "", "", "", *_gap_cells(result.steady))
    for change in result.changes:
        operation = change.operation
        if operation is None or operation.state != "done":
            state = operation.state if operation else "refused"
            gaps.add_row(Text(f"{state}: {change.error}", style=bad))
            continue
        pause = "" if operation.pause_ms is None else f"{operation.pause_ms:.1f} ms"
        gaps.add_row(
            describe_change(operation),
            f"{sum(operation.phases.values()):.2f} s",
            pause,
            str(operation.moved_experts),
            str(operation.moved_requests),
            f"{operation.moved_kv_bytes / 2**20:.1f} MiB",
            *_gap_cells(change.gaps),
        )
    parts: list[RenderableType] = [counts, "", gaps]
    parts += [Text(f"lost: {error}", style=bad) for error in result.errors]
    if result.sample:
        parts += ["", Text.assemble((result.sample_prompt, "dim"), result.sample)]
    parts += ["", Text(f"{result.model} on {result.machine.line()}", style="dim")]
    verdict = Text(
        "Nothing was lost, and (--deterministic) every answer is what it would have been."
        if result.good
        else "This run is not as it should be.",
        style="bold green" if result.good else bad,
    )
    return Group(*parts, verdict)


def _gap_cells(gaps: Gaps) -> tuple[str, str]:
    if gaps.median_ms is None or gaps.longest_ms is None:
        return "-", "-"
    return f"{gaps.median_ms:.1f} ms", f"{gaps.longest_ms:.1f} ms"
