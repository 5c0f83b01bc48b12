"""Looks at the load of the experts now and then, and has experts moved where that is worth it.

What is decided is in `balance_policy.py`. A rebalance is a change between the same ranks, and makes
way for any other. It says at each look why it does or does not move anything.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from flexpert.cluster import balance_policy as policy
from flexpert.cluster.balance_policy import BalanceVerdict, Gain, Ground, Measured
from flexpert.cluster.cluster_state import ClusterState
from flexpert.cluster.interfaces import Computed, Timer
from flexpert.cluster.load_tracker import Loads
from flexpert.cluster.operation import Operation
from flexpert.cluster.reconciliation import Activity, ActivityEvent, ActivityKind
from flexpert.cluster.routing_record import RoutingRecord
from flexpert.cluster.saved_state import Purpose
from flexpert.cluster.views import BalanceView
from flexpert.config import balance_every_s
from flexpert.errors import OperationRefused
from flexpert.moe.balance import rank_loads
from flexpert.moe.placement import Placement

log = logging.getLogger("flexpert")

PART = "balancing the load of experts"  # of the service

LOOK_S = 5.0
PLAN_SHARE = 0.02  # of the time, at most, for plans: they take processors from the ranks
PART_S = 10.0  # of loading, in one epoch: what gains the most comes first


@dataclass(frozen=True, slots=True)
class Plan:
    """after: to move to; moves: experts that ranks load for it. recent, latest: see `judge`.
    whole: else more layers are to follow."""

    after: Placement
    moves: int
    recent: Gain
    latest: Gain
    cost_s: float
    whole: bool


@dataclass(frozen=True, slots=True)
class Question:
    """What to plan for: see `Plan`. whole: because replicas lack, not for what it gains."""

    recent: Loads
    latest: Loads
    whole: bool


class Balancer:
    """One look after the other, by the head's clock. verdict: of the latest.

    Raises: ConfigError: what it is to record cannot be written.
    """

    def __init__(self, cluster: ClusterState) -> None:
        config = cluster.config.cluster
        self.verdict = BalanceVerdict(
            Ground.OFF if config.balance == "off" else Ground.IDLE, "no look yet"
        )
        self.decided_at: float | None = None
        self.begun = 0  # rebalances
        self._cluster = cluster
        self._every_s = balance_every_s(config.balance)
        self._timer: Timer | None = None
        self._rests_until = float("-inf")
        self._plans_from = float("-inf")
        self._next = 0.0  # of those at fixed times
        self._latest: Loads | None = None
        self._failed = ""
        self._running: Operation | None = None
        path = config.record_routing
        self._record = RoutingRecord(path) if path is not None else None
        self._looked_at: float | None = None
        self._planning = self._closed = False

    def start(self) -> None:
        self._next = self._cluster.head.now() + (self._every_s or 0.0)
        self._look_again()

    def close(self) -> None:
        self._closed = True
        if self._timer:
            self._timer.cancel()
        if self._record:
            self._record.close()

    # ---- what is known ----------------------------------------------------------------------

    def view(self) -> BalanceView:
        """As the API shows it."""
        cluster, now = self._cluster, self._cluster.head.now()
        placement, loads = cluster.placement, self.loads()
        known = placement is not None and bool(placement.layers)
        each = rank_loads(placement, loads) if placement is not None and known else None
        age = None if self.decided_at is None else round(now - self.decided_at, 3)
        return BalanceView(
            mode=cluster.config.cluster.balance,
            verdict=self.verdict.ground.value,
            reason=self.verdict.reason,
            age_s=age,
            rebalances=self.begun,
            imbalance=1.0 if each is None else round(_over_mean(each), 4),
            imbalance_by_layer=[]
            if each is None
            else [round(_over_mean(layer[None]), 4) for layer in each],
            rank_loads={}
            if each is None or placement is None
            else dict(zip(placement.ranks, _shares(each.sum(axis=0)), strict=True)),
        )

    def loads(self) -> Loads:
        """[layers, experts], recent choices."""
        return self._cluster.loads.recent(self._cluster.head.now()).choices

    def proposal(self) -> Plan | None:
        """What a rebalance that is asked for now would do; None: nothing."""
        cluster, loads = self._cluster, self.loads()
        if cluster.placement is None:
            return None
        return self._weigh(cluster.plan(cluster.members, loads), loads, loads, whole=True)

    # ---- asked for --------------------------------------------------------------------------

    def request(self, operation: Operation) -> None:
        """Begin one that somebody asked for, or find that there is nothing to move.

        Raises: OperationRefused: there is no memory for it.
        """
        cluster = self._cluster
        plan = self.proposal()
        if plan is None or not plan.moves:
            operation.reason = "asked for; no placement is better"
            operation.end("done")
            return
        self._decide(BalanceVerdict(Ground.REQUEST, f"asked for ({plan.recent})"))
        operation.reason = f"asked for: {plan.moves} experts move, {plan.recent}"
        self._begin(operation, plan, cluster.head.now())

    # ---- looks ------------------------------------------------------------------------------

    def _look_again(self) -> None:
        """One look; whatever becomes of it, there is a next one."""
        head = self._cluster.head
        self._guarded(lambda: self._look(head.now()))
        self._timer = head.call_later(min(LOOK_S, self._every_s or LOOK_S), self._look_again)

    def _guarded(self, action: Callable[[], None]) -> None:
        """A part of a look; if it fails, that is said, and the service goes on."""
        try:
            action()
        except Exception as error:
            if self._failed != repr(error):  # once, not at every look
                log.exception("the load of experts could not be looked at")
            self._failed = repr(error)
            self._decide(BalanceVerdict(Ground.FAILED, self._failed))
            self._cluster.head.impair(PART, self._failed)
        else:
            if self._failed and not self._planning:
                self._failed = ""
                self._cluster.head.impair(PART, None)

    def _look(self, now: float) -> None:
        cluster = self._cluster
        window, since_s = cluster.loads.take_window(), now - (self._looked_at or now)
        self._looked_at = now
        if window.any():
            self._latest = window.astype(np.float64)
            if self._record:
                self._record.add(window, since_s)
        self._learn_outcome()
        if cluster.config.cluster.balance == "off":
            return
        if self._planning or (self._every_s is not None and now < self._next):
            return
        found = self._verdict(now)
        if isinstance(found, BalanceVerdict):
            self._conclude(found, None)
        else:
            self._plan_aside(found)

    def _plan_aside(self, question: Question) -> None:
        """Plan in a thread: for wide models it takes a second, and streams would wait."""
        cluster, began = self._cluster, self._cluster.head.now()
        before, self._planning = cluster.placement, True

        def over(outcome: Computed[Placement]) -> None:
            self._planning = False
            if self._closed:
                return
            self._plans_from = cluster.head.now() + (cluster.head.now() - began) / PLAN_SHARE
            if cluster.placement is before and self._free:  # else the next look asks again
                self._guarded(lambda: self._answer(question, outcome.result()))

        cluster.head.compute(cluster.planner(cluster.members, question.recent), over)

    def _answer(self, question: Question, target: Placement) -> None:
        recent, latest = question.recent, question.latest
        plan = self._weigh(target, recent, latest, whole=question.whole)
        if plan is None or not plan.moves:
            return self._conclude(
                BalanceVerdict(Ground.BALANCED, "no placement found is better"), None
            )
        if question.whole:
            verdict = BalanceVerdict(Ground.REDUNDANCY, "replicas that were lost come back")
        else:
            verdict = policy.judge(
                plan.recent, plan.latest, plan.cost_s, at_fixed_times=self._every_s is not None
            )
        return self._conclude(verdict, plan)

    def _conclude(self, verdict: BalanceVerdict, plan: Plan | None) -> None:
        cluster, now = self._cluster, self._cluster.head.now()
        if verdict.moves and plan is not None:
            members, epoch = cluster.members, cluster.membership.epoch
            operation = Operation(members, members, epoch, verdict.reason, Purpose.REBALANCE)
            try:
                self._begin(operation, plan, now)
            except OperationRefused as error:
                verdict = BalanceVerdict(Ground.MEMORY, str(error))
        if self._every_s is not None:
            self._next = now + self._every_s
        self._decide(verdict)

    def _decide(self, verdict: BalanceVerdict) -> None:
        before, self.verdict = self.verdict, verdict
        self.decided_at = self._cluster.head.now()
        if verdict.ground is not before.ground or verdict.moves:
            log.info("balance of experts: %s: %s", verdict.ground.value, verdict.reason)
            self._cluster.notices.publish(
                "balance", {"verdict": verdict.ground.value, "reason": verdict.reason}
            )

    def _verdict(self, now: float) -> BalanceVerdict | Question:
        """What is known without a plan, or what to plan."""
        cluster = self._cluster
        if cluster.placement is None or not self._free:
            return BalanceVerdict(Ground.BUSY, "a change of the ranks runs or is due")
        if len(cluster.members) < 2:
            return BalanceVerdict(Ground.BALANCED, "there is one rank")
        if now < self._rests_until:
            left_s = self._rests_until - now
            return BalanceVerdict(Ground.REST, f"rests for {left_s:.0f} s after the last change")
        if self._every_s is None and now < self._plans_from:
            left_s = self._plans_from - now
            return BalanceVerdict(Ground.REST, f"a plan takes long, the next in {left_s:.0f} s")
        recent = self.loads()
        if self._under_replicated():
            return Question(recent, recent, whole=True)
        measured = self._measured()
        now_loads = rank_loads(cluster.placement, recent)
        even = np.repeat(now_loads.mean(axis=1, keepdims=True), now_loads.shape[1], axis=1)
        best = Gain(policy.busy_share(now_loads, measured), policy.busy_share(even, measured))
        verdict = policy.worth_planning(best, measured)
        if verdict is not None:
            return verdict
        return Question(recent, recent if self._latest is None else self._latest, whole=False)

    @property
    def _free(self) -> bool:
        """Whether a rebalance could begin now."""
        cluster = self._cluster
        idle = cluster.reconciliation.state is Activity.IDLE
        return idle and cluster.operation is None and cluster.availability.down is None

    def _under_replicated(self) -> bool:
        cluster = self._cluster
        if cluster.placement is None:
            return False
        ranks = len(cluster.members)
        return cluster.expert_recovery.under_replicated(cluster.placement, ranks) > 0

    # ---- plans ------------------------------------------------------------------------------

    def _weigh(
        self, target: Placement, recent: Loads, latest: Loads, *, whole: bool
    ) -> Plan | None:
        """What it would give and cost. whole: in one epoch, whatever it takes."""
        cluster, before, after = self._cluster, self._cluster.placement, target
        if before is None:
            return None
        measured = self._measured()
        if not whole:
            most_of = [rank_loads(one, recent).max(axis=1) for one in (before, target)]
            most_bytes = PART_S * cluster.config.cluster.balance_bandwidth
            most = max(1, int(most_bytes / cluster.memory_budget.expert_bytes))
            after = policy.first_part(before, target, (most_of[0] - most_of[1]).tolist(), most)

        def gain(loads: Loads) -> Gain:
            return Gain(
                policy.busy_share(rank_loads(before, loads), measured),
                policy.busy_share(rank_loads(after, loads), measured),
            )

        moves = sum(sum(layer.values()) for layer in policy.loads_by_layer(before, after))
        costs = cluster.move_costs
        move_s = costs.of_move(cluster.memory_budget.expert_bytes)
        cost_s = policy.cost_s(before, after, move_s, costs.pause_s, measured.parallel)
        return Plan(after, moves, gain(recent), gain(latest), cost_s, after == target)

    def _begin(self, operation: Operation, plan: Plan, now: float) -> None:
        """Raises: OperationRefused: there is no memory for both placements."""
        cluster = self._cluster
        cluster.memory_budget.check((), plan.after, cluster.placement)
        cluster.memory_budget.check_moves(plan.moves)
        if plan.whole:
            self._rests_until = now + policy.rest_s(plan.cost_s)
        self.begun += 1
        self._running = operation
        cluster.events.post(
            ActivityEvent(ActivityKind.REBALANCE, operation=operation, placement=plan.after)
        )

    def _learn_outcome(self) -> None:
        running = self._running
        if running is None or not running.over.is_set():
            return
        self._running = None
        if running.state == "done" and running.pause_ms is not None:
            self._cluster.move_costs.paused(running.pause_ms / 1e3)

    # ---- measures ---------------------------------------------------------------------------

    def _measured(self) -> Measured:
        cluster = self._cluster
        recent = cluster.loads.recent(cluster.head.now())
        seconds, tokens = max(recent.seconds, 1e-3), recent.tokens
        experts = recent.choices.size
        return Measured(
            choices_per_s=tokens / seconds,
            choice_s=recent.compute_s / tokens if tokens else 0.0,
            per_expert=tokens / experts if experts else 0.0,
            parallel=self._parallel,
        )

    @property
    def _parallel(self) -> float:
        """How many ranks compute at the same time."""
        config, ranks = self._cluster.config, max(1, len(self._cluster.members))
        here = config.cluster.join_listen is None and config.cluster.launcher == "local"
        if config.engine.device != "cpu" or not here:
            return ranks
        return min(ranks, len(os.sched_getaffinity(0)))


def _over_mean(loads: Loads) -> float:
    """The ranks' largest loads over the means, of all layers. loads: [layers, ranks]."""
    mean = float(loads.mean(axis=1).sum())
    return float(loads.max(axis=1).sum()) / mean if mean else 1.0


def _shares(loads: Loads) -> list[float]:
    """[ranks], each over the mean."""
    mean = float(loads.mean())
    return [round(float(one) / mean, 4) if mean else 1.0 for one in loads]
