"""Metrics of the service. They live in the head, so no change of ranks resets them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from flexpert.cluster.prefix_index import RoutingDecision
from flexpert.cluster.views import BalanceView, OperationView, RankView

_PAUSE_BUCKETS_S = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)


_GAUGES: tuple[tuple[str, str, Callable[[RankView], float]], ...] = (
    ("running", "sequences being decoded", lambda rank: rank.running),
    ("waiting", "sequences waiting", lambda rank: rank.waiting),
    ("kv_used_ratio", "share of KV blocks in use", lambda rank: rank.kv_used),
    (
        "cached_blocks",
        "KV blocks that can be found as prefixes, as far as the head was told",
        lambda rank: rank.cached_blocks,
    ),
    ("memory_bytes", "private memory of the host", lambda rank: rank.memory_bytes),
    ("device_memory_bytes", "memory of the GPU", lambda rank: rank.device_memory_bytes),
    (
        "device_spare_bytes",
        "memory of the GPU that is kept for experts to come",
        lambda rank: rank.device_spare_bytes,
    ),
    ("experts", "expert replicas held", lambda rank: rank.experts),
    ("graphs", "CUDA graphs captured since the rank's start", lambda rank: rank.graphs),
)


class _RankCollector(Collector):
    """Gauges read when asked for: ranks that left simply do not appear."""

    def __init__(self, ranks: Callable[[], list[RankView]], epoch: Callable[[], int]) -> None:
        self._ranks = ranks
        self._epoch = epoch

    def describe(self) -> Iterable[GaugeMetricFamily]:
        return []

    def collect(self) -> Iterator[GaugeMetricFamily]:
        ranks = self._ranks()
        yield GaugeMetricFamily("flexpert_epoch", "current epoch", value=self._epoch())
        active = sum(rank.state == "active" for rank in ranks)
        yield GaugeMetricFamily("flexpert_ranks", "active ranks", value=active)
        for name, text, read in _GAUGES:
            family = GaugeMetricFamily(f"flexpert_rank_{name}", text, labels=["rank"])
            for rank in ranks:
                family.add_metric([str(rank.id)], read(rank))
            yield family
        family = GaugeMetricFamily(
            "flexpert_rank_wire_bytes",
            "bytes of exchanges written to a peer on another machine since it was connected",
            labels=["rank", "peer"],
        )
        for rank in ranks:
            for peer, written in rank.wire_bytes.items():
                family.add_metric([str(rank.id), str(peer)], written)
        yield family


class _BalanceCollector(Collector):
    """How even the load of experts is, and when that was looked at last."""

    def __init__(self, balance: Callable[[], BalanceView | None]) -> None:
        self._balance = balance

    def describe(self) -> Iterable[GaugeMetricFamily]:
        return []

    def collect(self) -> Iterator[GaugeMetricFamily]:
        view = self._balance()
        if view is None:
            return
        yield GaugeMetricFamily(
            "flexpert_expert_imbalance",
            "largest load of a rank by experts over the mean, over all layers",
            value=view.imbalance,
        )
        family = GaugeMetricFamily(
            "flexpert_layer_expert_imbalance", "the same of each MoE layer", labels=["layer"]
        )
        for layer, value in enumerate(view.imbalance_by_layer):
            family.add_metric([str(layer)], value)
        yield family
        family = GaugeMetricFamily(
            "flexpert_rank_expert_load_ratio",
            "load of a rank by experts over the mean of all",
            labels=["rank"],
        )
        for rank, value in view.rank_loads.items():
            family.add_metric([str(rank)], value)
        yield family
        yield GaugeMetricFamily("flexpert_rebalances", "rebalances begun", value=view.rebalances)
        if view.age_s is not None:
            yield GaugeMetricFamily(
                "flexpert_balance_decision_age_seconds",
                "time since it was decided whether to move experts",
                value=view.age_s,
            )


class Metrics:
    """What the head counts."""

    def __init__(
        self,
        ranks: Callable[[], list[RankView]],
        epoch: Callable[[], int],
        unfinished: Callable[[], int],
        balance: Callable[[], BalanceView | None] = lambda: None,
    ) -> None:
        """unfinished: sequences in the journal, whether a rank has them or not."""
        self.registry = CollectorRegistry()
        self.registry.register(_RankCollector(ranks, epoch))
        self.registry.register(_BalanceCollector(balance))
        self.prompt_tokens = Counter(
            "flexpert_prompt_tokens", "tokens of admitted prompts", registry=self.registry
        )
        self.cached_tokens = Counter(
            "flexpert_cached_prompt_tokens",
            "tokens of prompts that ranks found in their prefix caches",
            registry=self.registry,
        )
        self.routing_cached_tokens = Counter(
            "flexpert_routing_cached_tokens",
            "tokens of prompts that the rank they were given to has, or is about to compute",
            registry=self.registry,
        )
        self.routing_decisions = Counter(
            "flexpert_routing_decisions",
            "sequences given to a rank; prefix: none has more of their prefix; load: another has, "
            "and is too busy or too full; none: nobody has any of it",
            ["reason"],
            registry=self.registry,
        )
        self.tokens = Counter("flexpert_tokens", "tokens published", registry=self.registry)
        self.degraded_tokens = Counter(
            "flexpert_degraded_tokens",
            "tokens computed without some experts, or after such",
            registry=self.registry,
        )
        self.degraded_sequences = Counter(
            "flexpert_degraded_sequences", "sequences with such tokens", registry=self.registry
        )
        self.sequences = Counter(
            "flexpert_sequences", "sequences by how they ended", ["outcome"], registry=self.registry
        )
        Gauge(
            "flexpert_unfinished_sequences", "sequences accepted and kept", registry=self.registry
        ).set_function(unfinished)
        self.operations = Counter(
            "flexpert_operations", "changes by how they ended", ["state"], registry=self.registry
        )
        self.moved_experts = Counter(
            "flexpert_moved_experts", "expert replicas loaded by changes", registry=self.registry
        )
        self.moved_requests = Counter(
            "flexpert_moved_requests", "sequences moved by changes", registry=self.registry
        )
        self.moved_with_kv = Counter(
            "flexpert_moved_with_kv", "sequences moved with their KV", registry=self.registry
        )
        self.moved_kv_bytes = Counter(
            "flexpert_moved_kv_bytes", "KV that moved with sequences", registry=self.registry
        )
        self.recomputed_tokens = Counter(
            "flexpert_recomputed_tokens",
            "tokens of leavers computed again for want of room",
            registry=self.registry,
        )
        self.pause = Histogram(
            "flexpert_pause_seconds",
            "serving pause of a change",
            buckets=_PAUSE_BUCKETS_S,
            registry=self.registry,
        )

    def routed(self, decision: RoutingDecision) -> None:
        self.routing_decisions.labels(decision.reason).inc()
        self.routing_cached_tokens.inc(decision.cached)

    def operation_over(self, view: OperationView) -> None:
        self.operations.labels(view.state).inc()
        if view.state == "done":
            self.moved_experts.inc(view.moved_experts)
            self.moved_requests.inc(view.moved_requests)
            self.moved_with_kv.inc(view.moved_with_kv)
            self.moved_kv_bytes.inc(view.moved_kv_bytes)
            self.recomputed_tokens.inc(view.recomputed_tokens)
            if view.pause_ms is not None:
                self.pause.observe(view.pause_ms / 1e3)
