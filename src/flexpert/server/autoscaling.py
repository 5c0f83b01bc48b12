"""`serve --autoscale`: the autoscaler inside of the service that it scales."""

from __future__ import annotations

import asyncio
import logging
import time
from itertools import chain
from typing import TYPE_CHECKING

from prometheus_client import Counter, Gauge

from flexpert.cluster.autoscaler import Autoscaler, Step
from flexpert.cluster.handover.messages import ServiceHandedOver
from flexpert.cluster.views import ClusterEvent
from flexpert.errors import FlexpertError, OperationError, UnknownOperation

if TYPE_CHECKING:
    from flexpert.cluster.head import Head
    from flexpert.server.http_metrics import ServerMetrics

log = logging.getLogger("flexpert.autoscaler")


class AutoscaleTask:
    """Looks at the service, and asks for changes as anybody else would.

    dry_run: it says what it would do, and does nothing. A policy that raises is told in the log,
    and nothing is changed.
    """

    def __init__(
        self, head: Head, metrics: ServerMetrics, scaler: Autoscaler, *, dry_run: bool
    ) -> None:
        self._head = head
        self._metrics = metrics
        self._scaler = scaler
        self._dry_run = dry_run
        self._told: int | None = None  # ranks that were called for when it was told last
        self._target = Gauge(
            "flexpert_autoscale_target_ranks",
            "ranks that the autoscaler calls for",
            registry=metrics.registry,
        )
        self._changes = Counter(
            "flexpert_autoscale_changes",
            "changes that the autoscaler asked for",
            ["direction"],
            registry=metrics.registry,
        )

    async def run(self) -> None:
        """Until it is cancelled, or another head has the service: that one scales it now."""
        goals = self._scaler.goals
        log.info("autoscaler: %d to %d ranks", goals.min, goals.max)
        while True:
            await asyncio.sleep(goals.every_s)
            try:
                await self._look()
            except ServiceHandedOver:
                return
            except OperationError as error:
                self._scaler.ended(time.monotonic(), done=False)
                log.warning("autoscaler: %s", error)
            except FlexpertError as error:  # the service stops
                log.debug("autoscaler: %s", error)
            except Exception:  # the user's policy
                log.exception("autoscaler: the policy failed; nothing is changed")

    async def _look(self) -> None:
        head, scaler, now = self._head, self._scaler, time.monotonic()
        if scaler.pending is not None:
            try:
                state = head.operation(scaler.pending).state
            except UnknownOperation:
                state = "failed"
            if state in ("done", "failed", "cancelled"):
                scaler.ended(now, done=state == "done")
        families = chain(head.registry.collect(), self._metrics.registry.collect())
        step = scaler.look(head.cluster(), families, now)
        self._target.set(step.decision.ranks)
        self._tell(step)
        if step.begin is None or self._dry_run:
            return
        self._changes.labels("up" if step.begin > step.sample.ranks else "down").inc()
        operation = await head.request_operation(ranks=step.begin)
        scaler.asked(operation.id, step.begin, now)

    def _tell(self, step: Step) -> None:
        target, ranks = step.decision.ranks, step.sample.ranks
        begins = step.begin is not None and not self._dry_run
        if not begins and target == self._told:
            return
        self._told = target
        if target == ranks and step.begin is None:
            return
        would = "" if begins else " (not done: --autoscale-dry-run)" if self._dry_run else ""
        log.info("autoscaler: %d → %d ranks%s: %s", ranks, target, would, step.decision.why)
        data: dict[str, object] = {"ranks": ranks, "target": target, "why": step.decision.why}
        data["begun"] = begins
        self._head.publish(ClusterEvent(kind="autoscale", time=time.time(), data=data))
