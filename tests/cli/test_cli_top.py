"""`flexpert top` and `flexpert scale --dry-run`: what they show."""

from __future__ import annotations

import io
import json

import msgspec
import pytest
from rich.console import Console

from flexpert.cli.scale import print_preview
from flexpert.cli.top import TopModel, run_top
from flexpert.cluster.views import (
    ChangePreview,
    ClusterEvent,
    ClusterView,
    OperationView,
    PlacementView,
    RankView,
)
from flexpert.display.top_view import sparkline, top_screen
from flexpert.server.live_view import LiveFigures, LiveSnapshot, change


def snapshot(ranks: int) -> LiveSnapshot:
    views = [
        RankView(id=id, state="active", host=f"node-{id}", pid=1, running=id) for id in range(ranks)
    ]
    placement = PlacementView(layers=1, experts=2, replicas=2, experts_per_rank={})
    cluster = ClusterView(
        epoch=3, model="m", max_ranks=64, ranks=views, placement=placement, operation=None
    )
    figures = LiveFigures(1.0, 1234.5, (10.0, 20.0), (5.0, 6.0), 3, 0, ranks)
    return LiveSnapshot(
        cluster=cluster, operations=[], events=[], history=[figures], interval_s=1.0
    )


def shown(model: TopModel, height: int | None) -> list[str]:
    console = Console(file=io.StringIO(), width=80)
    assert model.state is not None
    console.print(top_screen(model.state, 80, height))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


@pytest.mark.parametrize("ranks", [1, 3, 64])
def test_the_screen_fits_80_columns_and_24_lines(ranks: int) -> None:
    model = TopModel()
    model.apply("snapshot", msgspec.json.encode(snapshot(ranks)))
    for number in range(6):
        view = OperationView(
            id=f"op-{number}",
            state="done",
            target=list(range(ranks)),
            add=list(range(ranks)),
            remove=[],
            phase="done",
            progress=1.0,
            phases={"load": 1.0},
            epoch=number,
        )
        event = ClusterEvent(kind="operation", time=1.0, data=msgspec.to_builtins(view))
        assert model.apply("operation", msgspec.json.encode(event))
    lines = shown(model, 24)
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80
    assert any("1,234.5 tokens/s" in line for line in lines)
    if ranks == 64:
        assert any("more" in line for line in lines)
        assert any(line.split()[:1] == ["63"] for line in lines)  # the busiest


def test_changes_are_applied_to_what_was_shown_first() -> None:
    first = snapshot(2)
    model = TopModel()
    assert not model.apply("change", b"{}")
    model.apply("snapshot", msgspec.json.encode(first))
    busy = msgspec.structs.replace(first.cluster.ranks[0], running=9, kv_used=0.5)
    after = msgspec.structs.replace(first.cluster, ranks=[busy], epoch=4)
    model.apply("change", msgspec.json.encode(change(first.cluster, after)))
    assert model.state is not None
    assert model.state.cluster == after


def test_a_sparkline_is_as_wide_as_asked_for() -> None:
    assert sparkline([0.0, 4.0, 8.0], 2) == "▄█"
    assert sparkline([0.0], 8) == " "


def test_once_as_json_is_the_first_event_and_the_stream_is_left() -> None:
    class Source:
        left = False

        def live(self):
            try:
                yield "snapshot", msgspec.json.encode(snapshot(1))
                pytest.fail("more was asked for")
            finally:
                self.left = True

    source, console = Source(), Console(file=io.StringIO(), width=80)
    run_top(source, console=console, once=True, as_json=True)
    assert isinstance(console.file, io.StringIO)
    assert json.loads(console.file.getvalue())["cluster"]["epoch"] == 3
    assert source.left


def test_a_preview_is_told_in_lines() -> None:
    console = Console(file=io.StringIO(), width=80)
    preview = ChangePreview(
        target=[0, 2],
        add=[2],
        remove=[1],
        moved_experts=8,
        moved_bytes=2**21,
        experts_to_load={2: 8},
        moved_requests=3,
    )
    print_preview(console, preview, as_json=False)
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    assert lines == [
        "2 would join, 1 would leave → ranks 0 2",
        "8 experts to load, 2 MiB; the most on rank 2: 8",
        "3 requests to move",
    ]
