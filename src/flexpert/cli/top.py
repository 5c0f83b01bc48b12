"""`flexpert top`: ranks, figures and changes in a terminal, from the stream that the page at `/`
reads."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing, suppress
from typing import Any, Protocol

import msgspec
from rich.console import Console
from rich.live import Live

from flexpert.cluster.views import ClusterEvent, ClusterView, OperationView
from flexpert.display.top_view import TopState, top_screen
from flexpert.errors import FlexpertError
from flexpert.server.live_view import LiveChange, LiveSnapshot

RETRY_S = 1.0


class LiveSource(Protocol):
    """The part of `cli.client.Client` that is needed here."""

    def live(self) -> Iterator[tuple[str, bytes]]: ...


class TopModel:
    """What is known of the service from the events of `GET /cluster/stream`."""

    def __init__(self) -> None:
        self.state: TopState | None = None
        self._cluster: dict[str, Any] = {}
        self._ranks: dict[int, dict[str, Any]] = {}

    def apply(self, name: str, data: bytes) -> bool:
        """Whether there is something else to show. Raises: msgspec.MsgspecError"""
        if name == "snapshot":
            told = msgspec.json.decode(data, type=LiveSnapshot)
            self._cluster = msgspec.structs.asdict(told.cluster)
            self._ranks = {rank.id: msgspec.structs.asdict(rank) for rank in told.cluster.ranks}
            self.state = TopState(told.cluster, list(told.history), list(told.operations))
            return True
        if self.state is None:
            return False
        if name == "change":
            self._change(self.state, msgspec.json.decode(data, type=LiveChange))
        elif name == "operation":
            event = msgspec.json.decode(data, type=ClusterEvent)
            view = msgspec.convert(event.data, OperationView)
            kept = [one for one in self.state.operations if one.id != view.id]
            self.state.operations[:] = [*kept[-63:], view]
        else:
            return False
        return True

    def _change(self, state: TopState, told: LiveChange) -> None:
        self._cluster.update(told.cluster)
        for rank in told.ranks:
            self._ranks[rank["id"]] = {**self._ranks.get(rank["id"], {}), **rank}
        for rank_id in told.left:
            self._ranks.pop(rank_id, None)
        ranks = [self._ranks[rank_id] for rank_id in sorted(self._ranks)]
        whole = {**self._cluster, "ranks": ranks}
        state.cluster = msgspec.convert(msgspec.to_builtins(whole), ClusterView, strict=False)
        if told.figures is not None:
            state.history[:] = [*state.history[-899:], told.figures]


def run_top(
    source: LiveSource, *, console: Console, once: bool = False, as_json: bool = False
) -> None:
    """Until Ctrl-C, or what is there now, once; JSON is always once."""
    if once or as_json or not console.is_terminal:
        _once(source, console, as_json)
        return
    model = TopModel()
    with (
        suppress(KeyboardInterrupt),
        Live(console=console, screen=True, auto_refresh=False) as live,
    ):
        while True:
            try:
                for name, data in source.live():
                    if model.apply(name, data) and model.state is not None:
                        screen = top_screen(model.state, console.width, console.height)
                        live.update(screen, refresh=True)
            except FlexpertError as error:
                if model.state is None:
                    raise
                live.update(f"{error}\n\ntrying again", refresh=True)
            time.sleep(RETRY_S)


def _once(source: LiveSource, console: Console, as_json: bool) -> None:
    events = source.live()
    with closing(events):  # type: ignore[type-var]  # a generator
        for name, data in events:
            if name != "snapshot":
                continue
            if as_json:
                console.print(data.decode(), soft_wrap=True, highlight=False, markup=False)
                return
            model = TopModel()
            model.apply(name, data)
            assert model.state is not None  # it was a snapshot
            console.print(top_screen(model.state, console.width, None))
            return
