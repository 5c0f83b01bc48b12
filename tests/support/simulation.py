"""A simulated cluster: the real coordinator, table, journal and admission; all else is simulated.

    python tools/simulate.py 1000        # that many histories, from seed 0
    python tools/simulate.py --trace 17  # what happens in one

A history is a function of its seed. What differs between histories: when messages arrive (in order
on each link, in any order between links), which links are held up and for how long, who is killed,
stopped and woken, whose exchanges are cut, when the head itself is held up, what fails to start or
to load, what is asked for, when experts move. Ranks (`simulated_rank.py`) take steps of no
duration: all members of an epoch vote; if all are armed for the same next epoch they switch, else
each publishes a token of every sequence it runs; a step may be torn, so that some have done that
and others have not.

What must hold, looked at whenever it could break (`Violation`):
- the members of an epoch run it, all of them with the same plan, and no older one after it;
- an epoch's experts are all loaded (those that are missing and spared need not), each where the
  plan says, and no rank holds more than it has memory for;
- a request runs on one rank at a time, each of its tokens follows the one published before it, and
  it ends when it has as many as were asked for;
- an id is used again only when its old process is gone;
- a rank is told to commit only what it has prepared;
- a change leaves no expert on one machine only, where each has two replicas and shares allow;
- it is told to stop only when it runs nothing and its destinations have read its KV, unless all
wait;
- a rank to which nothing was done is not ended, unless it is to leave;
- a request that ends its ranks by a fault of theirs has ended two, when it is failed, unless it has
  said something in between; however long after their connections the processes end;
- once faults are over all is well again: who is desired serves, nothing is left of who is not, and
  no rank keeps what it has prepared in vain.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import heapq
import logging
import random
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from types import SimpleNamespace
from typing import Any

from flexpert.cluster.admission import Admission
from flexpert.cluster.balance_policy import Gain
from flexpert.cluster.balancer import Plan
from flexpert.cluster.coordinator import Coordinator
from flexpert.cluster.interfaces import Work
from flexpert.cluster.journal import Arrival, Journal
from flexpert.cluster.membership import Phase
from flexpert.cluster.memory_budget import MemoryBudget
from flexpert.cluster.operation import Operation
from flexpert.cluster.processes.rank_process import BEATS
from flexpert.cluster.saved_state import Purpose, SavedCluster, SavedOperation
from flexpert.cluster.views import ClusterEvent
from flexpert.config import load_config
from flexpert.engine import rank_protocol as msg
from flexpert.engine.request import HeldKV, KVMigration, SamplingParams, TokenEvent
from flexpert.errors import FlexpertError, OperationConflict, OperationRefused
from flexpert.moe.placement import Placement
from support.simulated_network import Network, Timer
from support.simulated_rank import LOAD, MEMORY, NEVER_S, SimRank, Violation, weights_of

TROUBLE_S = 8.0  # of a history; then faults stop
PATIENCE_S = 200.0  # until all must be well again
MOST_EVENTS = 50_000  # a history has a few hundred
LATE_S = 0.3  # of a message, at most, where no link is held up
MOST_POISONED = 8  # ranks that one request may end by signals; by itself, two
STEP_S = 0.05
REPORT_EVERY = 10_000
STALL_S = 4.0
SETTINGS: dict[str, Any] = {
    "cluster.ranks": 3,
    "cluster.max_ranks": 6,
    "cluster.start_timeout": 8.0,
    "cluster.load_timeout": 8.0,
    "cluster.migration_timeout": 8.0,
    "cluster.commit_timeout": 12.0,
    "cluster.stall_timeout": STALL_S,
    "cluster.redundant_experts": 1,
    "cluster.restart_backoff": 0.3,
    "cluster.restart_limit": 50,  # faults come faster than in life
}
# Which of them a history has, its seed says.
KINDS: tuple[dict[str, Any], ...] = (
    {},
    {"cluster.memory_per_rank": 3},  # experts, here: one rank alone cannot hold all
    {},
    {"cluster.on_missing_expert": "degrade"},
    {"cluster.on_missing_expert": "degrade", "cluster.memory_per_rank": 3},
)
CONFIGS = [load_config(environment={}, overrides=SETTINGS | kind) for kind in KINDS]
# From this seed on, ranks are on several machines, and some are lost as a whole. Where memory is
# not bounded, each expert has two replicas.
MACHINES_FROM = 10_000
SPREAD: dict[str, Any] = {"cluster.redundant_experts": 5}
MACHINE_CONFIGS = [
    load_config(
        environment={},
        overrides=SETTINGS | kind | ({} if "cluster.memory_per_rank" in kind else SPREAD),
    )
    for kind in KINDS
]
SOURCE: Any = SimpleNamespace(experts=5, moe_layers=1)
EXPERTS = frozenset((layer, e) for layer in range(1) for e in range(5))


class Simulation(Network):
    """One history; also the head and the ranks' world."""

    def __init__(self, seed: int, trace: bool = False) -> None:
        super().__init__(seed, trace)
        self.lives = 0
        self.processes: dict[int, SimRank] = {}  # until their end was told
        self.addresses: set[bytes] = set()  # of processes that live
        self.adopting: list[tuple[SimRank, bytes]] = []  # told to take KV, has not heard it
        self.hostile = seed % 4 == 3
        self.evil = random.Random(seed)  # of its own: other histories stay what they are
        self.mover = random.Random(~seed)
        self.disconnects = seed % 8 in (
            2,
            6,
            7,
        )  # long before its end, that of a connection is told
        self.endings = random.Random(seed)
        self.poison: dict[str, tuple[int, int]] = {}  # the step that ends its rank, with a status
        self.poisoned: Counter[str] = Counter()  # how many it has ended
        self.silent: Counter[str] = Counter()  # of these, since it has said anything
        self.on_board: Counter[str] = Counter()  # when a rank exited unasked
        self.quiet = False  # no step is possible before something changes
        self.journal = Journal()
        self.admission = Admission(self.journal, lambda: self.coordinator.admitting, self.send)
        self.answers: dict[str, list[int]] = {}
        self.desired: dict[str, int] = {}  # tokens of each request
        self.open: dict[str, Any] = {}  # streams of those that are not finished
        self.before: list[int] = []  # by token, which one it was computed after
        self.dead: str | None = None
        self.over = False  # it never came up: the head says so and ends
        self.plans: dict[int, msg.Prepare] = {}  # those that were entered
        self.newest = 0  # the latest epoch that has run a step
        self.steps = 0
        self.config = (MACHINE_CONFIGS if seed >= MACHINES_FROM else CONFIGS)[seed % len(CONFIGS)]
        self.machines = ("a", "b", "c")[: 2 + seed % 2] if seed >= MACHINES_FROM else ()
        self.where = random.Random(seed)
        self.machine_of: dict[int, str] = {}  # by number of a life, where machines have names
        self.coordinator = Coordinator(self.config, SOURCE, self, SmallRanks(self.config, SOURCE))

    # ---- the network between head and ranks -----------------------------------------------------

    def send(self, rank: int, command: msg.Command) -> None:
        process = self.processes.get(rank)
        if process is None or not process.proven:
            return
        if self.trace:
            self.note("head →", rank, type(command).__name__, getattr(command, "epoch", ""))
        if isinstance(command, msg.Stop) and process.alive:
            runs = sorted(process.sequences)
            read = any(
                kv == process.address and destination.alive for destination, kv in self.adopting
            )
            if (runs or read) and not self.coordinator.down:
                raise Violation(f"rank {rank} is stopped while it runs {runs}, or its KV is read")
        elif isinstance(command, msg.Prepare) and self.machines:
            self.check_spread(command)
        elif isinstance(command, msg.Adopt):
            if any(move.held.computed for move in command.migrations):
                self.adopting.append((process, command.kv))
        elif isinstance(command, msg.Commit | msg.Halt) and self.chance(0.04):
            self.call(0.1 * self.draw.random(), self.fault)  # where it hurts most
        self.carry(("down", process.life), self.hears, process, command)

    def check_spread(self, plan: msg.Prepare) -> None:
        """Ranks are told where all are, and no machine has both replicas of an expert if shares
        allow."""
        there = {rank: self.machine_of[self.processes[rank].life] for rank in plan.members}
        if any(plan.machines[rank] != name for rank, name in there.items()):
            raise Violation(f"epoch {plan.epoch}: ranks are on {there}, not {plan.machines}")
        cluster = self.coordinator._cluster
        spread = cluster.membership.phase is Phase.LOAD and cluster.operation
        if not spread or spread.purpose in (Purpose.RELOAD, Purpose.REBALANCE):
            return  # after a loss only what is lost is loaded; `rebalance` moves at random
        fullest = max(Counter(there.values()).values())
        if self.config.cluster.redundant_experts < 5 or 2 * fullest > len(there):
            return
        for lost in set(there.values()):
            held = [of for rank, of in plan.placement.layers[0].items() if there[rank] != lost]
            if len(set().union(*held)) < 5:
                raise Violation(f"epoch {plan.epoch}: machine {lost} alone has some experts")

    def hears(self, process: SimRank, command: msg.Command) -> None:
        self.quiet = False
        process.hear(command)

    def tell(self, rank: SimRank, report: msg.Report) -> None:
        self.carry(("up", rank.life), self.arrives, rank, report, self.clock)

    def arrives(self, process: SimRank, report: msg.Report, sent: float) -> None:
        if sent > process.lost_after or self.forgotten(process):
            return
        if self.trace:
            self.note("head ←", process.id, type(report).__name__, getattr(report, "epoch", ""))
        if isinstance(report, msg.Hello):
            process.proven = True
        try:
            if isinstance(report, msg.OnTrial):
                self.journal.on_trial(report.id)
            elif isinstance(report, msg.Published):
                for event in report.events:
                    self.journal.publish(process.id, event)
            self.coordinator.on_report(process.id, report)
        except msg.Contradiction as error:
            if not process.lies:
                raise Violation(f"rank {process.id} is taken for a liar: {error}") from error
            self.coordinator.expel(process.id, f"contradicts itself: {error}")

    def forgotten(self, process: SimRank) -> bool:
        """Its end was told: whoever comes under its id must prove itself first."""
        return self.processes.get(process.id) is not process

    def beat(self) -> None:
        """Whoever runs says so; what a held link carries will say it later."""
        for process in list(self.processes.values()):
            heard = process.proven and self.links[("up", process.life)] <= self.clock
            if process.runs and heard:
                stuck_s = max(0.0, self.clock - process.hangs_since)
                self.coordinator.on_report(process.id, msg.Alive(stuck_s))
        self.over = not self.coordinator.desired and self.coordinator._cluster.operation is None
        self.call(STALL_S / BEATS, self.beat)

    # ---- the head -------------------------------------------------------------------------------

    def spawn(self, rank: int, verdicts: bytes) -> None:
        if rank in self.processes:
            raise Violation(f"id {rank} is started again while its old process may live")
        self.lives += 1
        process = self.processes[rank] = SimRank(self, rank, self.lives)
        self.addresses.add(process.address)
        if self.machines:
            self.machine_of[self.lives] = self.where.choice(self.machines)
        self.note("spawn", rank, self.machine_of.get(self.lives, ""))
        spared = self.lives <= 3 and self.chance(0.8)  # else many a history ends at its beginning
        if not spared and self.chance(0.03):
            self.call(0.01, self.end, process, 1)
        elif not spared and self.chance(0.02):
            self.tell(process, msg.Unable("no memory"))
            self.call(self.draw.random(), self.end, process, 1)
        else:
            slow = not spared and self.chance(0.02)
            seconds = 10.0 if slow else 0.05 + 0.25 * self.draw.random()
            self.call(seconds, self.started, process)

    def started(self, process: SimRank) -> None:
        if process.stopped:
            process.inbox.append(lambda: self.started(process))
        elif process.alive:
            own = process.address
            here = self.machine_of.get(process.life) or socket.gethostname()
            hello = msg.Hello(process.life, here, own, own, own, machine=here)
            self.tell(process, hello)

    @property
    def reserved(self) -> frozenset[int]:
        return frozenset()

    @property
    def draining(self) -> frozenset[int]:
        return frozenset()

    def on_this_host(self, newcomers: frozenset[int]) -> frozenset[int]:
        return newcomers

    def kill(self, rank: int) -> None:
        process = self.processes.get(rank)
        if process is None:
            return
        if process.told and process.status > 0:
            process.status = -9  # it was on its way out, and now nobody knows why
        membership = self.coordinator._cluster.membership
        change = membership.change
        stays = change and rank in change.before & change.after
        if process.alive and process.well and stays and membership.phase is not Phase.LOST:
            raise Violation(f"rank {rank} is terminated although nothing was done to it")
        self.call(0.002 * self.draw.random(), self.end, process, -9)

    def end(self, process: SimRank, status: int) -> None:
        if not process.alive:
            return
        self.note("ends", process.id, status)
        process.alive = self.quiet = False
        process.status = status
        self.addresses.discard(process.address)
        if status < 0:
            process.lost_after = self.clock - 0.02 * self.draw.random()
        delay_s = 0.0005 + 0.01 * self.draw.random()
        if self.hostile:  # what it has sent is read before its end is told
            process.lost_after = self.clock
            said = self.links.get(("up", process.life), 0.0) - self.clock
            delay_s = max(delay_s, min(said, 0.5) + 1e-6)
        if self.disconnects:
            heard_s = delay_s if self.hostile else 0.3 * delay_s
            self.call(heard_s, self.disconnected, process)
            delay_s = heard_s + 2.0 * self.endings.random() ** 4  # a GPU's memory is given back
        self.call(delay_s, self.ended, process)

    def disconnected(self, process: SimRank) -> None:
        process.lost_after = -1.0  # what has not arrived never will
        process.told = True
        self.coordinator.on_disconnected(process.id)

    def ended(self, process: SimRank) -> None:
        del self.processes[process.id]
        self.coordinator.on_exit(process.id, process.status)

    def work(self, rank: int) -> Work | None:
        process = self.processes.get(rank)
        if process is None or not process.alive:
            return None
        return Work(process.stopped_at if process.stopped else self.clock, 0)

    def assign_destinations(
        self, held: list[HeldKV], destinations: Iterable[int]
    ) -> dict[int, list[KVMigration]]:
        return self.journal.assign_destinations(held, destinations)

    def hand_over(
        self, rank: int, held: list[HeldKV], destinations: Iterable[int]
    ) -> dict[int, list[KVMigration]]:
        return self.journal.hand_over(rank, held, destinations)

    def rank_exited(self, rank: int, own_fault: bool) -> None:
        self.on_board.update(self.journal.of_rank(rank))
        self.journal.rank_exited(rank, own_fault=own_fault)

    expert_cache = b""
    saves = False

    def save_cluster(self, record: SavedCluster, *, urgent: bool) -> None: ...
    def save_operation(self, record: SavedOperation, *, urgent: bool) -> None: ...
    def forget_operation(self, operation_id: str) -> None: ...

    def admit_waiting(self) -> None:
        self.admission.admit_waiting()

    def service_lost(self, reason: str) -> None:
        self.dead = str(reason)
        self.journal.fail_all(FlexpertError(self.dead))

    def publish(self, event: ClusterEvent) -> None:
        self.note("event", event.kind, event.data)
        if event.data.get("state") == "cancelled":
            members = self.coordinator.members
            if not members.isdisjoint(event.data["add"]) or not members >= {*event.data["remove"]}:
                raise Violation(f"a change is cancelled, but {sorted(members)} are members")

    def impair(self, part: str, why: str | None) -> None:
        if why is not None:
            raise Violation(f"{part}: {why}")

    def heard(self) -> bool:
        return False

    # ---- the ranks' world -----------------------------------------------------------------------

    def living(self, addresses: Iterable[bytes]) -> bool:
        return self.addresses.issuperset(addresses)

    def token(self, previous: int) -> int:
        self.before.append(previous)
        return len(self.before) - 1

    def poisons(self, rank: SimRank) -> bool:
        """Whether the step that a rank is in ends it."""
        for name in rank.on_trial.intersection(rank.sequences):
            self.tell(rank, msg.OnTrial(name))
        rank.on_trial.clear()
        for name, running in rank.sequences.items():
            fatal = self.poison.get(name)
            if fatal and running.length >= fatal[0]:
                self.poisoned[name] += 1
                # whose messages are held up until after its end says nothing of a trial
                held = self.links.get(("up", rank.life), 0.0) > self.clock + LATE_S
                self.silent[name] += not held
                most = MOST_POISONED if fatal[1] == -signal.SIGKILL else 2
                if self.silent[name] > most:
                    raise Violation(f"request {name} may end one rank after the other")
                self.note("poisoned by", name, rank.id)
                self.end(rank, fatal[1])
                return True
        return False

    def takes(self, rank: SimRank, sequence_id: str) -> None:
        for other in self.processes.values():
            if other.alive and sequence_id in other.sequences:
                raise Violation(f"rank {rank.id} takes {sequence_id}, which {other.id} runs")

    def adopted(self, rank: SimRank, kv: bytes) -> None:
        if (rank, kv) in self.adopting:
            self.adopting.remove((rank, kv))

    def enters(self, rank: SimRank, plan: msg.Prepare) -> None:
        if plan.epoch <= rank.entered:
            raise Violation(f"rank {rank.id} goes from epoch {rank.entered} to {plan.epoch}")
        known = self.plans.setdefault(plan.epoch, plan)
        if known is not plan and known != plan:
            raise Violation(f"epoch {plan.epoch} is not the same for all")
        if plan.members.get(rank.id, rank.address) != rank.address:
            raise Violation(f"epoch {plan.epoch} means another process of id {rank.id}")

    def attaches(self, rank: SimRank) -> None:
        raise Violation("there is but one head")

    def step(self) -> None:
        """Each epoch whose members are all there does one round."""
        self.quiet = True
        groups: dict[int, list[SimRank]] = {}
        for rank in self.processes.values():
            if rank.member and rank.runs:
                groups.setdefault(rank.epoch, []).append(rank)
        for epoch, ranks in sorted(groups.items()):
            if any(rank.votes for rank in ranks):
                self.round(epoch, ranks)

    def round(self, epoch: int, ranks: list[SimRank]) -> None:
        plan = ranks[0].plan
        assert plan is not None
        whole = len(ranks) == len(plan.members)
        for rank in ranks:
            if rank.owed or rank.cut_until > self.clock:
                whole = False
        if not whole:
            gone = set(plan.members.values()) - self.addresses
            for rank in ranks:
                rank.waits(gone)
            return
        self.quiet = False
        self.steps += 1
        if epoch != self.newest:
            self.begins(epoch, ranks)
        for rank in ranks:
            rank.voted()
        armed = ranks[0].armed
        if armed and all(rank.armed == armed for rank in ranks):
            self.carries_out(ranks, SimRank.switch, torn=self.chance(0.2))
        elif any(rank.sequences for rank in ranks):
            self.carries_out(ranks, SimRank.publish, torn=self.chance(0.01))
        else:
            self.quiet = not any(rank.votes for rank in ranks)

    def carries_out(
        self, ranks: list[SimRank], action: Callable[[SimRank], None], torn: bool
    ) -> None:
        """All votes are there. If it is torn, one stops or ends before all have what they need."""
        if not torn or self.clock > TROUBLE_S:
            for rank in ranks:
                action(rank)
            return
        victim = self.draw.choice(ranks)
        complete = self.chance(0.3)  # it had sent everything
        for rank in ranks:
            if complete or (rank is not victim and self.chance(0.5)):
                action(rank)
            else:
                rank.owed = lambda rank=rank: action(rank)  # type: ignore[misc]
                rank.behind = None if rank is victim else victim
        self.note("torn by", victim.id, "complete" if complete else "")
        fate = self.draw.random()
        if fate < 0.4:
            self.end(victim, -9)
        elif fate < 0.6:
            self.stop(victim)
        else:  # it is held up for a moment
            victim.stop(self.clock)
            self.call(0.3 * self.draw.random(), self.wake, victim)

    def begins(self, epoch: int, ranks: list[SimRank]) -> None:
        """The first step of an epoch, or a step of an older one than the newest."""
        plan = self.plans[epoch]
        if epoch < self.newest:
            # where nobody stays, newcomers may begin while the old ones end
            newest = self.plans[self.newest].members
            if newest.keys() & plan.members.keys():
                raise Violation(f"epoch {epoch} runs a step after epoch {self.newest} has begun")
            return
        self.newest = epoch
        loaded = frozenset[tuple[int, int]]().union(*[rank.weights for rank in ranks])
        spared = frozenset[tuple[int, int]]()
        if self.config.cluster.on_missing_expert == "degrade":
            spared = frozenset(plan.placement.missing())
        if not loaded >= EXPERTS - spared:
            lacking = sorted(EXPERTS - spared - loaded)
            raise Violation(f"epoch {epoch} begins and nobody has {lacking}")
        for rank in ranks:
            limit = self.config.cluster.memory_per_rank
            if limit is not None and len(rank.weights) > limit:
                raise Violation(f"epoch {epoch}: rank {rank.id} holds more than it has memory for")
            if not rank.weights >= weights_of(plan, rank.id):
                raise Violation(f"epoch {epoch}: rank {rank.id} has not loaded what it is to own")

    # ---- people ---------------------------------------------------------------------------------

    def ask(self) -> None:
        name = f"r{len(self.answers)}"
        if self.hostile and self.evil.random() < 0.03:  # an error, a crash, or too much memory
            self.poison[name] = self.evil.randint(0, 5), self.evil.choice((1, -11, -9))
        tokens = 1 + int(15 * self.draw.random())
        params = SamplingParams(max_tokens=tokens, seed=0)
        entry = self.journal.open(name, [1], params, (), self.cancelled)
        self.answers[name] = []
        self.desired[name] = tokens
        self.open[name] = entry.stream
        entry.stream.listen(partial(self.receive, name))
        self.admission.admit(entry)

    def receive(self, name: str, item: Arrival) -> None:
        if item is None:  # we have cancelled it ourselves
            return
        if isinstance(item, FlexpertError):
            # where there is poison, a request may be found guilty that was on board twice
            if self.dead is None and name not in self.poisoned and self.on_board[name] < 2:
                raise Violation(f"request {name} failed: {item}")
            del self.open[name]
            return
        answer = self.answers[name]
        self.silent[name] = 0
        if name not in self.open:
            raise Violation(f"request {name} gets a token after its end")
        for token in item.tokens:
            if self.before[token] != (answer[-1] if answer else -1):
                raise Violation(f"request {name}: token {token} does not follow {answer[-1:]}")
            answer.append(token)
        if item.finish is not None:
            if len(answer) != self.desired[name]:
                raise Violation(f"request {name} ends after {len(answer)} tokens")
            del self.open[name]

    def give_up(self) -> None:
        """A client goes away."""
        if self.open:
            name = self.draw.choice(list(self.open))
            self.open.pop(name).cancel()

    def cancelled(self, name: str) -> None:
        self.admission.cancel(name)

    def change(self) -> None:
        coordinator = self.coordinator
        draw = self.draw.random()
        try:
            if draw < 0.2 and coordinator.running:
                coordinator.cancel(coordinator.running.id)
            elif draw < 0.6:
                coordinator.begin(ranks=self.draw.randint(1, 5))
            else:
                members = sorted(coordinator.members)
                gone = self.draw.sample(members, min(len(members), self.draw.randint(0, 2)))
                coordinator.begin(add=self.draw.randint(0, 2), remove=gone)
        except (OperationConflict, OperationRefused):
            pass

    def rebalance(self) -> None:
        """Ranks exchange what they hold, at random: where it leads does not matter here."""
        coordinator = self.coordinator
        before = coordinator._cluster.placement
        if before is None:
            return
        ranks = before.ranks
        given = dict(zip(ranks, self.mover.sample(ranks, len(ranks)), strict=True))
        layers = [{rank: held[given[rank]] for rank in ranks} for held in before.layers]
        gain = Gain(1.0, 0.5)
        plan = Plan(Placement(before.experts, layers), 1, gain, gain, 0.0, whole=True)

        def begin(operation: Operation) -> None:
            coordinator._balancer._begin(operation, plan, self.clock)
            self.note("rebalance")

        with contextlib.suppress(OperationConflict, OperationRefused):
            coordinator._operations.rebalance(begin)

    # ---- faults ---------------------------------------------------------------------------------

    def fault(self) -> None:
        alive = [process for process in self.processes.values() if process.alive]
        if not alive or self.clock > 0.5 + TROUBLE_S:
            return
        victim = self.draw.choice(alive)
        draw, seconds = self.draw.random(), 6.0 * self.draw.random() ** 2
        if draw < 0.42:
            self.end(victim, -9)
        elif draw < 0.62:
            if not victim.stopped:
                self.stop(victim)
        elif draw < 0.80:
            way = self.draw.choice(("up", "down"))
            self.note("holds", way, victim.id, seconds)
            self.hold((way, victim.life), seconds)
            victim.well = False
        elif draw < 0.90:
            self.note("cuts", victim.id, seconds)
            victim.well, victim.cut_until = False, self.clock + seconds
            if self.chance(0.3):  # its step loop hangs, while its other threads go on
                victim.cut_until = victim.hangs_since = self.clock
                victim.cut_until += NEVER_S
            else:
                self.call(seconds, self.wakes_peers)
        elif self.clock >= self.deaf_until:
            seconds = 2.0 + 4.0 * self.draw.random()
            self.note("head deaf", seconds)
            self.deaf_until = self.clock + seconds

    def lose_machine(self) -> None:
        """All that is on a machine ends at once."""
        name = self.where.choice(self.machines)
        self.note("machine is lost", name)
        for process in list(self.processes.values()):
            if self.machine_of[process.life] == name:
                self.end(process, -9)

    def lie(self) -> None:
        """A rank says what is not so; that may cost it its life, and others nothing."""
        able = [r for r in self.processes.values() if r.runs and r.proven]
        if not able:
            return
        rank = self.evil.choice(able)
        other = self.evil.choice([*self.answers, "nobody's"])
        epoch = self.evil.choice((0, rank.epoch, self.coordinator.epoch, 10**9))
        lost = [HeldKV(name, 10**6, [-1]) for name in self.answers]
        report: msg.Report = self.evil.choice(
            (
                msg.Hello(0, "nowhere", b"?", b"?", b"?"),
                msg.Unable("no reason"),
                msg.HandedOver(epoch, lost),
                msg.Offered(epoch, lost),
                msg.Fetched(epoch, 10**6, -1),
                msg.Adopted(10**6, -1, -1, -1),
                msg.Halted(epoch),
                msg.Progress(epoch, float("nan")),
                msg.Failed(0, "?"),
                msg.Switched(10**9, float("nan"), LOAD),
                msg.Prepared(10**9, -1, MEMORY),
                msg.Broken(10**9, [10**6], "?"),
                msg.Rejected("nobody's", "?"),
                msg.Published([TokenEvent(other, 10**6, [1], None, None)], LOAD),
                msg.Published([TokenEvent(other, 0, [], None, "?")], LOAD),
            )
        )
        if isinstance(report, msg.HandedOver) and rank.id not in self.coordinator._cluster.staying:
            return  # it leaves, and nobody else can know what it does
        self.note("lies", rank.id, report)
        rank.lies, rank.well = True, False
        self.tell(rank, report)

    def stop(self, rank: SimRank) -> None:
        self.note("stops", rank.id)
        rank.stop(self.clock)
        if self.chance(0.6):
            self.call(6.0 * self.draw.random() ** 2, self.wake, rank)

    def wake(self, rank: SimRank) -> None:
        if not rank.alive or not rank.stopped:
            return
        self.note("wakes", rank.id)
        self.quiet = False
        if not rank.wake():
            return
        for peer in self.processes.values():
            if peer.behind is rank:
                peer.behind = None
                if peer.runs and peer.owed:
                    peer.owed()

    def wakes_peers(self) -> None:
        self.quiet = False

    # ---- a history ------------------------------------------------------------------------------

    def run(self) -> None:
        """Raises: Violation"""
        self.coordinator.begin_first(3)
        self.beat()
        plan = ((self.ask, 0.4), (self.fault, 1.4), (self.change, 1.2), (self.give_up, 2.0))
        for action, mean in plan:
            at = self.draw.expovariate(1 / mean)
            while at < TROUBLE_S:
                self.call(0.5 + at, action)
                at += self.draw.expovariate(1 / mean)
        at = self.mover.expovariate(1 / 1.5)
        while at < TROUBLE_S:
            self.call(0.5 + at, self.rebalance)
            at += self.mover.expovariate(1 / 1.5)
        at = self.evil.expovariate(1 / 2.0)
        while self.hostile and at < TROUBLE_S:
            self.call(0.5 + at, self.lie)
            at += self.evil.expovariate(1 / 2.0)
        at = self.where.expovariate(1 / 4.0)
        while self.machines and at < TROUBLE_S:
            self.call(0.5 + at, self.lose_machine)
            at += self.where.expovariate(1 / 4.0)
        next_step = 0.0
        # a rank that a request ends again and again starts ever later
        events, end = self.events, TROUBLE_S + PATIENCE_S * (1 + 9 * self.hostile)
        while self.clock < end and self.dead is None and not self.over:
            if not self.quiet and events[0][0] >= next_step:
                if next_step > self.clock:
                    self.clock = next_step
                next_step = self.clock + STEP_S
                self.step()
                continue
            if self.number > MOST_EVENTS:
                raise Violation("it does not come to rest")
            at, _, action, args = heapq.heappop(events)
            if at < self.deaf_until and action.__func__ in HEADS:  # type: ignore[attr-defined]
                self.put_off(action, args)
                continue
            if at > self.clock:
                self.clock = at
            action(*args)
            if not self.open and self.clock > TROUBLE_S + 1.0 and self.well():
                break
        self.check_end()

    def well(self) -> bool:
        coordinator = self.coordinator
        return (
            not self.open
            and coordinator._cluster.operation is None
            and coordinator._cluster.membership.phase is Phase.IDLE
            and coordinator.members == coordinator.desired - coordinator.left_out
            and coordinator.down is None
            and not coordinator.placement().missing_experts
            and not any(rank.prepared or rank.preparing for rank in self.processes.values())
        )

    def check_end(self) -> None:
        coordinator, phase = self.coordinator, self.coordinator._cluster.membership.phase
        if self.over:
            return
        if self.dead is not None:
            if coordinator.desired - coordinator.left_out:
                raise Violation(f"the service stops although it could go on: {self.dead}")
            return
        if not self.well():
            raise Violation(
                f"it does not get well: phase {phase.value}, members "
                f"{sorted(coordinator.members)}, desired {sorted(coordinator.desired)}, "
                f"unanswered {sorted(self.open)}"
            )
        if set(self.processes) != set(coordinator.members):
            raise Violation(f"processes {sorted(self.processes)}, {sorted(coordinator.members)}")
        for view in coordinator.ranks() if self.machines else ():
            if view.machine != self.machine_of[self.processes[view.id].life]:
                raise Violation(f"rank {view.id} is shown on machine {view.machine!r}")
        for operation in coordinator.unfinished():
            raise Violation(f"operation {operation.id} never ends")


class SmallRanks(MemoryBudget):
    """Experts in place of bytes, on a machine that has room for any number of ranks."""

    def planned(self, placement: Placement, previous: Placement | None = None) -> dict[int, int]:
        return {rank: placement.count(rank) for rank in placement.ranks}

    def check_free(self, needs: dict[int, int]) -> None:
        return None

    @property
    def expert_bytes(self) -> int:
        return 1

    def check_moves(self, experts: int) -> None:
        return None


# What happens in the head's process.
HEADS = {
    Timer.fire,
    Simulation.arrives,
    Simulation.disconnected,
    Simulation.ended,
    Simulation.beat,
    Simulation.ask,
    Simulation.give_up,
    Simulation.change,
    Simulation.rebalance,
}


def history(seed: int, trace: bool = False) -> Simulation:
    """Raises: Violation, with the seed in it."""
    from support.simulated_crashes import CRASHES_FROM, CrashingSimulation

    made = (CrashingSimulation if seed >= CRASHES_FROM else Simulation)(seed, trace)
    try:
        made.run()
    except Exception as error:  # one of the control plane's own is a violation, too
        what = error if isinstance(error, Violation) else repr(error)
        raise Violation(f"seed {seed}, at {made.clock:.3f} s: {what}") from error
    return made


def prepare() -> None:
    """For a process that runs many: they warn by the thousand, and keep nothing."""
    logging.getLogger("flexpert").setLevel(logging.CRITICAL)
    gc.freeze()


def histories(seeds: range) -> int:
    """Runs them; how many steps they took. Raises: Violation"""
    return sum(history(seed).steps for seed in seeds)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("count", type=int, nargs="?", default=1000)
    parser.add_argument("--first", type=int, default=0, help="seed to begin with")
    parser.add_argument("--trace", type=int, metavar="SEED", help="print what happens in one")
    given = parser.parse_args()
    if given.trace is not None:
        history(given.trace, trace=True)
        return 0
    prepare()
    began, steps, violations = time.process_time(), 0, 0
    for done in range(1, given.count + 1):
        try:
            steps += history(given.first + done - 1).steps
        except Violation as error:
            violations += 1
            print(error, flush=True)
        if done % REPORT_EVERY == 0 or done == given.count:
            rate = done / (time.process_time() - began)
            print(
                f"{done} histories, {steps} steps, {rate:.0f} a second of processor time: "
                f"{violations or 'no'} violation{'s' if violations > 1 else ''}",
                flush=True,
            )
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
