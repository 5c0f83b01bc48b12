"""`flexpert status`."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from typing import Protocol

import msgspec
from rich.console import Console
from rich.live import Live

from flexpert.cluster.views import ClusterView
from flexpert.display.render import cluster_view

INTERVAL_S = 1.0


class StatusSource(Protocol):
    """The part of `cli.client.Client` that is needed here."""

    def cluster(self) -> ClusterView: ...


def run_status(
    source: StatusSource,
    *,
    console: Console,
    watch: bool = False,
    as_json: bool = False,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Once, or until Ctrl-C."""
    with suppress(KeyboardInterrupt) if watch else nullcontext():
        _show(source, console, watch, as_json, sleep)


def _show(
    source: StatusSource,
    console: Console,
    watch: bool,
    as_json: bool,
    sleep: Callable[[float], None],
) -> None:
    cluster = source.cluster()
    if as_json or not (watch and console.is_terminal):
        _print(console, cluster, as_json)
        while watch:
            sleep(INTERVAL_S)
            _print(console, source.cluster(), as_json)
        return
    with Live(cluster_view(cluster), console=console, auto_refresh=False) as live:
        while True:
            sleep(INTERVAL_S)
            live.update(cluster_view(source.cluster()), refresh=True)


def _print(console: Console, cluster: ClusterView, as_json: bool) -> None:
    if as_json:
        text = msgspec.json.encode(cluster).decode()
        console.print(text, soft_wrap=True, highlight=False, markup=False)
    else:
        console.print(cluster_view(cluster))
