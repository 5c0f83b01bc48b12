"""`flexpert top`'s screen: fits 80 columns and 24 lines (pure)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from flexpert.cluster.formatting import describe_change, outcome_line
from flexpert.cluster.views import ClusterView, OperationView, RankView
from flexpert.server.live_view import LiveFigures

_BLOCKS = " ▁▂▃▄▅▆▇█"
_STYLES = {"active": "green", "leaving": "magenta", "stalled": "red", "gone": "dim"}
_AROUND = 9  # lines that are no rank's
_MOST_CHANGES = 4


@dataclass
class TopState:
    """What is shown: history and operations, oldest first."""

    cluster: ClusterView
    history: list[LiveFigures]
    operations: list[OperationView]


def sparkline(values: Sequence[float], width: int) -> str:
    """The latest `width` values as blocks, the highest one full."""
    shown = values[-width:]
    most = max(shown, default=0.0)
    if most <= 0:
        return " " * len(shown)
    return "".join(_BLOCKS[round(value / most * (len(_BLOCKS) - 1))] for value in shown)


def top_screen(state: TopState, width: int, height: int | None) -> RenderableType:
    """height: lines there are; None: as many as it takes."""
    changes = list(reversed(state.operations))[:_MOST_CHANGES]
    room = None if height is None else max(1, height - _AROUND - len(changes))
    return Group(
        _head(state), _figures(state, width), Text(), _ranks(state, room), *_changes(changes)
    )


def _head(state: TopState) -> Text:
    cluster = state.cluster
    if cluster.down:
        status, style = f"down: {cluster.down}", "bold red"
    elif cluster.operation:
        running = cluster.operation
        status, style = f"changing: {running.phase} {running.progress:.0%}", "yellow"
    else:
        status, style = "serving", "green"
    active = sum(rank.state == "active" for rank in cluster.ranks)
    text = Text(no_wrap=True, overflow="ellipsis")
    text.append(cluster.model, style="bold")
    text.append(f"  epoch {cluster.epoch}  {active} of at most {cluster.max_ranks} ranks  ")
    text.append(status, style=style)
    return text


def _figures(state: TopState, width: int) -> Text:
    latest = state.history[-1] if state.history else None
    rate = 0.0 if latest is None else latest.tokens_per_s
    text = Text(no_wrap=True, overflow="ellipsis")
    text.append(f"{rate:9,.1f} tokens/s ", style="bold")
    text.append(sparkline([one.tokens_per_s for one in state.history], max(8, width - 24)), "cyan")
    first, gap = (latest.first_token_ms, latest.gap_ms) if latest else (None, None)
    text.append(f"\nfirst token {_times(first)}   between tokens {_times(gap)}")
    return text


def _times(pair: tuple[float, float] | None) -> str:
    return "-" if pair is None else f"{pair[0]:.1f} ms (95th {pair[1]:.1f})"


def _ranks(state: TopState, room: int | None) -> Table:
    ranks = state.cluster.ranks
    table = Table(box=None, padding=(0, 1), pad_edge=False, header_style="dim")
    for name in ("rank", "state", "running", "waiting", "KV", "load", "experts", "MiB", "host"):
        left = name in ("state", "host")
        table.add_column(name, justify="left" if left else "right", no_wrap=True)
    hidden = 0
    if room is not None and len(ranks) > room:
        busiest = sorted(ranks, key=lambda rank: (rank.state == "active", -rank.running, rank.id))
        kept = {rank.id for rank in busiest[: room - 1]}
        hidden = len(ranks) - len(kept)
        ranks = [rank for rank in ranks if rank.id in kept]
    for rank in ranks:
        table.add_row(*_row(rank, state.cluster.balance.rank_loads.get(rank.id)))
    if hidden:
        table.add_row("…", f"{hidden} more", style="dim")
    return table


def _row(rank: RankView, load: float | None) -> tuple[str | Text, ...]:
    memory = rank.device_memory_bytes or rank.memory_bytes
    return (
        str(rank.id),
        Text(rank.state, style=_STYLES.get(rank.state, "yellow")),
        str(rank.running),
        str(rank.waiting),
        f"{rank.kv_used:.0%}",
        "" if load is None else f"{load:.2f}×",
        str(rank.experts),
        f"{memory >> 20}",
        rank.host[:20],
    )


def _changes(changes: Sequence[OperationView]) -> list[Text]:
    lines = [Text("\nchanges", style="dim")] if changes else []
    for one in changes:
        over = one.state in ("done", "failed", "cancelled")
        how = outcome_line(one) if over else f"{one.phase} {one.progress:.0%}"
        line = f"{describe_change(one)}: {how}"
        lines.append(Text(line, no_wrap=True, overflow="ellipsis"))
    return lines
