"""One HTTP request: what is written down while it is answered, and its spans at the end."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from opentelemetry.context import Context
from opentelemetry.trace import Span, Status, StatusCode, Tracer, set_span_in_context

from flexpert.cluster.sequence_trace import SequenceTrace, StageTime
from flexpert.frontend.generation import Generation
from flexpert.server.tracing.span_attributes import (
    Attributes,
    Value,
    of_move,
    of_params,
    of_sequences,
    of_stage,
    of_usage,
)


@dataclass(frozen=True, slots=True)
class EpochChange:
    """When an epoch began, by the monotonic clock, and what it says of it."""

    at: float
    epoch: int
    attributes: Mapping[str, Value]


class WallClock:
    """Times of the monotonic clock as those of spans: nanoseconds since 1970."""

    def __init__(self) -> None:
        self._offset = time.time_ns() - time.monotonic_ns()

    def ns(self, seconds: float) -> int:
        return int(seconds * 1e9) + self._offset


class RequestTrace:
    """Made when a request has come in; `end` must be called.

    span: of the whole request, begun. epochs: those that have begun lately; read at the end.
    """

    def __init__(
        self,
        tracer: Tracer,
        span: Span,
        clock: WallClock,
        epoch: int,
        epochs: Iterable[EpochChange],
    ) -> None:
        self._tracer = tracer
        self._span = span
        self._clock = clock
        self._epoch = epoch
        self._epochs = epochs
        self._arrived = time.monotonic()
        self._preprocessed: tuple[float, float] | None = None
        self._sequences: list[SequenceTrace] = []
        self._generation: Generation | None = None

    def preprocessed(self, began: float) -> None:
        """Its body has been with a preprocessing worker since then, or has waited for one."""
        self._preprocessed = (began, time.monotonic())

    def generates(self, generation: Generation, stream: bool) -> None:
        """It is valid, and about to be submitted."""
        self._generation = generation
        self._set(self._span, of_params(generation.request_id, generation.params, stream))

    def sequence(self) -> SequenceTrace:
        """Of the next choice."""
        self._sequences.append(SequenceTrace())
        return self._sequences[-1]

    def end(self, status: int, *, client_gone: bool) -> None:
        """The answer is out, or nobody waits for it any more."""
        now = time.monotonic()
        if self._preprocessed is not None:
            self._child("preprocess", self._span, *self._preprocessed)
        stages = [one.stages(now) for one in self._sequences]
        for number, (sequence, its_stages) in enumerate(zip(self._sequences, stages, strict=True)):
            span = self._span
            if len(self._sequences) > 1:
                span = self._choice(number, sequence)
            self._tell(span, sequence, its_stages)
            if span is not self._span:
                span.end(self._clock.ns(its_stages[-1].ended))
        if self._sequences:
            self._set(self._span, of_sequences(self._sequences, stages, self._arrived))
            self._tell_epochs(now)
        if self._generation is not None:
            self._set(self._span, of_usage(self._generation.usage))
        self._set(self._span, {"http.response.status_code": status})
        if client_gone:
            self._set(self._span, {"flexpert.client_gone": True})
        self._judge(status)
        self._span.end(self._clock.ns(now))

    def _choice(self, number: int, sequence: SequenceTrace) -> Span:
        span = self._tracer.start_span(
            f"choice {number}",
            set_span_in_context(self._span, Context()),
            start_time=self._clock.ns(sequence.opened),
        )
        self._set(span, {"flexpert.choice": number, "flexpert.outcome": sequence.outcome})
        return span

    def _tell(self, span: Span, sequence: SequenceTrace, stages: list[StageTime]) -> None:
        for stage in stages:
            self._child(stage.stage, span, stage.began, stage.ended, of_stage(stage))
        if sequence.first is not None:
            self._event(span, "first token", sequence.first)
        for stay in sequence.stays:
            if stay.lost and stay.ended is not None:
                self._event(span, "rank lost", stay.ended, {"flexpert.rank": stay.rank})
        for left, came in sequence.moves:
            self._event(span, "moved", came.began, of_move(sequence, left, came))

    def _tell_epochs(self, now: float) -> None:
        """Which there were meanwhile, what has led to them, and how long that held all requests
        up."""
        met = [one for one in self._epochs if self._arrived < one.at <= now]
        found: Attributes = {"flexpert.epochs": [self._epoch, *(one.epoch for one in met)]}
        for one in met:
            self._event(self._span, "epoch began", one.at, one.attributes)
        operations = [str(one.attributes.get("flexpert.operation.id", "")) for one in met]
        if any(operations):
            found["flexpert.operations"] = operations
        pauses = [one.attributes.get("flexpert.pause_ms", 0.0) for one in met]
        if met:
            found["flexpert.pause_ms"] = sum(p for p in pauses if isinstance(p, float))
        self._set(self._span, found)

    def _judge(self, status: int) -> None:
        """A server's error, of the request or of a sequence whose status had been sent."""
        if 400 <= status < 500:
            return
        errors = [one.error for one in self._sequences if one.outcome == "failed"]
        if errors or status >= 500:
            self._set(self._span, {"error.type": "sequence_failed" if errors else str(status)})
            self._span.set_status(Status(StatusCode.ERROR, errors[0] if errors else None))

    def _child(
        self,
        name: str,
        parent: Span,
        began: float,
        ended: float,
        attributes: Attributes | None = None,
    ) -> None:
        context = set_span_in_context(parent, Context())
        start = self._clock.ns(began)
        span = self._tracer.start_span(name, context, attributes=attributes, start_time=start)
        span.end(self._clock.ns(ended))

    def _event(
        self, span: Span, name: str, at: float, attributes: Mapping[str, Value] | None = None
    ) -> None:
        span.add_event(name, attributes, self._clock.ns(at))

    def _set(self, span: Span, attributes: Attributes) -> None:
        span.set_attributes(attributes)
