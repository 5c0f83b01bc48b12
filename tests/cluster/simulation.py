"""A simulated cluster: the real coordinator, table and journal; simulated ranks and time.

    python tests/cluster/simulation.py 1000        # that many histories, from seed 0
    python tests/cluster/simulation.py --trace 17  # what happens in one

A history is a function of its seed: when messages arrive (in order on each link, in any order
between links), who is killed, stopped and woken, what fails to start or to load, what is asked for.
Ranks behave as `engine/rank.py` and `cluster/rank_process.py` do, with steps of no duration: all
members of an epoch vote; if all are armed for the same next epoch they switch, else each publishes
a token of every sequence it runs; if one of them is gone, the others report a broken exchange.
"""

from __future__ import annotations

import argparse
import heapq
import logging
import random
import time
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

from flexpert.cluster import messages as msg
from flexpert.cluster.coordinator import Coordinator
from flexpert.cluster.journal import Entry, Journal
from flexpert.cluster.membership import Phase
from flexpert.cluster.views import ClusterEvent, Delta
from flexpert.config import load_config
from flexpert.engine.request import HeldKV, Move, SamplingParams, Sequence, TokenEvent
from flexpert.errors import FlexpertError, OperationConflict, OperationRefused

TROUBLE_S = 30.0  # of a history; then faults stop
PATIENCE_S = 400.0  # until all must be well again
LOAD = msg.Load(0, 0, 0.0, 0)
MEMORY = msg.Memory(1, 1, 1, 1, 1)
CONFIG = load_config(
    environment={},
    overrides={
        "cluster.ranks": 3,
        "cluster.max_ranks": 6,
        "cluster.start_timeout_s": 20.0,
        "cluster.load_timeout_s": 20.0,
        "cluster.commit_timeout_s": 20.0,
        "cluster.stall_timeout_s": 4.0,
        "cluster.redundant_experts": 2,
        "cluster.restart_limit": 50,  # faults come faster than in life
    },
)
SOURCE: Any = SimpleNamespace(info=SimpleNamespace(experts=5, moe_layers=2))


class Violation(AssertionError):  # noqa: N818
    """An invariant does not hold."""


class Timer:
    __slots__ = ("action",)

    def __init__(self, action: Callable[[], None] | None) -> None:
        self.action = action

    def cancel(self) -> None:
        self.action = None


class SimRank:
    """One life of a rank."""

    def __init__(self, rank: int, life: int) -> None:
        self.id = rank
        self.life = life
        self.alive = True
        self.stopped = False
        self.proven = False
        self.member = False
        self.left = False
        self.entering = False
        self.broken = False  # it has reported that the epoch is
        self.epoch = 0
        self.armed = 0
        self.plan: msg.Prepare | None = None  # of its epoch
        self.preparing: msg.Prepare | None = None
        self.prepared: msg.Prepare | None = None
        self.sequences: dict[str, tuple[Sequence, int]] = {}  # and how many tokens it has
        self.inbox: list[msg.Command] = []  # while it is stopped

    @property
    def runs(self) -> bool:
        return self.alive and not self.stopped


class Simulation:
    """One history; also the coordinator's ports."""

    def __init__(self, seed: int, trace: bool = False) -> None:
        self.draw = random.Random(seed)
        self.trace = trace
        self.clock = 0.0
        self.events: list[tuple[float, int, Timer]] = []
        self.number = 0
        self.lives = 0
        self.processes: dict[int, SimRank] = {}  # until their end was told
        self.arrival: dict[tuple[str, int], float] = {}  # of the last message on a link
        self.journal = Journal()
        self.answers: dict[str, list[int]] = {}
        self.wanted: dict[str, int] = {}  # tokens of each request that was not cancelled
        self.finished: set[str] = set()
        self.dead: str | None = None
        self.stepped: dict[int, int] = {}  # by id, the latest epoch that has run a step
        self.plans: dict[int, msg.Prepare] = {}  # those that were entered
        self.steps = 0
        self.coordinator = Coordinator(CONFIG, SOURCE, self)
        self.coordinator._check_memory = lambda *_: None  # type: ignore[method-assign]

    # ---- time and the network -----------------------------------------------------------------

    def now(self) -> float:
        return self.clock

    def call_later(self, delay_s: float, action: Callable[[], None]) -> Timer:
        timer = Timer(action)
        self.number += 1
        heapq.heappush(self.events, (self.clock + delay_s, self.number, timer))
        return timer

    def note(self, *what: object) -> None:
        if self.trace:
            print(f"{self.clock:8.3f}", *what)

    def chance(self, share: float) -> bool:
        return self.draw.random() < share

    def carry(self, link: tuple[str, int], action: Callable[[], None]) -> None:
        delay = self.draw.choice((0.0005, 0.001, 0.01, 0.3 if self.chance(0.1) else 0.002))
        at = max(self.arrival.get(link, 0.0), self.clock + delay)
        self.arrival[link] = at
        self.call_later(at - self.clock, action)

    def send(self, rank: int, command: msg.Command) -> None:
        process = self.processes.get(rank)
        if process is None or not process.proven:
            return
        self.note("head →", rank, type(command).__name__, getattr(command, "epoch", ""))
        self.carry(("down", process.life), lambda: self.command(process, command))

    def tell(self, process: SimRank, report: msg.Report) -> None:
        def arrive() -> None:
            if self.processes.get(process.id) is not process:
                return  # its end was told: whoever comes under its id must prove itself first
            if isinstance(report, msg.Hello):
                process.proven = True
            self.note("head ←", process.id, type(report).__name__, getattr(report, "epoch", ""))
            if isinstance(report, msg.Published):
                for event in report.events:
                    self.journal.publish(process.id, event)
            self.coordinator.on_report(process.id, report)

        self.carry(("up", process.life), arrive)

    # ---- ports --------------------------------------------------------------------------------

    def spawn(self, rank: int) -> None:
        if rank in self.processes:
            raise Violation(f"id {rank} is started again while its old process may live")
        self.lives += 1
        process = self.processes[rank] = SimRank(rank, self.lives)
        self.note("spawn", rank)
        if self.chance(0.05):
            self.call_later(0.01, lambda: self.end(process, 1))
            return
        hello = msg.Hello("", process.life, "here", str(process.life).encode(), b"", b"")
        delay = 30.0 if self.chance(0.02) else self.draw.uniform(0.05, 0.3)
        self.call_later(delay, lambda: self.tell(process, hello) if process.runs else None)

    def kill(self, rank: int) -> None:
        process = self.processes.get(rank)
        if process:
            self.end(process, -9)

    def end(self, process: SimRank, status: int) -> None:
        if not process.alive:
            return
        process.alive = False
        self.note("ends", process.id, status)
        self.call_later(self.draw.uniform(0.0005, 0.01), lambda: self.ended(process, status))
        for other in self.processes.values():
            if other.runs and other.member and other.plan and process.id in other.plan.members:
                at = self.draw.uniform(0.001, 0.02)
                self.call_later(at, lambda other=other: self.lost(other, process))  # type: ignore[misc]

    def lost(self, reason: Any, process: SimRank | None = None) -> None:  # type: ignore[override]
        """The port: the service gives up. With a process: a rank's exchange misses that one."""
        if process is None:
            self.dead = str(reason)
            self.journal.fail_all(FlexpertError(self.dead))
            return
        rank: SimRank = reason
        plan = rank.plan
        if not rank.runs or not rank.member or plan is None or rank.broken:
            return
        if plan.members.get(process.id) == str(process.life).encode():
            rank.broken, rank.member = True, False
            self.tell(rank, msg.Broken(rank.epoch, [process.id], "lost"))

    def ended(self, process: SimRank, status: int) -> None:
        if self.processes.get(process.id) is process:
            del self.processes[process.id]
            self.coordinator.on_exit(process.id, status)

    def progress(self, rank: int) -> object:
        process = self.processes.get(rank)
        return self.clock if process and process.runs else None

    def bequeath(self, held: list[HeldKV], heirs: Iterable[int]) -> dict[int, list[Move]]:
        return self.journal.bequeath(held, heirs)

    def hand_over(
        self, rank: int, held: list[HeldKV], heirs: Iterable[int]
    ) -> dict[int, list[Move]]:
        return self.journal.hand_over(rank, held, heirs)

    def admit_waiting(self) -> None:
        for entry in self.journal.waiting():
            self.admit(entry)

    def admit(self, entry: Entry) -> None:
        rank = self.journal.assign(entry, self.coordinator.admitting)
        if rank is not None:
            self.send(rank, msg.Admit([entry.resume()]))

    def publish(self, event: ClusterEvent) -> None:
        self.note("event", event.kind, event.data if event.kind != "operation" else "")

    # ---- ranks --------------------------------------------------------------------------------

    def command(self, rank: SimRank, command: msg.Command) -> None:
        if not rank.alive:
            return
        if rank.stopped:
            rank.inbox.append(command)
            return
        match command:
            case msg.Prepare():
                rank.prepared, rank.preparing = None, command
                slow = 25.0 if self.chance(0.01) else self.draw.uniform(0.001, 0.1)
                self.call_later(slow, lambda: self.loaded(rank, command))
            case msg.Commit(epoch):
                if rank.prepared is None or rank.prepared.epoch != epoch:
                    self.tell(rank, msg.Failed(epoch, "not prepared"))
                else:
                    rank.armed = epoch
                    if not rank.member:
                        self.switch(rank)
            case msg.Cancel(epoch):
                if rank.armed != epoch:
                    rank.prepared = rank.preparing = None
            case msg.Admit(sequences):
                self.take(rank, sequences)
            case msg.Offer(epoch):
                if rank.prepared and rank.prepared.epoch == epoch:
                    self.tell(rank, msg.Offered(epoch, self.held(rank)))
            case msg.Fetch(epoch, source):
                slow = 25.0 if self.chance(0.01) else self.draw.uniform(0.001, 0.05)
                if rank.prepared and rank.prepared.epoch == epoch:
                    self.call_later(slow, lambda: self.fetched(rank, epoch, source))
            case msg.Adopt(source, _, moves):
                self.take(rank, [move.sequence for move in moves])
                if not rank.left:
                    self.tell(rank, msg.Adopted(source, len(moves), 0, 0))
            case msg.Abort(ids):
                for name in ids:
                    rank.sequences.pop(name, None)
            case msg.Halt(epoch):
                rank.prepared = rank.preparing = None
                rank.armed, rank.entering, rank.member = 0, False, False
                self.tell(rank, msg.Halted(epoch))
            case msg.Stop():
                self.end(rank, 0)

    def take(self, rank: SimRank, sequences: list[Sequence]) -> None:
        if rank.left:
            held = [HeldKV(sequence.id, 0, []) for sequence in sequences]
            self.tell(rank, msg.HandedOver(rank.epoch, held))
            return
        for sequence in sequences:
            rank.sequences[sequence.id] = (sequence, len(sequence.generated))

    def held(self, rank: SimRank) -> list[HeldKV]:
        return [HeldKV(name, length + 1, []) for name, (_, length) in rank.sequences.items()]

    def fetched(self, rank: SimRank, epoch: int, source: int) -> None:
        if rank.runs and rank.prepared and rank.prepared.epoch == epoch:
            self.tell(rank, msg.Fetched(epoch, source, 0))

    def loaded(self, rank: SimRank, plan: msg.Prepare) -> None:
        if not rank.runs or rank.preparing is not plan:
            return
        rank.preparing = None
        if rank.id in plan.members:
            there = {str(p.life).encode() for p in self.processes.values() if p.alive}
            if not set(plan.members.values()) <= there or self.chance(0.02):
                self.tell(rank, msg.Failed(plan.epoch, "a peer cannot be reached"))
                return
        rank.prepared = plan
        self.tell(rank, msg.Prepared(plan.epoch, 0, MEMORY))

    def switch(self, rank: SimRank) -> None:
        plan, rank.prepared, rank.armed = rank.prepared, None, 0
        assert plan is not None
        if plan.epoch <= rank.epoch:
            raise Violation(f"rank {rank.id} goes from epoch {rank.epoch} to {plan.epoch}")
        if self.plans.setdefault(plan.epoch, plan) != plan:
            raise Violation(f"epoch {plan.epoch} is not the same for all")
        if rank.id not in plan.members:
            rank.member, rank.left = False, True
            rank.epoch = plan.epoch
            held, rank.sequences = self.held(rank), {}
            self.tell(rank, msg.HandedOver(plan.epoch, held))
            return
        if plan.placement.missing():
            raise Violation(f"epoch {plan.epoch} has no owner of {plan.placement.missing()}")
        if not set(plan.placement.ranks) <= set(plan.members):
            raise Violation(f"epoch {plan.epoch} has owners who are no members")
        rank.epoch, rank.plan = plan.epoch, plan
        rank.member, rank.entering, rank.broken = True, True, False

    def step(self) -> None:
        """Each epoch whose members are all there does one round."""
        groups: dict[int, list[SimRank]] = {}
        for rank in self.processes.values():
            if rank.runs and rank.member:
                groups.setdefault(rank.epoch, []).append(rank)
        for epoch, ranks in sorted(groups.items()):
            plan = ranks[0].plan
            assert plan is not None
            there = {rank.id: str(rank.life).encode() for rank in ranks}
            if there != dict(plan.members):
                continue  # they wait, until they hear of it or are halted
            for rank in there:
                # where nobody stays, newcomers may begin while the old ones end
                if epoch < self.stepped.get(rank, 0):
                    raise Violation(f"rank {rank} runs epoch {epoch} after {self.stepped[rank]}")
                self.stepped[rank] = epoch
            self.steps += 1
            for rank in ranks:
                if rank.entering:
                    rank.entering = False
                    self.tell(rank, msg.Switched(epoch, 0.0, LOAD))
            armed = {rank.armed for rank in ranks}
            if len(armed) == 1 and armed != {0}:
                # one may die right after its vote: some have seen all votes, some have not
                torn = self.draw.choice(ranks) if self.chance(0.05) else None
                for rank in ranks:
                    if torn is None or rank is torn or self.chance(0.5):
                        self.switch(rank)
                if torn:
                    self.end(torn, -9)
                continue
            for rank in ranks:
                self.compute(rank)

    def compute(self, rank: SimRank) -> None:
        events = []
        for name, (sequence, length) in list(rank.sequences.items()):
            assert sequence.params.max_tokens is not None
            last = length + 1 >= sequence.params.max_tokens
            events.append(
                TokenEvent(
                    id=name,
                    position=length,
                    tokens=[length],
                    logprobs=None,
                    finish="length" if last else None,
                )
            )
            rank.sequences[name] = (sequence, length + 1)
            if last:
                del rank.sequences[name]
        if events:
            self.tell(rank, msg.Published(events, LOAD))

    # ---- people and faults ----------------------------------------------------------------------

    def ask(self) -> None:
        name = f"r{len(self.answers)}"
        tokens = self.draw.randint(1, 60)
        params = SamplingParams(max_tokens=tokens, seed=0)
        entry = self.journal.open(name, [1], params, (), lambda _: None)
        self.answers[name] = []
        self.wanted[name] = tokens
        entry.stream.put = lambda item: self.receive(name, item)  # type: ignore[method-assign]
        self.admit(entry)

    def receive(self, name: str, item: Delta | FlexpertError) -> None:
        if isinstance(item, FlexpertError):
            if self.dead is None:
                raise Violation(f"request {name} failed: {item}")
            self.finished.add(name)
            return
        answer = self.answers[name]
        if name in self.finished or item.tokens != [len(answer)]:
            raise Violation(f"request {name} gets {item.tokens} after {len(answer)} tokens")
        answer += item.tokens
        if item.finish is not None:
            if len(answer) != self.wanted[name]:
                raise Violation(f"request {name} ends after {len(answer)} tokens")
            self.finished.add(name)

    def give_up(self) -> None:
        """A client goes away."""
        open_ones = [name for name in self.answers if name not in self.finished]
        if not open_ones:
            return
        name = self.draw.choice(open_ones)
        rank = self.journal.rank_of(name)
        self.journal.close(name)
        self.finished.add(name)
        if rank is not None:
            self.send(rank, msg.Abort([name]))

    def change(self) -> None:
        coordinator = self.coordinator
        try:
            if self.chance(0.2) and coordinator.running:
                coordinator.cancel(coordinator.running.id)
            elif self.chance(0.5):
                coordinator.begin(ranks=self.draw.randint(1, 5))
            else:
                members = sorted(coordinator.members)
                gone = self.draw.sample(members, min(len(members), self.draw.randint(0, 2)))
                coordinator.begin(add=self.draw.randint(0, 2), remove=gone)
        except (OperationConflict, OperationRefused):
            pass

    def fault(self) -> None:
        alive = [process for process in self.processes.values() if process.alive]
        if not alive:
            return
        victim = self.draw.choice(alive)
        if self.chance(0.6):
            self.end(victim, -9)
        elif not victim.stopped:
            self.note("stops", victim.id)
            victim.stopped = True
            if self.chance(0.5):
                self.call_later(self.draw.uniform(0.1, 8.0), lambda: self.wake(victim))

    def wake(self, rank: SimRank) -> None:
        if not rank.alive or not rank.stopped:
            return
        self.note("wakes", rank.id)
        rank.stopped = False
        inbox, rank.inbox = rank.inbox, []
        for command in inbox:
            self.command(rank, command)
        for process in list(self.processes.values()):
            if not process.alive:
                self.lost(rank, process)

    def beat(self) -> None:
        """All that run have said so since the coordinator looked last."""
        for rank, record in self.coordinator._ranks.items():
            process = self.processes.get(rank)
            if process and process.runs and process.proven:
                record.heard, record.progress = self.clock, None

    # ---- a history ------------------------------------------------------------------------------

    def run(self) -> None:
        """Raises: Violation"""
        self.coordinator.begin_first(3)
        plan = ((self.ask, 0.4), (self.fault, 2.5), (self.change, 2.0), (self.give_up, 5.0))
        for action, mean in plan:
            at = self.draw.expovariate(1 / mean)
            while at < TROUBLE_S:
                self.call_later(0.5 + at, action)
                at += self.draw.expovariate(1 / mean)
        next_step = 0.0
        while self.events and self.clock < TROUBLE_S + PATIENCE_S and self.dead is None:
            at, _, timer = heapq.heappop(self.events)
            if at >= next_step:
                self.clock = max(self.clock, next_step)
                self.step()
                # nothing else moves until `at`: steps in between need no clock of their own
                next_step = at + 0.02
            self.clock = max(self.clock, at)
            if timer.action:
                self.beat()
                timer.action()
            if self.clock > TROUBLE_S + 1.0 and self.well():
                break
        self.check_end()

    def well(self) -> bool:
        coordinator = self.coordinator
        return (
            coordinator._membership.phase is Phase.IDLE
            and coordinator.running is None
            and self.finished >= set(self.answers)
            and coordinator.members == coordinator.wanted - coordinator.left_out
        )

    def check_end(self) -> None:
        coordinator = self.coordinator
        if not coordinator.wanted:
            return  # it never came up: the head says so and ends
        if self.dead is not None:
            if coordinator.wanted - coordinator.left_out:
                raise Violation(f"the service stops although it could go on: {self.dead}")
            return
        if not self.well():
            left = sorted(set(self.answers) - self.finished)
            raise Violation(
                f"it does not get well: phase {coordinator._membership.phase.value}, members "
                f"{sorted(coordinator.members)}, wanted {sorted(coordinator.wanted)}, "
                f"unanswered {left}"
            )
        if set(self.processes) != set(coordinator.members):
            raise Violation(f"processes {sorted(self.processes)}, {sorted(coordinator.members)}")
        for operation in coordinator._operations.values():
            if not operation.over.is_set():
                raise Violation(f"operation {operation.id} never ends")


def history(seed: int, trace: bool = False) -> Simulation:
    """Raises: Violation, with the seed in it."""
    made = Simulation(seed, trace)
    try:
        made.run()
    except Violation as error:
        raise Violation(f"seed {seed}, at {made.clock:.3f} s: {error}") from error
    return made


def histories(seeds: range) -> int:
    """Runs them; how many steps they took. Raises: Violation"""
    logging.getLogger("flexpert").setLevel(logging.CRITICAL)
    return sum(history(seed).steps for seed in seeds)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("count", type=int, nargs="?", default=1000)
    parser.add_argument("--first", type=int, default=0, help="seed to begin with")
    parser.add_argument("--trace", type=int, metavar="SEED", help="print what happens in one")
    given = parser.parse_args()
    if given.trace is not None:
        history(given.trace, trace=True)
    else:
        began = time.perf_counter()
        steps = histories(range(given.first, given.first + given.count))
        rate = given.count / (time.perf_counter() - began)
        print(f"{given.count} histories, {steps} steps, {rate:.0f} a second: no violation")
