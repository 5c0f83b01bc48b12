"""What the coordinator's parts share: the three state machines and what is known of the ranks."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from typing import TypeAlias

from flexpert.cluster.availability import ServiceAvailability
from flexpert.cluster.event_queue import EventQueue
from flexpert.cluster.expert_recovery import ExpertRecovery
from flexpert.cluster.interfaces import HeadInterface
from flexpert.cluster.kv_migration import KVMigrations
from flexpert.cluster.load_tracker import Loads, LoadTracker
from flexpert.cluster.membership import Membership, MembershipEvent, Phase
from flexpert.cluster.memory_budget import MemoryBudget
from flexpert.cluster.move_costs import MoveCosts
from flexpert.cluster.notices import Notices
from flexpert.cluster.operation import Operation, TargetRequest
from flexpert.cluster.rank_state import RankState
from flexpert.cluster.reconciliation import ActivityEvent, Reconciliation
from flexpert.cluster.restart_policy import RestartPolicy
from flexpert.cluster.saved_state import SavedChange, SavedCluster
from flexpert.cluster.scale_down import Candidate, leave_order
from flexpert.cluster.served_model import ServedModel
from flexpert.cluster.slow_ranks import SlowRanks
from flexpert.cluster.stall_detector import Watch
from flexpert.cluster.views import GoneRank
from flexpert.config import ClusterConfig, Config
from flexpert.engine import rank_protocol as msg
from flexpert.moe.placement import Placement

_MOST_GONE = 64

CoordinatorEvent: TypeAlias = MembershipEvent | ActivityEvent


class ClusterState:
    """membership, reconciliation, availability: the state machines.

    events: of the first two; the third changes in the middle of their actions and causes none.
    ranks: from the start of a process to its certain exit. placement: of the current epoch.
    planned: of the one that is prepared. operation: the change that runs. queued: the one that was
    asked for meanwhile. verdicts: what the first rank that came up found of the model's modules,
    as it encoded it; new ranks are told. broken: (who said so, the peer of another machine that
    it does not reach), until it is decided who is given up. gone: the latest that have ended.
    loads: of the experts. move_costs: what moving some has cost.
    """

    def __init__(
        self,
        config: Config,
        model: ServedModel,
        head: HeadInterface,
        memory_budget: MemoryBudget,
        events: EventQueue[CoordinatorEvent],
    ) -> None:
        cluster = config.cluster
        self.config = config
        self.head = head
        self.memory_budget = memory_budget
        self.events = events
        self.notices = Notices(head)
        self.membership = Membership()
        self.reconciliation = Reconciliation()
        self.availability = ServiceAvailability()
        self.placement: Placement | None = None
        self.planned: Placement | None = None
        self.ranks: dict[int, RankState] = {}
        self.verdicts = b""
        self.broken: set[tuple[int, int]] = set()
        self.gone: deque[GoneRank] = deque(maxlen=_MOST_GONE)
        self.operation: Operation | None = None
        self.queued: tuple[Operation, TargetRequest] | None = None
        self.migrations = KVMigrations(self.ranks, head)
        self.watch = Watch(self.ranks, head, cluster.stall_timeout, self.notices.warn)
        self.slow_ranks = SlowRanks()
        self.restart_policy = RestartPolicy(
            cluster.restart_policy,
            limit=cluster.restart_limit,
            backoff_s=cluster.restart_backoff,
            longest_backoff_s=cluster.restart_backoff_max,
        )
        self.expert_recovery = ExpertRecovery(
            model.experts,
            model.moe_layers,
            cluster.redundant_experts,
            degrade=cluster.on_missing_expert == "degrade",
            slots=slots_at_start(cluster, model.experts),
        )
        self.loads = LoadTracker(model.moe_layers, model.experts)
        self.move_costs = MoveCosts()

    def save(self, *, urgent: bool = False) -> None:
        """For another head, if there may be one. urgent: before this is carried out."""
        if not self.head.saves:
            return
        membership, change = self.membership, self.membership.change
        record = SavedCluster(
            epoch=membership.epoch,
            members=membership.members,
            epochs=membership.epochs_used,
            phase=membership.phase,
            change=None
            if change is None
            else SavedChange(
                change.epoch,
                change.before,
                change.after,
                change.doomed,
                change.kept,
                change.cause,
            ),
            placement=self.placement,
            desired=self.restart_policy.desired,
            ranks={rank: found.instance for rank, found in self.ranks.items()},
            verdicts=self.verdicts,
        )
        self.head.save_cluster(record, urgent=urgent)

    @property
    def members(self) -> frozenset[int]:
        return self.membership.members

    @property
    def staying(self) -> frozenset[int]:
        """Ranks that cannot have left: nobody has told them to switch to an epoch without them."""
        change, phase = self.membership.change, self.membership.phase
        if change is None or phase is Phase.LOST:
            return frozenset()
        if phase in (Phase.COMMIT, Phase.RELEASE, Phase.RECOVER):
            return change.after
        return frozenset(self.ranks)

    @property
    def admitting(self) -> frozenset[int]:
        """Ids that may be given new sequences: members that are not on their way out."""
        change, phase = self.membership.change, self.membership.phase
        if phase is Phase.LOST or self.availability.down:
            return frozenset()
        able = self.membership.members
        if phase in (Phase.MIGRATE, Phase.COMMIT, Phase.RECOVER) and change:
            able = change.before & change.after or change.after
        return able - {rank for rank in able if rank in self.ranks and self.ranks[rank].ended}

    @property
    def destinations(self) -> frozenset[int]:
        """Ranks of the next epoch that are up."""
        change = self.membership.change
        return change.after & set(self.ranks) if change else frozenset()

    @property
    def dispensable(self) -> frozenset[int]:
        """Ranks whose processes may end now: no epoch has them, present or to come, no destination
        reads their KV, and no change waits for what they say."""
        change, phase = self.membership.change, self.membership.phase
        needed = set(self.members)
        if phase is Phase.LOST:
            needed = set()
        elif phase is Phase.RELEASE and change:
            needed |= set(filter(self.migrations.reads, change.leaving))
        elif change and phase not in (Phase.IDLE, Phase.UNDO):
            needed |= change.everyone
        return frozenset(self.ranks) - needed

    def plan(self, target: Iterable[int], loads: Loads | None = None) -> Placement:
        """All experts on these ranks, replicas on several machines.

        loads: [layers, experts]; default: the recent ones, where experts move by their load.
        """
        return self.planner(target, loads)()

    def planner(self, target: Iterable[int], loads: Loads | None = None) -> Callable[[], Placement]:
        """`plan`, to be called in any thread: what may change is read now."""
        ids = frozenset(target)
        if loads is None and self.config.cluster.balance != "off":
            loads = self.loads.recent(self.head.now()).choices
        counted = loads is not None and bool(loads.any())
        elsewhere = dict(self.memory_budget.elsewhere())
        return partial(
            self.expert_recovery.spread,
            self.placement,
            ids,
            partial(self.memory_budget.fits, elsewhere=elsewhere),
            machines=self.machines(ids),
            loads=loads if counted else None,
        )

    def machines(self, target: Iterable[int]) -> dict[int, str]:
        """rank → its machine; those that are not up yet are taken to be where the first is."""
        known = {rank: found.machine for rank, found in self.ranks.items() if found.machine}
        first = known[min(known)] if known else ""
        return {rank: known.get(rank, first) for rank in sorted(target)}

    def leave_order(self, members: Iterable[int]) -> list[int]:
        """Who leaves first for a smaller number of ranks first."""
        config, head = self.config.cluster, self.head
        ids = sorted(members)
        machines, placement = self.machines(ids), self.placement
        draining, joined = head.draining, head.reserved
        candidates = []
        for rank in ids:
            found = self.ranks.get(rank)
            candidates.append(
                Candidate(
                    id=rank,
                    machine=machines[rank],
                    failing=found is None or found.failing or rank in draining,
                    joined=rank in joined,
                    kv_used=found.load.kv_used if found else 0.0,
                    experts=placement.count(rank) if placement else 0,
                )
            )
        return leave_order(
            candidates,
            spread=config.launcher == "ray" and "SPREAD" in config.ray_strategy,
            least_machines=2 if config.redundant_experts else 1,
        )

    def tell(self, ranks: Iterable[int], command: msg.Command) -> None:
        """Send a command to those of these ranks that are there."""
        for rank in sorted(ranks):
            if rank in self.ranks:
                self.head.send(rank, command)

    def kill(self, ranks: Iterable[int]) -> None:
        for rank in sorted(ranks):
            self.head.kill(rank)

    def withdraw(self, ranks: Iterable[int], *, blameless: bool) -> None:
        """Kill ranks whose change is over. blameless: because others were lost, which is not held
        against them.

        Who has ended already is left alone: its status must say of what, and not be our signal.
        """
        for rank in ranks:
            rank_state = self.ranks.get(rank)
            if rank_state and rank_state.ended:
                continue
            if rank_state and not rank_state.error and blameless:
                rank_state.blameless = True
            self.kill([rank])


def slots_at_start(config: ClusterConfig, experts: int) -> int:
    """Experts of a layer on a rank of those at start, which every rank has where a larger number
    of them replicates; 0: it thins out."""
    if config.scale_policy == "thin":
        return 0
    return -(-(experts + config.redundant_experts) // max(1, config.ranks))
