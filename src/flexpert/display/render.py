"""Ranks, placement and changes as people read them: lines and rich tables (pure)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from flexpert.bench.load_timeline import bars
from flexpert.cluster.formatting import describe_change, ids
from flexpert.cluster.views import ClusterView, OperationView, RankView, SpareView

if TYPE_CHECKING:
    from flexpert.bench.load_timeline import TimelinePoint
    from flexpert.bench.other_server import Against
    from flexpert.bench.serve import Reference, ServeReport
    from flexpert.bench.statistics import Goodput, Summary
    from flexpert.bench.timed_events import EventOutcome

_RANK_STYLE = {
    "active": "green",
    "ready": "cyan",
    "preparing": "yellow",
    "starting": "yellow",
    "leaving": "magenta",
    "gone": "dim",
}
_OPERATION_STYLE = {"done": "green", "failed": "bold red", "cancelled": "yellow"}


def phase_line(name: str, seconds: float) -> str:
    return f"  {name:<10} {seconds:7.3f} s"


def ranks_table(ranks: Sequence[RankView], max_ranks: int) -> Table:
    table = Table(title=f"ranks (of at most {max_ranks})", title_justify="left", box=None)
    table.add_column("id", justify="right")
    table.add_column("state")
    gpus = any(rank.device_memory_bytes for rank in ranks)
    remote = any(rank.over_nixl for rank in ranks)
    columns = ("running", "waiting", "KV", "experts", "memory")
    for name in (*columns, "GPU memory") if gpus else columns:
        table.add_column(name, justify="right")
    if remote:
        table.add_column("over NIXL to")
    table.add_column("host", style="dim")
    table.add_column("pid", justify="right", style="dim")
    for rank in ranks:
        table.add_row(
            str(rank.id),
            Text(rank.state, style=_RANK_STYLE.get(rank.state, "")),
            str(rank.running),
            str(rank.waiting),
            f"{rank.kv_used:.0%}",
            str(rank.experts),
            _mib(rank.memory_bytes),
            *([_device_memory(rank)] if gpus else []),
            *([ids(rank.over_nixl)] if remote else []),
            rank.host,
            str(rank.pid or ""),
        )
    return table


def _device_memory(rank: RankView) -> str:
    spare = rank.device_spare_bytes
    return _mib(rank.device_memory_bytes) + (f" ({_mib(spare)} spare)" if spare else "")


def _mib(size: int) -> str:
    return f"{size / 2**20:.0f} MiB" if size else ""


def operation_table(operation: OperationView) -> RenderableType:
    """A change with the phases so far."""
    state = Text(operation.state, style=_OPERATION_STYLE.get(operation.state, "yellow"))
    head = Text.assemble(f"{operation.id}  {describe_change(operation)}  ", state)
    table = Table(box=None, show_header=False, padding=(0, 1))
    table.add_column()
    table.add_column(justify="right")
    for name, seconds in operation.phases.items():
        now = name == operation.phase
        table.add_row(
            Text(("▸ " if now else "✓ ") + name, style="bold" if now else ""), f"{seconds:.3f} s"
        )
    return Group(head, table)


def _spare(spare: SpareView) -> str:
    return f"rank {spare.id} (pid {spare.pid})" if spare.ready else f"rank {spare.id} (starting)"


def cluster_view(cluster: ClusterView) -> RenderableType:
    """`flexpert status`."""
    placement = cluster.placement
    summary = Text(f"{cluster.model}, epoch {cluster.epoch}", style="bold")
    experts = (
        f"placement: {placement.replicas} replicas of {placement.layers} layers × "
        f"{placement.experts} experts"
    )
    parts: list[RenderableType] = [summary, ranks_table(cluster.ranks, cluster.max_ranks), experts]
    if cluster.down:
        parts.append(Text(f"down: {cluster.down}; requests wait", style="bold red"))
    if placement.missing_experts:
        text = f"{placement.missing_experts} experts are held by nobody: answers are degraded"
        parts.append(Text(text, style="bold red"))
    if placement.under_replicated_experts:
        text = f"{placement.under_replicated_experts} experts have fewer replicas than asked for"
        parts.append(Text(text, style="yellow"))
    if cluster.spares:
        parts.append("spare: " + ", ".join(map(_spare, cluster.spares)))
    if cluster.left_out:
        parts.append(Text(f"left out, for they kept ending: {ids(cluster.left_out)}", style="red"))
    if cluster.operation:
        parts.append(operation_table(cluster.operation))
    else:
        parts.append(Text("no change is running", style="dim"))
    return Group(*parts)


def figures_text(report: ServeReport) -> str:
    """`flexpert bench serve`."""
    found = report.service
    lines = [
        f"{report.model}"
        + (
            f" on {report.ranks} rank(s) of {report.threads_per_rank} thread(s)"
            * bool(report.ranks)
        )
        + f": {report.offered}",
        report.machine.line(),
        "",
        f"requests            {found.requests - found.failed} answered, {found.failed} failed, "
        f"in {found.duration_s:.2f} s",
        f"requests/s          {found.requests_per_s:.2f}",
        f"output tokens/s     {found.output_tokens_per_s:.1f}",
        *([_goodput_line(found.goodput)] if found.goodput else ()),
        *(
            _processor_line(name, cpu_s, found.output_tokens)
            for name, cpu_s in (("head", report.head_cpu_s), ("client", report.client_cpu_s))
            if cpu_s is not None
        ),
        "",
        f"{'ms':<20}{'mean':>9}{'p50':>9}{'p90':>9}{'p99':>9}{'longest':>9}",
        _summary_line("time to first token", found.first_token_ms),
        _summary_line("inter-token latency", found.inter_token_ms),
        _summary_line("end to end", found.end_to_end_ms),
    ]
    lines += [f"failed: {error}" for error in found.errors]
    if report.timeline:
        lines += ["", *_timeline_lines(report.timeline, report.events)]
    for outcome in report.events:
        lines += _event_lines(outcome)
    if report.references:
        lines += ["", "transformers alone:"]
        lines += [_reference_line(reference) for reference in report.references]
    if report.against is not None:
        lines += ["", *_against_lines(report.against)]
    return "\n".join(lines)


def _processor_line(name: str, cpu_s: float, tokens: int) -> str:
    of_token = f", {cpu_s / tokens * 1e6:.0f} µs a token" if tokens else ""
    return f"{name:<20}{cpu_s:.2f} s of CPU{of_token}"


def _goodput_line(goodput: Goodput) -> str:
    goals = " ".join(f"{name}:{limit:g}" for name, limit in goodput.goals_ms.items())
    return (
        f"goodput             {goodput.requests_per_s:.2f} requests/s, {goodput.share:.1%} kept to "
        f"{goals}"
    )


def _timeline_lines(points: Sequence[TimelinePoint], events: Sequence[EventOutcome]) -> list[str]:
    """Throughput over time, and below it where events began."""
    values = [point.tokens_per_s for point in points]
    step_s = points[1].at_s if len(points) > 1 else 1.0
    lines = [
        f"tokens/s in steps of {step_s:g} s, up to {max(values):,.0f}",
        f"  {bars(values)}",
    ]
    begun = {
        int(outcome.begun_s // step_s): str(number % 10)
        for number, outcome in enumerate(events, 1)
        if outcome.begun_s is not None
    }
    if begun:
        lines.append("  " + "".join(begun.get(n, " ") for n in range(max(begun) + 1)))
        named = (f"{number} {outcome.what}" for number, outcome in enumerate(events, 1))
        lines.append(f"  {', '.join(named)}")
    return lines


def _event_lines(outcome: EventOutcome) -> list[str]:
    told = f"t={outcome.at_s:g} {outcome.what}: {outcome.state}"
    if outcome.begun_s is not None and outcome.ended_s is not None:
        told += f" after {outcome.ended_s - outcome.begun_s:.2f} s"
    if outcome.begun_s is not None and outcome.detected_s is not None:
        told += f", noticed after {(outcome.detected_s - outcome.begun_s) * 1e3:.0f} ms"
    if outcome.longest_gap_ms is not None:
        told += f", longest gap in a stream {outcome.longest_gap_ms:.0f} ms"
    if outcome.error:
        told += f": {outcome.error}"
    lines = [told]
    for operation in outcome.operations:
        phases = ", ".join(f"{name} {seconds:.3f} s" for name, seconds in operation.phases.items())
        pause = "" if operation.pause_ms is None else f"; pause {operation.pause_ms:.1f} ms"
        lines.append(f"  {operation.purpose} {operation.id}: {phases}{pause}")
    return lines


def _against_lines(against: Against) -> list[str]:
    lines = [
        f"{against.url} ({against.model}), in turn with ours:",
        f"{'':<10}{'output tokens/s':>22}{'first token, ms':>22}{'inter-token, ms':>22}",
        f"{'round':<10}" + f"{'ours':>11}{'theirs':>11}" * 3,
    ]
    for number, turn in enumerate(against.rounds, 1):
        pairs = [
            (each.output_tokens_per_s, _mean(each.first_token_ms), _mean(each.inter_token_ms))
            for each in (turn.ours, turn.theirs)
        ]
        cells = [f"{value:>11.1f}" for pair in zip(*pairs, strict=True) for value in pair]
        lines.append(f"{number:<10}" + "".join(cells))
        failed = turn.ours.failed, turn.theirs.failed
        if any(failed):
            lines.append(f"{'':<10}failed: {failed[0]} of ours, {failed[1]} of theirs")
    ratios = (against.tokens_ratio, against.first_token_ratio, against.inter_token_ratio)
    told = ["-" if ratio is None else f"{ratio:.2f}" for ratio in ratios]
    return [*lines, f"{'ratio':<10}" + "".join(f"{text:>22}" for text in told)]


def _mean(summary: Summary | None) -> float:
    return math.nan if summary is None else summary.mean


def _summary_line(name: str, summary: Summary | None) -> str:
    if summary is None:
        return f"{name:<20}        -"
    values = (summary.mean, summary.p50, summary.p90, summary.p99, summary.longest)
    return f"{name:<20}" + "".join(f"{value:9.1f}" for value in values)


def _reference_line(reference: Reference) -> str:
    way = f"{reference.method}, {reference.concurrency or 'all'} at once"
    if reference.error is not None or reference.output_tokens_per_s is None:
        return f"  {way:<28} failed: {reference.error}"
    return (
        f"  {way:<28}{reference.output_tokens_per_s:9.1f} output tokens/s "
        f"({reference.threads} threads); flexpert: {reference.ratio:.2f} times as many"
    )
