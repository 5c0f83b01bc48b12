"""The traces of one service: which requests are traced, epochs, and operations."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping

from opentelemetry.context import Context
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.types import Scope

import flexpert
from flexpert.cluster.operation import Operation
from flexpert.cluster.views import OperationView
from flexpert.server.trace_settings import TRACE
from flexpert.server.tracing.request_trace import EpochChange, RequestTrace, WallClock
from flexpert.server.tracing.span_attributes import (
    OPERATION_SPANS,
    TRACED_PATHS,
    Attributes,
    of_operation,
)

_MOST_EPOCHS = 256  # more than there are in the time of a request

_PROPAGATOR = TraceContextTextMapPropagator()
_HEADERS = (b"traceparent", b"tracestate")


class ServiceTracing:
    """Makes spans of what the head and the HTTP side tell; a `ChangeTracer`.

    model: as it is served. epoch: the current one.
    """

    def __init__(self, provider: TracerProvider, model: str, epoch: Callable[[], int]) -> None:
        self._tracer = provider.get_tracer("flexpert", flexpert.__version__)
        self._model = model
        self._epoch = epoch
        self._epochs: deque[EpochChange] = deque(maxlen=_MOST_EPOCHS)
        self._callers: dict[str, Context] = {}  # by operations that are not over

    def request(self, scope: Scope) -> RequestTrace | None:
        """Of a request that has come in, in the trace of its caller if it names one; None: it is of
        no kind that is traced, or the sampler leaves it out."""
        name = TRACED_PATHS.get(scope["path"])
        if name is None or scope["method"] != "POST":
            return None
        clock = WallClock()
        attributes: Attributes = {
            "gen_ai.operation.name": name,
            "gen_ai.provider.name": "flexpert",
            "gen_ai.request.model": self._model,
            "gen_ai.response.model": self._model,
            "http.request.method": "POST",
            "http.route": scope["path"],
        }
        span = self._tracer.start_span(
            f"{name} {self._model}",
            _caller(scope),
            kind=SpanKind.SERVER,
            attributes=attributes,
            start_time=clock.ns(time.monotonic()),
        )
        if not span.is_recording():
            return None
        trace = RequestTrace(self._tracer, span, clock, self._epoch(), self._epochs)
        scope[TRACE] = trace
        return trace

    def asked_for(self, operation: OperationView, scope: Scope) -> None:
        """An operation's span is one of the caller's trace, if it names one; of several callers the
        first counts."""
        context = _caller(scope)
        if context and operation.state in ("preparing", "committing"):
            self._callers.setdefault(operation.id, context)

    def epoch_began(self, epoch: int, operation: OperationView | None) -> None:
        attributes: Attributes = {"flexpert.epoch": epoch}
        if operation is not None:
            attributes["flexpert.operation.id"] = operation.id
            attributes["flexpert.operation.purpose"] = operation.purpose
            if operation.pause_ms is not None:
                attributes["flexpert.pause_ms"] = operation.pause_ms
        self._epochs.append(EpochChange(time.monotonic(), epoch, attributes))

    def operation_over(self, operation: Operation) -> None:
        """A span, with one below it for each phase."""
        caller = self._callers.pop(operation.id, Context())
        if not operation.entered:
            return
        clock = WallClock()
        attributes = of_operation(operation)
        purpose = operation.purpose.value
        span = self._tracer.start_span(
            OPERATION_SPANS.get(purpose, purpose),
            caller,
            attributes=attributes,
            start_time=clock.ns(operation.entered[0][1]),
        )
        if operation.state == "failed":
            span.set_status(Status(StatusCode.ERROR, operation.error))
        within = set_span_in_context(span, Context())
        ends = operation.entered[1:]
        for (phase, began), (_, ended) in zip(operation.entered, ends, strict=False):
            if phase:
                child = self._tracer.start_span(phase, within, start_time=clock.ns(began))
                child.end(clock.ns(ended))
        span.end(clock.ns(operation.entered[-1][1]))


def _caller(scope: Scope) -> Context:
    """The trace that a request goes on with; an empty one if it names none that is right."""
    carrier: Mapping[str, str] = {
        name.decode("latin-1"): value.decode("latin-1")
        for name, value in reversed(scope["headers"])  # of several the first counts
        if name in _HEADERS
    }
    return _PROPAGATOR.extract(carrier, Context())
