"""What the HTTP side counts."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter as TallyOf
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

_FIRST_TOKEN_S = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
_CHOICES = (1, 2, 5, 10, 20)
GAP_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)

_MOST_TIMES = 4096  # of each kind, between two looks


class GapHistogram(Collector):
    """Seconds between two tokens, as a histogram of Prometheus: its own client takes ten times as
    long to count one, and here each token of each stream is."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._counts = [0] * (len(GAP_S) + 1)
        self._sum_s = 0.0
        self._created = time.time()
        registry.register(self)

    def observe(self, gap_s: float, count: int) -> None:
        """So many gaps of this length."""
        self._counts[bisect_left(GAP_S, gap_s)] += count
        self._sum_s += gap_s * count

    def collect(self) -> Iterable[Metric]:
        name = "flexpert_inter_token_seconds"
        family = Metric(name, "Between two tokens of a sequence", "histogram")
        counts = list(accumulate(self._counts))
        for bound, so_far in zip((*map(str, GAP_S), "+Inf"), counts, strict=True):
            family.add_sample(f"{name}_bucket", {"le": bound}, float(so_far))
        family.add_sample(f"{name}_count", {}, float(counts[-1]))
        family.add_sample(f"{name}_sum", {}, self._sum_s)
        family.add_sample(f"{name}_created", {}, self._created)
        return [family]


@dataclass(frozen=True, slots=True)
class Window:
    """What has come since it was asked last. first_tokens_s, gaps_s: the latest times, seconds."""

    tokens: int
    first_tokens_s: list[float]
    gaps_s: list[float]


class ServerMetrics:
    """In a registry of its own, so that one head can be served twice (tests do).

    at_once: requests being answered that count against a key's limit: "api", "control".
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "flexpert_http_requests",
            "HTTP requests answered",
            ("method", "path", "status"),
            registry=self.registry,
        )
        self.in_flight = Gauge(
            "flexpert_http_requests_in_flight",
            "HTTP requests being answered",
            registry=self.registry,
        )
        self.disconnects = Counter(
            "flexpert_http_disconnects",
            "Requests whose client went away before the answer was complete",
            registry=self.registry,
        )
        self.at_once: TallyOf[str] = TallyOf()
        self._tokens = 0
        self._first_tokens_s: deque[float] = deque(maxlen=_MOST_TIMES)
        self._gaps_s: deque[float] = deque(maxlen=_MOST_TIMES)
        self._first_token = Histogram(
            "flexpert_time_to_first_token_seconds",
            "From a request's arrival to its first token, per sequence",
            registry=self.registry,
            buckets=_FIRST_TOKEN_S,
        )
        self._gap = GapHistogram(self.registry)
        self._choices = Histogram(
            "flexpert_request_params_n",
            "choices asked for, per request",
            registry=self.registry,
            buckets=_CHOICES,
        )
        ProcessCollector(registry=self.registry)

    def refused(self, status: int) -> None:
        """A request was answered before it was whole: no method or path is sure."""
        self.requests.labels("", "unmatched", str(status)).inc()

    def first_token(self, waited_s: float) -> None:
        """A sequence's first token has come."""
        self._first_token.observe(waited_s)
        self._tokens += 1
        self._first_tokens_s.append(waited_s)

    def next_tokens(self, gap_s: float, count: int) -> None:
        """`count` more tokens of a sequence have come together."""
        self._tokens += count
        gap_s /= count
        self._gap.observe(gap_s, count)
        for _ in range(count):
            self._gaps_s.append(gap_s)

    def take_window(self) -> Window:
        """For the one who shows the service live; see `live_feed`."""
        window = Window(self._tokens, list(self._first_tokens_s), list(self._gaps_s))
        self._tokens = 0
        self._first_tokens_s.clear()
        self._gaps_s.clear()
        return window

    def asked(self, choices: int) -> None:
        """A request has come, for so many choices of each prompt."""
        self._choices.observe(choices)
