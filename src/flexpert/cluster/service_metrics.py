"""Metrics of the service. They live in the head, so no change of ranks resets them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from flexpert.cluster.journal import Entry
from flexpert.cluster.prefix_index import RoutingDecision
from flexpert.cluster.request_times import spans
from flexpert.cluster.views import BalanceView, OperationView, RankView
from flexpert.config import EngineConfig
from flexpert.engine import rank_protocol as msg
from flexpert.engine.draft_counts import DraftCounts

_PAUSE_S = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
_DETECTION_S = (0.01, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
_REQUEST_S: tuple[float, ...] = (
    0.01,
    0.05,
    0.1,
    0.3,
    0.5,
    0.8,
    1.0,
    1.5,
    2.0,
    2.5,
    5.0,
    10.0,
    15.0,
    20.0,
    30.0,
)
_REQUEST_S += (40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0)
_REQUEST_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1e3, 2e3, 5e3, 1e4, 2e4, 5e4, 1e5, 2e5, 5e5)
_STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


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
    ("slow", "1: it holds the others up, by no work of its own", lambda rank: rank.slow),
)
_COUNTERS: tuple[tuple[str, str, Callable[[RankView], float]], ...] = (
    ("exchanges", "dispatches, each with its combine", lambda rank: rank.exchanges),
    ("exchange_bytes", "bytes of rows sent in dispatches", lambda rank: rank.exchanged_bytes),
    (
        "dispatch_wait_seconds",
        "waited in dispatches until all peers' rows had come",
        lambda rank: rank.dispatch_wait_s,
    ),
    (
        "combine_wait_seconds",
        "waited in combines until all peers' results had come",
        lambda rank: rank.combine_wait_s,
    ),
)


def cache_config(engine: EngineConfig, blocks: int) -> dict[str, str]:
    """What does not change while a service runs, as vLLM tells it. blocks: of a rank's KV cache."""
    return {
        "block_size": str(engine.kv_block_size),
        "blocks_per_rank": str(blocks),
        "cache_dtype": "auto",
        "enable_prefix_caching": str(engine.prefix_cache),
        "device": engine.device,
    }


class _RankCollector(Collector):
    """Read when asked for: ranks that left simply do not appear."""

    def __init__(
        self,
        ranks: Callable[[], list[RankView]],
        epoch: Callable[[], int],
        unfinished: Callable[[], int],
        unassigned: Callable[[], int],
        cache: Callable[[], Mapping[str, str]],
    ) -> None:
        self._ranks = ranks
        self._epoch = epoch
        self._unfinished = unfinished
        self._unassigned = unassigned
        self._cache = cache

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        ranks = self._ranks()
        yield from self._of_the_service(ranks)
        for name, text, read in _GAUGES:
            family = GaugeMetricFamily(f"flexpert_rank_{name}", text, labels=["rank"])
            for rank in ranks:
                family.add_metric([str(rank.id)], read(rank))
            yield family
        for name, text, read in _COUNTERS:
            counted = CounterMetricFamily(f"flexpert_rank_{name}", text, labels=["rank"])
            for rank in ranks:
                counted.add_metric([str(rank.id)], read(rank))
            yield counted
        waits = CounterMetricFamily(
            "flexpert_rank_peer_wait_seconds",
            "from the begin of this rank's waits in exchanges until that peer's part had come",
            labels=["rank", "peer"],
        )
        wire = GaugeMetricFamily(
            "flexpert_rank_wire_bytes",
            "bytes of exchanges written to a peer on another machine since it was connected",
            labels=["rank", "peer"],
        )
        for rank in ranks:
            for peer, seconds in rank.waited_for.items():
                waits.add_metric([str(rank.id), str(peer)], seconds)
            for peer, written in rank.wire_bytes.items():
                wire.add_metric([str(rank.id), str(peer)], written)
        yield from (waits, wire)

    def _of_the_service(self, ranks: list[RankView]) -> Iterator[Metric]:
        active = [rank for rank in ranks if rank.state == "active"]
        running = sum(rank.running for rank in ranks)
        waiting = sum(rank.waiting for rank in ranks) + self._unassigned()
        kv_used = sum(rank.kv_used for rank in active) / len(active) if active else 0.0
        for name, text, value in (
            ("epoch", "current epoch", self._epoch()),
            ("ranks", "active ranks", len(active)),
            ("unfinished_sequences", "sequences accepted and kept", self._unfinished()),
            ("requests_running", "sequences being decoded, on all ranks", running),
            (
                "requests_waiting",
                "sequences that wait for room on a rank, or for a rank",
                waiting,
            ),
            ("kv_used_ratio", "share of KV blocks in use, on average over the ranks", kv_used),
        ):
            yield GaugeMetricFamily(f"flexpert_{name}", text, value=value)
        cache = dict(self._cache())
        if cache:
            cache["num_gpu_blocks"] = str(int(cache["blocks_per_rank"]) * len(active))
        info = GaugeMetricFamily(
            "flexpert_cache_config_info",
            "the KV cache; num_gpu_blocks: on all ranks together",
            labels=list(cache),
        )
        if cache:
            info.add_metric(list(cache.values()), 1)
        yield info


class _BalanceCollector(Collector):
    """How even the load of experts is, and when that was looked at last."""

    def __init__(self, balance: Callable[[], BalanceView | None]) -> None:
        self._balance = balance

    def describe(self) -> Iterable[GaugeMetricFamily]:
        return []

    def collect(self) -> Iterator[Metric]:
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
        yield CounterMetricFamily("flexpert_rebalances", "rebalances begun", value=view.rebalances)
        if view.age_s is not None:
            yield GaugeMetricFamily(
                "flexpert_balance_decision_age_seconds",
                "time since it was decided whether to move experts",
                value=view.age_s,
            )


class Metrics:
    """What the head counts.

    cache_config: see the function of this name; {} before the model is known.
    """

    def __init__(
        self,
        ranks: Callable[[], list[RankView]],
        epoch: Callable[[], int],
        unfinished: Callable[[], int],
        balance: Callable[[], BalanceView | None] = lambda: None,
        unassigned: Callable[[], int] = lambda: 0,
    ) -> None:
        """unfinished: sequences in the journal, whether a rank has them or not; unassigned: those
        of them that no rank has."""
        self.registry = CollectorRegistry()
        self.cache_config: Mapping[str, str] = {}
        self._preempted: dict[int, int] = {}  # rank → what its process has told
        self.registry.register(
            _RankCollector(ranks, epoch, unfinished, unassigned, lambda: self.cache_config)
        )
        self.registry.register(_BalanceCollector(balance))
        self.prompt_tokens = self._counter("prompt_tokens", "tokens of admitted prompts")
        self.cached_tokens = self._counter(
            "cached_prompt_tokens", "tokens of prompts that ranks found in their prefix caches"
        )
        self.routing_cached_tokens = self._counter(
            "routing_cached_tokens",
            "tokens of prompts that the rank they were given to has, or is about to compute",
        )
        self.routing_decisions = self._counter(
            "routing_decisions",
            "sequences given to a rank; prefix: none has more of their prefix; load: another has, "
            "and is too busy or too full; none: nobody has any of it",
            "reason",
        )
        self.tokens = self._counter("tokens", "tokens published")
        self.degraded_tokens = self._counter(
            "degraded_tokens", "tokens computed without some experts, or after such"
        )
        self.degraded_sequences = self._counter("degraded_sequences", "sequences with such tokens")
        self.sequences = self._counter("sequences", "sequences by how they ended", "outcome")
        self.preemptions = self._counter(
            "preemptions", "how often a sequence lost its KV blocks to others of its rank"
        )
        self.prefix_queries = self._counter(
            "prefix_cache_queries", "prompt tokens looked up in the prefix cache"
        )
        self.drafts = self._counter("drafts", "runs of tokens that were proposed (--speculate)")
        self.draft_tokens = self._counter("draft_tokens", "tokens that were proposed")
        self.accepted_tokens = self._counter(
            "accepted_draft_tokens", "proposed tokens that came true"
        )
        self.accepted_by_position = self._counter(
            "accepted_draft_tokens_by_position", "the same, by the place in their run", "position"
        )
        self.accepted_by_position.labels("0")
        self.operations = self._counter("operations", "changes by how they ended", "state")
        self.moved_experts = self._counter("moved_experts", "expert replicas loaded by changes")
        self.moved_requests = self._counter("moved_requests", "sequences moved by changes")
        self.moved_with_kv = self._counter("moved_with_kv", "sequences moved with their KV")
        self.moved_kv_bytes = self._counter("moved_kv_bytes", "KV that moved with sequences")
        self.moved_cached_bytes = self._counter(
            "moved_cached_bytes",
            "cached KV that moved with no sequence, for conversations that go on",
        )
        self.recomputed_tokens = self._counter(
            "recomputed_tokens", "tokens of leavers computed again for want of room"
        )
        self.faults = self._counter(
            "faults", "ranks lost unasked, by how: killed, exited, stalled", "kind"
        )
        self.pause = self._seconds("pause", "serving pause of a change", _PAUSE_S)
        self.recovery = self._seconds(
            "recovery", "serving pause of a recovery: nothing is computed after a loss", _PAUSE_S
        )
        self.detection = self._seconds(
            "fault_detection", "from a lost rank's last word to when the head knew", _DETECTION_S
        )
        self.latency = self._seconds("request_latency", "from submission to the end", _REQUEST_S)
        self.queue = self._seconds(
            "request_queue", "from submission until a rank has room for it", _REQUEST_S
        )
        self.prefill = self._seconds("request_prefill", "from then to the first token", _REQUEST_S)
        self.decode = self._seconds("request_decode", "from that to the end", _REQUEST_S)
        self.inference = self._seconds("request_inference", "prefill and decode", _REQUEST_S)
        self.token_time = self._seconds(
            "request_time_per_output_token", "decode by tokens after the first", _PAUSE_S
        )
        self.request_prompt = self._tokens("request_prompt_tokens", "prompt of a sequence")
        self.request_generated = self._tokens("request_generation_tokens", "answer of a sequence")
        self.request_most = self._tokens("request_params_max_tokens", "max_tokens of a sequence")
        self.step_tokens = self._tokens(
            "step_tokens", "computed in a step of a rank, prompts included", _STEP_TOKENS
        )

        for family, values in (
            (self.sequences, ("stop", "length", "cancelled", "failed")),
            (self.operations, ("done", "failed", "cancelled")),
            (self.faults, ("killed", "exited", "stalled")),
        ):
            for value in values:  # there from the beginning, so that an alert sees the first one
                family.labels(value)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"flexpert_{name}", text, labels, registry=self.registry)

    def _seconds(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"flexpert_{name}_seconds", text, buckets=buckets, registry=self.registry)

    def _tokens(
        self, name: str, text: str, buckets: tuple[float, ...] = _REQUEST_TOKENS
    ) -> Histogram:
        return Histogram(
            f"flexpert_{name}", f"tokens: {text}", buckets=buckets, registry=self.registry
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
            self.moved_cached_bytes.inc(view.moved_cached_bytes)
            self.recomputed_tokens.inc(view.recomputed_tokens)
            if view.pause_ms is not None:
                self.pause.observe(view.pause_ms / 1e3)
                if view.purpose == "recovery":
                    self.recovery.observe(view.pause_ms / 1e3)

    def rank_gone(self, event: Mapping[str, object]) -> None:
        """A rank's process has ended; event: as it is published."""
        rank, status, silent_s = event.get("id"), event.get("status"), event.get("silent_s")
        if isinstance(rank, int):
            self._preempted.pop(rank, None)
        if event.get("state") != "gone" or event.get("asked", True):
            return
        killed = isinstance(status, int) and status < 0
        kind = "stalled" if event.get("evicted") else "killed" if killed else "exited"
        self.faults.labels(kind).inc()
        if isinstance(silent_s, float):
            self.detection.observe(silent_s)

    def step(self, rank: int, report: msg.Published) -> None:
        """A rank has taken a step with tokens."""
        self.step_tokens.observe(report.computed)
        preempted, before = report.load.preemptions, self._preempted.get(rank, 0)
        if preempted != before:
            self.preemptions.inc(max(0, preempted - before))
            self._preempted[rank] = preempted
        if report.drafts is not None:
            self._speculated(report.drafts)

    def _speculated(self, counts: DraftCounts) -> None:
        self.drafts.inc(counts.drafts)
        self.draft_tokens.inc(counts.tokens)
        self.accepted_tokens.inc(sum(counts.accepted))
        for position, accepted in enumerate(counts.accepted):
            self.accepted_by_position.labels(str(position)).inc(accepted)

    # ---- of requests, from the journal ------------------------------------------------------

    def first_token(self, entry: Entry) -> None:
        if entry.request.params.prompt_logprobs is None:  # else the cache is not asked
            self.prefix_queries.inc(len(entry.request.prompt))

    def finished(self, entry: Entry, finish: str, now: float) -> None:
        self.sequences.labels(finish).inc()
        spent, generated = spans(entry.times, now), len(entry.generated)
        self.latency.observe(spent.total)
        self.queue.observe(spent.queue)
        self.prefill.observe(spent.prefill)
        self.decode.observe(spent.decode)
        self.inference.observe(spent.inference)
        if generated > 1:
            self.token_time.observe(spent.decode / (generated - 1))
        self.request_prompt.observe(len(entry.request.prompt))
        self.request_generated.observe(generated)
        if entry.request.params.max_tokens is not None:
            self.request_most.observe(entry.request.params.max_tokens)

    def failed(self) -> None:
        self.sequences.labels("failed").inc()
