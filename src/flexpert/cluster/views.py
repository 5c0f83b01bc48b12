"""What the head shows of itself: the JSON of the control API."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

OperationPurpose = Literal["request", "recovery", "restart", "reload", "rebalance"]
OperationState = Literal["preparing", "committing", "done", "failed", "cancelled"]
RankStatus = Literal["starting", "preparing", "ready", "active", "leaving", "stalled", "gone"]


class RankView(msgspec.Struct, frozen=True, kw_only=True):
    """One rank. kv_used: share of KV blocks in use, 0 to 1. cached_blocks: KV blocks in which it
    can find a prompt's prefix, as far as it has told.

    instance: of this process: a later one of the same id has another. safe_to_delete: its process
    may end now, and nobody misses it: no epoch has it any more, nobody reads its KV, and no change
    waits for it.

    machine: ranks of one machine share memory, and replicas of an expert go to several; "" until
    the rank is up. over_nixl: ids of the ranks that it exchanges with over NIXL, and not through
    shared memory. wire_bytes: each of them → bytes written to it for exchanges, messages included,
    since it was connected.

    memory_bytes: of the host, private, measured; planned_bytes: what the rank said it would need,
    weights that it uses where their file is mapped included.
    device_memory_bytes, device_planned_bytes: the same of the GPU's memory; 0 on a CPU.
    device_spare_bytes: of the first, what is kept for experts to come.
    graphs: CUDA graphs captured since its start; no change of ranks adds to them.
    steps: what computes them: "recorded" (a program of our kernels), "recorded, and by torch: "
    with the operations that have no kernel, or "transformers" and why they could not be recorded;
    "" on a GPU.
    preemptions: since its start, how often a request lost its KV blocks to others.
    exchanges, exchanged_bytes: since its start; dispatches, and bytes of rows it has sent.
    dispatch_wait_s, combine_wait_s: waited in them for all peers. waited_for: peer → from the begin
    of such waits until that peer's part had come. On GPUs only exchanges are counted.
    slow: the others wait for it, though it has no more to do than they (`slow_ranks.py`).
    """

    id: int
    state: RankStatus
    host: str
    pid: int
    machine: str = ""
    over_nixl: list[int] = []
    wire_bytes: dict[int, int] = {}
    instance: str = ""
    safe_to_delete: bool = False
    running: int = 0
    waiting: int = 0
    kv_used: float = 0.0
    cached_blocks: int = 0
    experts: int = 0
    memory_bytes: int = 0
    planned_bytes: int = 0
    device_memory_bytes: int = 0
    device_planned_bytes: int = 0
    device_spare_bytes: int = 0
    graphs: int = 0
    steps: str = ""
    preemptions: int = 0
    exchanges: int = 0
    exchanged_bytes: int = 0
    dispatch_wait_s: float = 0.0
    combine_wait_s: float = 0.0
    waited_for: dict[int, float] = {}
    slow: bool = False


class PlacementView(msgspec.Struct, frozen=True, kw_only=True):
    """experts_per_rank: rank id → replicas it holds, summed over the layers.

    missing_experts: those that nobody holds, summed over the layers: answers go on without them
    until they are loaded (`on_missing_expert`), and say so. under_replicated_experts: those that
    somebody holds, but fewer ranks than `redundant_experts` asks for.
    """

    layers: int
    experts: int
    replicas: int
    experts_per_rank: dict[str, int]
    missing_experts: int = 0
    under_replicated_experts: int = 0


class OperationView(msgspec.Struct, frozen=True, kw_only=True):
    """One change of the cluster.

    target: the rank ids after it. add, remove: ids that join and leave.
    phase: what happens now; progress: 0 to 1 over the whole operation.
    phases: seconds spent in each phase so far. pause_ms: the longest time between the end of the
    last step in the old epoch and the start of the first in the new one, over the ranks that stay.
    moved_experts: replicas that ranks load; copied_experts: of these, how many came from a peer's
    memory and not from the checkpoint, where they are read or mapped.
    moved_requests: those that went on on another rank; moved_with_kv: of them, with the keys and
    values that were computed already, in all moved_kv_bytes. moved_cached_bytes: of keys and values
    that no request held, for conversations that may go on. recomputed_tokens: tokens of leavers'
    requests that are computed again, because there were no KV blocks for them or the leaver had
    died; at most so many, since prefixes that are in the cache by then are found.
    reason: why the head began it by itself (a rank was lost, or is replaced); None for a change
    that was asked for. purpose: what it is: "request", "recovery" of the survivors of a loss,
    "restart" of who was lost, or "reload" of lost experts. own_id: its id is the caller's
    (`operation_id`).
    """

    id: str
    state: OperationState
    target: list[int]
    add: list[int]
    remove: list[int]
    phase: str
    progress: float
    phases: dict[str, float]
    epoch: int
    moved_experts: int = 0
    copied_experts: int = 0
    moved_requests: int = 0
    moved_with_kv: int = 0
    moved_kv_bytes: int = 0
    moved_cached_bytes: int = 0
    recomputed_tokens: int = 0
    pause_ms: float | None = None
    error: str | None = None
    reason: str | None = None
    created: float = 0.0
    own_id: bool = False
    purpose: OperationPurpose = "request"


class ChangePreview(msgspec.Struct, frozen=True, kw_only=True):
    """What a change would do if it began now; nothing has begun.

    target: the rank ids after it. add, remove: ids that join and leave. moved_experts: replicas
    that ranks would load, in all moved_bytes; experts_to_load: of each rank that loads any.
    moved_requests: sequences of ranks that leave, running or waiting. kv_used: of each of those,
    the share of its KV blocks in use.
    """

    target: list[int]
    add: list[int]
    remove: list[int]
    moved_experts: int = 0
    moved_bytes: int = 0
    experts_to_load: dict[int, int] = {}
    moved_requests: int = 0
    kv_used: dict[int, float] = {}


class LayerPlacement(msgspec.Struct, frozen=True, kw_only=True):
    """Which rank holds which expert of one MoE layer.

    held: rank id → the experts it holds, in the order of its slots. loads: of each expert, how
    often it was chosen lately, of all choices of this layer; None: that is not counted.
    """

    epoch: int
    layer: int
    layers: int
    experts: int
    held: dict[int, list[int]]
    loads: list[float] | None = None


class LiveLoad(msgspec.Struct, frozen=True):
    """Sums over the ranks. active: how many are."""

    running: int
    waiting: int
    active: int


class GoneRank(msgspec.Struct, frozen=True, kw_only=True):
    """A rank whose process is certainly gone. status: exit code, or minus the signal. asked: it was
    to go. time: when, in seconds since 1970."""

    id: int
    instance: str
    status: int
    asked: bool
    time: float


class SpareView(msgspec.Struct, frozen=True, kw_only=True):
    """A process that waits to become a rank. ready: it has started; before that its pid is 0."""

    id: int
    pid: int
    ready: bool


class HostView(msgspec.Struct, frozen=True, kw_only=True):
    """A host that has joined from outside, and the id that its rank has or will have."""

    rank: int
    host: str


class BalanceView(msgspec.Struct, frozen=True, kw_only=True):
    """How even the load of experts is on the ranks, and what is done about it.

    mode: the setting. verdict: of the latest look, in one word: "gain", "interval", "redundancy"
    and "request" move experts, any other does not; reason: in many. age_s: seconds since then;
    None: there was none, as with mode "off". rebalances: how many were begun.
    imbalance: the largest load of a rank over the mean, weighed over the layers: so much longer do
    experts take than on ranks that all have the same to do. imbalance_by_layer: of each MoE layer.
    rank_loads: rank id → its load over the mean, all layers together.
    """

    mode: str = "off"
    verdict: str = "off"
    reason: str = ""
    age_s: float | None = None
    rebalances: int = 0
    imbalance: float = 1.0
    imbalance_by_layer: list[float] = []
    rank_loads: dict[int, float] = {}


class RebalanceView(msgspec.Struct, frozen=True, kw_only=True):
    """`GET /cluster/balance`: what a rebalance that is asked for now would do.

    moves: experts that ranks would load. before, after: shares of the time for which steps wait for
    experts. cost_s: seconds of the ranks' time that moving takes. expert_loads: by layer, how often
    each expert was chosen lately, of all choices of the layer.
    """

    balance: BalanceView
    moves: int = 0
    before: float = 0.0
    after: float = 0.0
    cost_s: float = 0.0
    expert_loads: list[list[float]] = []


class ClusterView(msgspec.Struct, frozen=True, kw_only=True):
    """`GET /cluster`.

    desired: the rank ids that the last change that was asked for left active. left_out: those of
    them that are not started again, because they kept dying. down: why nothing is computed now and
    requests wait, or None. gone: the latest 64 ranks that have ended, oldest first.
    head: of this head's process: another one has another. cursor: the number of the latest event;
    `GET /cluster/events?since=` it goes on from this view. resumable: another head could go on
    with this service (`--state-dir`); unsaved: why it could not, though it was to be able to.
    """

    epoch: int
    model: str
    max_ranks: int
    ranks: list[RankView]
    placement: PlacementView
    operation: OperationView | None
    balance: BalanceView = BalanceView()
    desired: list[int] = []
    left_out: list[int] = []
    down: str | None = None
    spares: list[SpareView] = []
    hosts: list[HostView] = []
    gone: list[GoneRank] = []
    head: str = ""
    cursor: int = 0
    resumable: bool = False
    unsaved: str | None = None


class ClusterEvent(msgspec.Struct, frozen=True, kw_only=True):
    """One line of `GET /cluster/events`.

    kind: "operation" (data: an OperationView), "epoch", "rank", "warning", "balance" (data: verdict
    and reason, when the verdict is another); "overrun": the listener
    was too slow, and this is the last one. number: its place among all events of the service, from
    1 on; 0: it has none, and is this listener's own.
    """

    kind: str
    time: float
    data: dict[str, Any]
    number: int = 0


ServiceState = Literal[
    "ready", "busy", "recovering", "starting", "down", "impaired", "wedged", "stopping", "failed"
]


class Readiness(msgspec.Struct, frozen=True, kw_only=True):
    """live: the service may yet recover by itself. ready: requests are answered now; if not, reason
    says why.

    state: "ready": it keeps up; "busy": so many requests run that others wait for them;
    "recovering": the survivors of a loss enter a new epoch, requests wait for that. "wedged": there
    is work, and none gets done, though nothing that is known is in the way.
    """

    live: bool = True
    ready: bool = True
    reason: str | None = None
    state: ServiceState = "ready"


class Delta(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens of one sequence as the head hands them on; finish: None, "stop" or "length".

    logprobs: one `engine.request.TokenLogprobs` per token, or None if not asked for.
    degraded: they or any before them were computed while experts were missing.
    prompt_logprobs: with the first tokens, if asked for: of the prompt's from the second on.
    cached: with the first tokens: how many of the prompt's were found in the prefix cache.
    """

    tokens: list[int]
    logprobs: list[Any] | None = None
    finish: str | None = None
    degraded: bool = False
    prompt_logprobs: list[Any] | None = None
    cached: int = 0
