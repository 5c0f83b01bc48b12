"""A service in virtual time (pure).

Real are the journal with its routing, the scheduler of each rank, the placement of experts, the
order in which ranks leave, the restarts and the autoscaler's policy. Modelled are the steps, which
take what `StepCost` says, the head, which does one thing after the other (`HeadTimes`), and the
course of a change (`ChangeCost`): who joins is ready after a time, then all switch between two
steps.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

import msgspec
import numpy as np
from numpy.typing import NDArray

from flexpert.bench.statistics import percentile
from flexpert.cluster.admission import Admission
from flexpert.cluster.autoscale_policy import Attempt, Goals, Policy, Sample, decide
from flexpert.cluster.journal import Arrival, Journal
from flexpert.cluster.request_routing import RankCaches, Router, Routing
from flexpert.cluster.restart_policy import RestartPolicy
from flexpert.cluster.scale_down import Candidate, leave_order
from flexpert.cluster.views import Delta
from flexpert.engine import rank_protocol as msg
from flexpert.engine.engine_limits import EngineLimits
from flexpert.engine.request import BlockChanges, HeldKV, KVMigration, SamplingParams, TokenEvent
from flexpert.errors import FlexpertError, Overloaded
from flexpert.moe.balance import total_imbalance
from flexpert.moe.placement import Placement, loads, replan
from flexpert.simulator.cost_profile import CostProfile
from flexpert.simulator.simulated_rank import ModelledRank
from flexpert.simulator.virtual_time import VirtualTime

_SIGKILL = -9
_KEPT_SAMPLES = 300  # as the autoscaler

OnStep = Callable[[NDArray[np.float64], int, float, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedSettings:
    """ranks: at the begin; capacity: at most. limits: of each rank. max_sequences: unfinished ones.

    goals: of the autoscaler; None: there is none. expert_loads: [layers][experts], how often each
    is chosen; None: all alike, and experts hold nobody up. expert_share: of a step's time, that of
    experts while their load is even.
    """

    ranks: int
    capacity: int
    limits: EngineLimits
    experts: int
    layers: int
    redundant: int = 0
    routing: Routing = "prefix"
    max_sequences: int = 16384
    goals: Goals | None = None
    policy: Policy = decide
    expert_loads: Sequence[Sequence[float]] | None = None
    expert_share: float = 0.5
    restart_limit: int = 3
    restart_backoff_s: float = 1.0
    restart_backoff_max_s: float = 30.0


class SimulatedChange(msgspec.Struct, kw_only=True):
    """What became of a change or a kill; seconds from the begin.

    state: "running", "done", "failed" or "refused". detected_s, recovered_s: of a kill, when the
    head knew, and when the survivors went on. ended_s: in force; of a kill, all ranks were back.
    moved_experts: replicas that ranks load; moved_requests: that went on on another rank.
    """

    at_s: float
    what: str
    add: list[int] = []
    remove: list[int] = []
    state: str = "running"
    detected_s: float | None = None
    recovered_s: float | None = None
    ended_s: float | None = None
    pause_ms: float | None = None
    moved_experts: int = 0
    moved_requests: int = 0
    error: str | None = None


class QueueSample(msgspec.Struct, frozen=True, kw_only=True):
    """What there was at a time. running, waiting: sequences on ranks; head: unfinished ones that no
    rank has; head_s: how far the head is behind. kv_used: of the fullest rank."""

    at_s: float
    ranks: int
    running: int
    waiting: int
    head: int
    head_s: float
    kv_used: float


@dataclass(slots=True)
class _Seen:
    """Latencies since the autoscaler looked last, in seconds, requests that have ended, and
    tokens that were made."""

    firsts: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    ended: int = 0
    tokens: int = 0


class SimulatedService:
    """steps, busy_s: how many steps there were, and for how long one ran. head_busy_s: of the head.
    rank_seconds: of ranks, from being asked for until they left. on_step: told of each step's work,
    ranks, slowdown, and how many sequences are unfinished.
    """

    def __init__(
        self, settings: SimulatedSettings, profile: CostProfile, time: VirtualTime
    ) -> None:
        self.time = time
        self.on_step: OnStep = lambda work, ranks, slowdown, unfinished: None
        self.changes: list[SimulatedChange] = []
        self.steps = 0
        self.busy_s = 0.0
        self.head_busy_s = 0.0
        self._settings = settings
        self._step, self._head, self._change = profile.step, profile.head, profile.change
        limits = settings.limits
        router = Router(settings.routing)
        router.set_caches(
            RankCaches(limits.blocks, limits.block_size, limits.max_running, limits.prefix_cache)
        )
        self.journal = Journal(settings.max_sequences, router, clock=lambda: time.now)
        self.journal.kv_tokens = limits.blocks * limits.block_size
        self._admission = Admission(self.journal, self._admitting, self._send)
        self._restart = RestartPolicy(
            "always",
            limit=settings.restart_limit,
            backoff_s=settings.restart_backoff_s,
            longest_backoff_s=settings.restart_backoff_max_s,
        )
        self.ranks: dict[int, ModelledRank] = {}  # those of the epoch
        self._running: SimulatedChange | None = None
        self._armed: SimulatedChange | None = None  # goes into force between two steps
        self._stepping = False
        self._busy: set[int] = set()  # ids of ranks that may have work
        self._lost = 0  # kills that the survivors have not recovered from
        self._generation = 0  # of steps; those before the last loss come to nothing
        self._commands: list[Callable[[], None]] = []  # carried out between two steps
        self._slowdown = 1.0
        self._head_free = 0.0
        self._alive_since: dict[int, float] = {}
        self._past_rank_seconds = 0.0
        self._seen = _Seen()
        self._samples: list[Sample] = []
        self._attempts: list[Attempt] = []
        self._kills: list[SimulatedChange] = []  # whose ranks are not all back
        self.placement: Placement | None = None
        self._by_load = False  # experts are placed by their load
        self._experts_s = 1.0  # factor by which uneven experts make steps longer
        for rank in range(settings.ranks):
            self._join(rank)
        self._restart.set_desired(self.ranks)
        self._place(self.ranks)
        if settings.goals is not None:
            self.time.after(settings.goals.every_s, self._look)

    @property
    def rank_seconds(self) -> float:
        now = self.time.now
        return self._past_rank_seconds + sum(now - since for since in self._alive_since.values())

    # ---- requests -------------------------------------------------------------------------------

    def submit(
        self, name: str, prompt: list[int], tokens: int, listener: Callable[[Arrival], None]
    ) -> None:
        """A request for so many tokens. listener: told of its tokens, or of its error."""
        sent = self.time.now
        params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
        before = sent

        def heard(arrival: Arrival) -> None:
            nonlocal before
            now = self.time.now
            (self._seen.firsts if before == sent else self._seen.gaps).append(now - before)
            before = now
            if isinstance(arrival, Delta):
                self._seen.ended += arrival.finish is not None
                self._seen.tokens += len(arrival.tokens)
            else:
                self._seen.ended += 1
            listener(arrival)

        def admit() -> None:
            try:
                entry = self.journal.open(name, prompt, params, (), lambda _: None)
            except Overloaded as error:
                listener(error)
                return
            entry.stream.listen(heard if self._settings.goals is not None else listener)
            self._admission.admit(entry)

        work_s = self._head.request_s + len(prompt) * self._head.prompt_token_s
        self.time.after(self._head.latency_s, lambda: self._in_head(work_s, admit))

    def _in_head(self, seconds: float, action: Callable[[], None]) -> None:
        """The head does one thing after the other."""
        begin = max(self.time.now, self._head_free)
        self._head_free = begin + seconds
        self.head_busy_s += seconds
        self.time.at(self._head_free, action)

    def _admitting(self) -> Iterable[int]:
        leaving = self._running.remove if self._running else ()
        return [rank for rank in self.ranks if rank not in leaving]

    def _send(self, rank: int, command: msg.Command) -> None:
        member = self.ranks[rank]
        if member.dead:
            return  # the journal has it, and gives it to another when the head knows
        match command:
            case msg.Admit(sequences):
                for sequence in sequences:
                    member.scheduler.add(sequence)
                self._busy.add(rank)
            case msg.Abort(ids):
                for id in ids:
                    member.scheduler.abort(id)
        self._wake()

    def _published(
        self, rank: ModelledRank, events: list[TokenEvent], blocks: BlockChanges | None
    ) -> None:
        if self.ranks.get(rank.id) is rank:
            self.journal.router.learn(rank.id, blocks)
        for event in events:
            self.journal.publish(rank.id, event)

    # ---- steps ----------------------------------------------------------------------------------

    def _wake(self) -> None:
        if not self._stepping and not self._lost:
            self._stepping = True
            generation = self._generation
            self.time.after(0.0, lambda: self._between_steps(generation))

    def _between_steps(self, generation: int) -> None:
        if generation != self._generation:
            return  # a rank was lost
        commands, self._commands = self._commands, []
        for command in commands:
            command()
        if self._armed is not None:
            change, self._armed = self._armed, None
            cost = self._change
            pause_s = cost.join_pause_s if change.add else cost.leave_pause_s
            change.pause_ms = pause_s * 1e3
            self.time.after(pause_s, lambda: self._switch(change, generation))
            return
        begun = [(rank, rank.begin()) for rank in self._with_work()]
        working = [(rank, work) for rank, work in begun if work is not None]
        if not working:
            self._stepping = False
            return
        work = np.array([each for _, each in working])
        slowdown = self._slowdown * self._experts_s
        seconds = slowdown * self._step.seconds(work, len(self.ranks))
        self.steps += 1
        self.busy_s += seconds
        self.on_step(work, len(self.ranks), slowdown, len(self.journal))
        self.time.after(seconds, lambda: self._stepped([r for r, _ in working], generation))

    def _with_work(self) -> list[ModelledRank]:
        """In the order of their ids; most of many ranks have none, and are not looked at."""
        found = [self.ranks[id] for id in sorted(self._busy) if id in self.ranks]
        found = [rank for rank in found if rank.scheduler.has_work]
        self._busy = {rank.id for rank in found}
        return found

    def _stepped(self, ranks: list[ModelledRank], generation: int) -> None:
        if generation != self._generation:
            return  # it was broken
        for rank in ranks:
            self._publish(rank)
        self._between_steps(generation)

    def _publish(self, rank: ModelledRank) -> None:
        events, blocks = rank.end()
        cost = self._head.token_s * len(events)
        self._in_head(cost, lambda: self._published(rank, events, blocks))

    # ---- changes --------------------------------------------------------------------------------

    def scale(self, count: int, what: str = "") -> SimulatedChange:
        """So many ranks."""
        count = min(count, self._settings.capacity)
        ids = sorted(self.ranks)
        free = (rank for rank in range(self._settings.capacity) if rank not in self.ranks)
        add = [next(free) for _ in range(count - len(ids))]
        leavers = self._leave_order()[: max(0, len(ids) - count)]
        return self._begin(what or f"scale {count}", add, leavers)

    def remove(self, ranks: Sequence[int], what: str = "") -> SimulatedChange:
        """These leave."""
        name = what or "remove " + " ".join(map(str, ranks))
        missing = [rank for rank in ranks if rank not in self.ranks]
        if missing or len(set(ranks)) >= len(self.ranks):
            why = f"there is no rank {missing[0]}" if missing else "one rank must stay"
            return self._refused(name, why)
        return self._begin(name, [], sorted(set(ranks)))

    def rebalance(self, what: str = "rebalance") -> SimulatedChange:
        """Experts are placed by their load from now on."""
        if self._running is not None or self._lost or not self.ranks:
            return self._refused(what, "another change runs" if self.ranks else "no rank is up")
        self._running = change = SimulatedChange(at_s=self.time.now, what="rebalance")
        self.changes.append(change)
        self.time.after(self._change.leave_s, lambda: self._prepared(change))
        return change

    def kill(self, rank: int, what: str = "") -> SimulatedChange:
        """A rank's process ends."""
        member = self.ranks.get(rank)
        if member is None or member.dead:
            return self._refused(what or f"kill {rank}", f"there is no rank {rank}")
        change = SimulatedChange(at_s=self.time.now, what=what or f"kill {rank}", remove=[rank])
        self.changes.append(change)
        self._kills.append(change)
        member.dead = True
        self._lost += 1
        self._generation += 1
        self._stepping = False
        for one in self.ranks.values():
            one.broken()
        if self._running is not None:
            self._over(self._running, "failed", "a rank was lost")
        self.time.after(
            self._change.detect_s,
            lambda: self._in_head(0.0, lambda: self._detected(member, change)),
        )
        return change

    def _refused(self, what: str, why: str) -> SimulatedChange:
        change = SimulatedChange(at_s=self.time.now, what=what, state="refused", error=why)
        self.changes.append(change)
        return change

    def _leave_order(self) -> list[int]:
        placement = self.placement
        return leave_order(
            Candidate(
                id=rank.id,
                failing=rank.dead,
                kv_used=rank.scheduler.kv_used,
                experts=placement.count(rank.id) if placement else 0,
            )
            for rank in self.ranks.values()
        )

    def _begin(self, what: str, add: list[int], remove: list[int]) -> SimulatedChange:
        if self._running is not None or self._lost:
            return self._refused(what, "another change runs")
        change = SimulatedChange(at_s=self.time.now, what=what, add=add, remove=remove)
        self.changes.append(change)
        if not add and not remove:
            change.state, change.ended_s = "done", self.time.now
            return change
        self._running = change
        for rank in add:
            self._alive_since.setdefault(rank, self.time.now)
        cost, restart = self._change, what.startswith("restart")
        first_s = cost.restart_s if restart else cost.join_s if add else cost.leave_s
        self._slowdown = cost.slowdown if add else 1.0
        more_s = cost.join_more_s * max(0, len(add) - 1)
        self.time.after(first_s + more_s, lambda: self._prepared(change))
        return change

    def _prepared(self, change: SimulatedChange) -> None:
        if change.state == "running":
            self._slowdown = 1.0
            self._armed = change
            self._wake()

    def _switch(self, change: SimulatedChange, generation: int) -> None:
        """Between two steps."""
        if generation != self._generation:
            return
        leavers = [self.ranks.pop(rank) for rank in change.remove]
        for rank in change.add:
            self._join(rank)
        change.moved_experts = self._place(self.ranks, by_load=change.what == "rebalance")
        if not change.what.startswith("restart"):
            self._restart.set_desired(self.ranks)
        for leaver in leavers:
            self._leave(leaver, leaver.scheduler.hand_over(), change)
        self._over(change, "done")
        self._admission.admit_waiting()
        self._between_steps(generation)

    def _join(self, rank: int) -> None:
        self.ranks[rank] = ModelledRank(rank, self._settings.limits)
        self._alive_since.setdefault(rank, self.time.now)
        self._restart.active(rank, self.time.now)

    def _leave(self, leaver: ModelledRank, held: list[HeldKV], change: SimulatedChange) -> None:
        self._gone(leaver.id)
        self._restart.left(leaver.id)

        def hand_over() -> None:
            moved = self.journal.hand_over(leaver.id, held, self._admitting())
            for destination, migrations in moved.items():
                change.moved_requests += len(migrations)
                self._commands.append(partial(self._adopt, self.ranks[destination], migrations))
            self.journal.router.forget(leaver.id)
            self._wake()

        self._in_head(0.0, hand_over)

    def _adopt(self, rank: ModelledRank, migrations: list[KVMigration]) -> None:
        if rank.dead or self.ranks.get(rank.id) is not rank:
            return  # it was lost meanwhile, and the journal knows
        self._busy.add(rank.id)
        for migration in migrations:
            rank.scheduler.adopt(migration.sequence, migration.held, [])
            rank.scheduler.settle(migration.sequence.id)

    def _gone(self, rank: int) -> None:
        self._past_rank_seconds += self.time.now - self._alive_since.pop(rank, self.time.now)

    def _over(self, change: SimulatedChange, state: str, error: str | None = None) -> None:
        change.state, change.error, change.ended_s = state, error, self.time.now
        self._running = self._armed = None
        self._slowdown = 1.0
        for rank in change.add:
            if rank not in self.ranks:
                self._gone(rank)
        if change.what.startswith("autoscale"):
            took_s = self.time.now - change.at_s
            target = len(self.ranks)
            if state != "done":
                target += len(change.add) - len(change.remove)
            self._attempts.append(
                Attempt(
                    at=self.time.now,
                    target=target,
                    done=state == "done",
                    took_s=took_s,
                    grew=bool(change.add),
                )
            )
        self._all_back()
        self.time.after(0.0, self._restart_lost)

    def _all_back(self) -> None:
        alive = {rank.id for rank in self.ranks.values() if not rank.dead}
        if self._restart.missing(alive):
            return
        for kill in self._kills:
            if kill.recovered_s is not None:
                kill.ended_s = self.time.now
                kill.state = "done" if alive >= self._restart.desired else "failed"
        self._kills = [kill for kill in self._kills if kill.recovered_s is None]

    # ---- losses ---------------------------------------------------------------------------------

    def _detected(self, member: ModelledRank, kill: SimulatedChange) -> None:
        kill.detected_s = self.time.now
        self.journal.router.forget(member.id)
        del self.ranks[member.id]
        self._gone(member.id)
        self._restart.exited(member.id, _SIGKILL, self.time.now)
        self.time.after(self._change.recover_s, lambda: self._recovered(member, kill))

    def _recovered(self, member: ModelledRank, kill: SimulatedChange) -> None:
        self._lost -= 1
        kill.recovered_s = self.time.now
        if self.ranks:
            self._place(self.ranks)
        for name in self.journal.of_rank(member.id):
            self.journal.release(name)
            kill.moved_requests += 1
        self._admission.admit_waiting()
        self._wake()
        self._all_back()
        self._restart_lost()

    def _restart_lost(self) -> None:
        if self._running is not None or self._lost:
            return
        due = self._restart.due(self.ranks, self.time.now)
        if due:
            self._begin("restart " + " ".join(map(str, sorted(due))), sorted(due), [])
            return
        later = self._restart.next_s(self.ranks, self.time.now)
        if later is not None:
            self.time.after(later, self._restart_lost)

    def _place(self, ranks: Iterable[int], *, by_load: bool = False) -> int:
        """The experts of these ranks; how many replicas they load for it."""
        settings, before = self._settings, self.placement
        self.placement = replan(
            before,
            ranks,
            experts=settings.experts,
            layers=settings.layers,
            redundant=settings.redundant,
            loads=settings.expert_loads if by_load or self._by_load else None,
        )
        self._by_load = self._by_load or by_load
        if settings.expert_loads is not None:
            uneven = total_imbalance(self.placement, settings.expert_loads)
            self._experts_s = 1 + settings.expert_share * (uneven - 1)
        return sum(map(len, loads(before, self.placement).values())) if before else 0

    # ---- what is seen ---------------------------------------------------------------------------

    def look(self) -> QueueSample:
        """What there is now."""
        alive = [rank.scheduler for rank in self.ranks.values() if not rank.dead]
        running = sum(scheduler.running for scheduler in alive)
        waiting = sum(scheduler.waiting for scheduler in alive)
        return QueueSample(
            at_s=self.time.now,
            ranks=len(alive),
            running=running,
            waiting=waiting,
            head=len(self.journal.waiting()),
            head_s=max(0.0, self._head_free - self.time.now),
            kv_used=max((scheduler.kv_used for scheduler in alive), default=0.0),
        )

    def _look(self) -> None:
        """The autoscaler does."""
        goals = self._settings.goals
        assert goals is not None
        now, seen = self.look(), self._seen
        self._seen = _Seen()
        sample = Sample(
            at=now.at_s,
            ranks=now.ranks,
            running=now.running,
            waiting=now.waiting + now.head,
            kv_used=now.kv_used,
            ttft_p99_s=percentile(sorted(seen.firsts), 0.99) if seen.firsts else None,
            itl_p99_s=percentile(sorted(seen.gaps), 0.99) if seen.gaps else None,
            ended=seen.ended,
            tokens=seen.tokens,
        )
        self._samples = [*self._samples[1 - _KEPT_SAMPLES :], sample]
        decision = self._settings.policy(goals, tuple(self._samples), tuple(self._attempts))
        if decision.ranks != now.ranks and self._running is None and not self._lost:
            self.scale(decision.ranks, f"autoscale {decision.ranks}: {decision.why}")
        self.time.after(goals.every_s, self._look)


def skewed_loads(layers: int, experts: int, skew: float, seed: int) -> list[list[float]]:
    """[layers][experts]: Zipf's, in another order in each layer."""
    source = random.Random(seed)
    found = []
    for _ in range(layers):
        each = [(rank + 1) ** -skew for rank in range(experts)]
        source.shuffle(each)
        found.append(each)
    return found


def failed(arrival: Arrival) -> FlexpertError | None:
    """Why a request ends without an answer; None: it does not."""
    return arrival if isinstance(arrival, FlexpertError) else None
