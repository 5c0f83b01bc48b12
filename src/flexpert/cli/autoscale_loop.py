"""The loop of `flexpert autoscale`: look, decide, ask for a change, say why."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

import msgspec
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console

from flexpert.cluster.autoscaler import Autoscaler, Step
from flexpert.cluster.views import ClusterView, OperationView
from flexpert.errors import FlexpertError


class Scaled(Protocol):
    """The part of `cli.client.Client` that is needed here."""

    def cluster(self) -> ClusterView: ...
    def metrics(self) -> str: ...
    def begin(self, body: dict[str, Any]) -> OperationView: ...
    def operation(self, operation_id: str) -> OperationView: ...


def run_autoscale(
    client: Scaled,
    scaler: Autoscaler,
    console: Console,
    *,
    dry_run: bool,
    looks: int | None,
    as_json: bool,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Look every `goals.every_s`; a service that does not answer is waited for."""
    done = 0
    shown: object = None
    while looks is None or done < looks:
        if done:
            sleep(scaler.goals.every_s)
        done += 1
        try:
            step = _look(client, scaler, clock(), dry_run=dry_run)
        except FlexpertError as error:
            if done == 1:
                raise
            if shown != str(error):
                console.print(f"{time.strftime('%H:%M:%S')} {error}", highlight=False)
            shown = str(error)
            continue
        now = (step.sample.ranks, step.decision.ranks, step.begin)
        if as_json:
            console.print(msgspec.json.encode(step).decode(), soft_wrap=True, highlight=False)
        elif shown != now:
            console.print(_line(step, dry_run=dry_run), highlight=False, soft_wrap=True)
        shown = now


def _look(client: Scaled, scaler: Autoscaler, now: float, *, dry_run: bool) -> Step:
    if scaler.pending is not None:
        state = client.operation(scaler.pending).state
        if state in ("done", "failed", "cancelled"):
            scaler.ended(now, done=state == "done")
    families = text_string_to_metric_families(client.metrics())
    step = scaler.look(client.cluster(), families, now)
    if step.begin is not None and not dry_run:
        try:
            operation = client.begin({"ranks": step.begin})
        except FlexpertError:
            scaler.ended(now, done=False, target=step.begin)
            raise
        scaler.asked(operation.id, step.begin, now)
    return step


def _line(step: Step, *, dry_run: bool) -> str:
    sample, target = step.sample, step.decision.ranks
    change = f"{sample.ranks} ranks" if target == sample.ranks else f"{sample.ranks} → {target}"
    would = " (dry run)" if dry_run and target != sample.ranks else ""
    load = f"{sample.running} running, {sample.waiting} waiting"
    return f"{time.strftime('%H:%M:%S')} {change}{would}: {step.decision.why} ({load})"
