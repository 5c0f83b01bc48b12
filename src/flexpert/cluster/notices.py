"""What the coordinator tells people: in the log, and to who listens."""

from __future__ import annotations

import logging
import time

import msgspec

from flexpert.cluster.formatting import outcome_line
from flexpert.cluster.interfaces import HeadInterface
from flexpert.cluster.operation import Operation
from flexpert.cluster.views import ClusterEvent

log = logging.getLogger("flexpert")


class Notices:
    """Through the head's events."""

    def __init__(self, head: HeadInterface) -> None:
        self._head = head
        self._warned = ""  # the latest text that is not to be repeated
        self._left_out: frozenset[int] = frozenset()  # who was warned of

    def publish(self, kind: str, data: dict[str, object]) -> None:
        self._head.publish(ClusterEvent(kind=kind, time=time.time(), data=data))

    def warn(self, text: str, rank: int | None = None) -> None:
        log.warning("%s", text, extra={"rank": rank})
        named: dict[str, object] = {} if rank is None else {"rank": rank}
        self.publish("warning", {**named, "error": text})

    def warn_once(self, text: str) -> None:
        """Unless it was the latest that was said so."""
        if text != self._warned:
            self._warned = text
            self.warn(text)

    def left_out(self, ranks: frozenset[int]) -> None:
        """Which ranks are not restarted any more: each is warned of once."""
        for rank in sorted(ranks - self._left_out):
            self.warn(
                f"rank {rank} keeps ending and is left out; scale to have it tried again", rank
            )
        self._left_out = ranks

    def operation(self, operation: Operation) -> None:
        """How an operation goes on, or ended."""
        view = operation.view()
        if self._head.saves:
            self._head.save_operation(operation.record(), urgent=False)
        if operation.over.is_set():
            level = logging.WARNING if view.state == "failed" else logging.INFO
            about = {"operation": view.id, "epoch": view.epoch}
            log.log(level, "%s: %s", view.id, outcome_line(view), extra=about)
        self.publish("operation", msgspec.to_builtins(view))

    def progress(self, operation: Operation) -> None:
        """How an operation goes on, if anybody listens."""
        if self._head.heard():
            self.operation(operation)
