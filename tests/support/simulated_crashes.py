"""Histories in which the head's process ends, at any event of its own, and another goes on.

A disk has what was written at once, and what was noted a batch ago; the rest is lost with the head.
Ranks go on alone, and keep what they have published until it is written. The next head takes them
over as in life (`RankTakeover`, `resumption`), and clients ask again for what they have not got.
Some hand over instead: then all is on the disk, and another head is there at once.
What must hold besides: no request is lost, no token that somebody has is taken back while the rank
that said it lives, and no operation is forgotten.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial

from flexpert.cluster.admission import Admission
from flexpert.cluster.coordinator import Coordinator
from flexpert.cluster.journal import Entry, Journal
from flexpert.cluster.rank_takeover import RankTakeover
from flexpert.cluster.resumption import restore_requests, worth_keeping
from flexpert.cluster.saved_state import SavedCluster, SavedOperation, SavedRequest
from flexpert.engine import rank_protocol as msg
from flexpert.engine.request import RequestSequence, SamplingParams, TokenEvent
from support.simulated_network import Timer
from support.simulated_rank import SimRank, Violation
from support.simulation import CONFIGS, SOURCE, TROUBLE_S, Simulation, SmallRanks

CRASHES_FROM = 20_000  # the first seed of such a history
BATCH_S = 0.05
ATTACH_S = 5.0
MOST_EVENTS_BETWEEN = 150  # of the head, from its beginning to its crash
MOST_CRASHES = 3
HANDED = 0.3  # of the heads


class CrashingSimulation(Simulation):
    """heads: how many there were before this one. away: there is none now."""

    def __init__(self, seed: int, trace: bool = False) -> None:
        super().__init__(seed, trace)
        self.hostile, self.machines = False, ()  # what quarantine knows ends with a head
        self.config = CONFIGS[seed % len(CONFIGS)]
        self.fate = random.Random(seed)
        self.ways = random.Random(seed + 1)  # apart, so that fates stay what they were
        self.handed = False  # by the head before
        self.heads = 0
        self.away = False
        self.takeover: RankTakeover | None = None
        self.crash_in = self.fate.randint(1, MOST_EVENTS_BETWEEN)
        self.pending: list[Callable[[], None]] = []  # writes of the batch
        self.disk: SavedCluster | None = None
        self.operations: dict[str, SavedOperation] = {}
        self.requests: dict[str, tuple[RequestSequence, list[TokenEvent]]] = {}
        self.counts: dict[int, int] = {}  # `Published` that were heard, of each life
        self.hears_of: dict[int, int] = {}  # life of a rank → the head that it is connected to
        self.begin_head()

    def begin_head(self) -> None:
        self.journal = Journal()
        self.journal.log = self
        self.admission = Admission(self.journal, lambda: self.coordinator.admitting, self.send)
        self.coordinator = Coordinator(self.config, SOURCE, self, SmallRanks(self.config, SOURCE))

    # ---- the disk -------------------------------------------------------------------------------

    saves = True

    def note_down(self, write: Callable[[], None], *, urgent: bool = False) -> None:
        if not self.pending:
            self.call_later(BATCH_S, self.write)
        self.pending.append(write)
        if urgent:
            self.write()

    def write(self) -> None:
        for write in self.pending:
            write()
        self.pending = []
        for life, count in self.counts.items():
            for process in self.processes.values():
                if process.life == life:
                    self.send(process.id, msg.Persisted(count))

    def save_cluster(self, record: SavedCluster, *, urgent: bool) -> None:
        self.note_down(lambda: setattr(self, "disk", record), urgent=urgent)

    def save_operation(self, record: SavedOperation, *, urgent: bool) -> None:
        self.note_down(lambda: self.operations.__setitem__(record.view.id, record), urgent=urgent)

    def forget_operation(self, operation_id: str) -> None:
        self.note_down(lambda: self.operations.pop(operation_id, None))

    def opened(self, sequence: RequestSequence) -> None:
        self.note_down(lambda: self.requests.__setitem__(sequence.id, (sequence, [])))

    def published(self, event: TokenEvent) -> None:
        self.note_down(lambda: self.requests[event.id][1].append(event))

    def closed(self, sequence_id: str) -> None:
        self.note_down(lambda: self.requests.pop(sequence_id, None))

    # ---- one head after the other ---------------------------------------------------------------

    def call_later(self, delay_s: float, action: Callable[[], None]) -> Timer:
        """Timers end with their head."""
        head = self.heads

        def fire() -> None:
            if head == self.heads and not self.away:
                self.happens()
                if not self.away:
                    action()

        return super().call_later(delay_s, fire)

    def happens(self) -> None:
        """An event of the head begins; it may not live to see it."""
        self.crash_in -= 1
        trouble = self.clock < TROUBLE_S and self.heads < MOST_CRASHES
        if self.crash_in <= 0 and trouble and not self.away and self.takeover is None:
            self.crash()

    def crash(self) -> None:
        self.handed = self.ways.random() < HANDED
        self.note("the head hands over" if self.handed else "the head ends")
        for write in self.pending if self.handed else []:
            write()
        self.away, self.deaf_until, self.quiet = True, self.clock, False
        self.pending, self.counts = [], {}
        self.heads += 1
        self.crash_in = self.fate.randint(1, MOST_EVENTS_BETWEEN)
        away_s = 3.0 * self.fate.random() ** 2
        self.call(away_s / 50 if self.handed else away_s, self.resume)

    def resume(self) -> None:
        self.note("another head begins")
        self.away = False
        self.begin_head()
        if self.disk is None:  # it had not begun
            self.coordinator.begin_first(3)
            return
        self.takeover = RankTakeover(
            attach=self.attach, kill=self.kill, call_later=self.call_later, done=self.taken_over
        )
        living = [rank for rank, process in self.processes.items() if process.alive]
        for rank in set(self.processes) - set(living):  # they are reaped before the head asks
            del self.processes[rank]
        self.takeover.begin(living, worth_keeping(self.disk), ATTACH_S)

    def attach(self, rank: int) -> None:
        self.send(rank, msg.Attach())

    def attaches(self, rank: SimRank) -> None:
        self.hears_of[rank.life] = self.heads
        hello = msg.Hello(rank.life, "here", rank.address, rank.address, rank.address)
        ids, published = list(rank.sequences), list(rank.unpersisted)
        self.tell(rank, msg.Attached(hello, ids, rank.persisted, published))

    def taken_over(self) -> None:
        assert self.takeover is not None
        assert self.disk is not None
        takeover, self.takeover = self.takeover, None
        attached = takeover.attached
        saved = [SavedRequest(*one) for one in list(self.requests.values())]
        entries, foreign = restore_requests(self.journal, saved, attached, self.cancelled)
        for rank, told in attached.items():
            life = self.processes[rank].life
            self.counts[life] = told.persisted + len(told.published)
        for rank, names in foreign.items():
            self.send(rank, msg.Abort(names))
        record, operations = self.disk, list(self.operations.values())
        before = {one.view.id for one in operations}
        self.coordinator.restore(
            record, operations, {rank: told.hello for rank, told in attached.items()}
        )
        if before - {one.view.id for one in self.coordinator.save_all()}:
            raise Violation("operations are forgotten")
        for rank, report in takeover.pending:
            self.judged(self.processes[rank], report)
        self.come_back(entries)
        self.admission.admit_waiting()

    def come_back(self, entries: list[Entry]) -> None:
        """Clients ask again."""
        known = {entry.request.id: entry for entry in entries}
        for name in list(self.open):
            entry = known.pop(name, None)
            if entry is None:
                if self.handed:
                    raise Violation(f"request {name} is lost in a takeover")
                self.ask_anew(name)
                continue
            had, self.answers[name] = self.answers[name], []
            self.open[name] = entry.stream
            entry.stream.listen(partial(self.receive, name))
            has = self.answers[name]
            if has[: len(had)] != had and (len(has) >= len(had) or self.handed):
                raise Violation(f"request {name} had {had}, now {has}")
        for name, entry in known.items():  # nobody comes back for them
            if not entry.finished:
                entry.stream.cancel()
            else:
                self.closed(name)

    def ask_anew(self, name: str) -> None:
        """It was lost before it was written down."""
        again = f"{name}/{self.heads}"
        tokens = self.desired.pop(name)
        del self.open[name], self.answers[name]
        self.answers[again], self.desired[again] = [], tokens
        params = SamplingParams(max_tokens=tokens, seed=0)
        entry = self.journal.open(again, [1], params, (), self.cancelled)
        self.open[again] = entry.stream
        entry.stream.listen(partial(self.receive, again))
        self.admission.admit(entry)

    # ---- what a head that is away does not hear -------------------------------------------------

    def tell(self, rank: SimRank, report: msg.Report) -> None:
        if isinstance(report, msg.Published):
            rank.unpersisted.append(report)
        if self.hears_of.setdefault(rank.life, self.heads) == self.heads and not self.away:
            self.carry(("up", rank.life), self.comes, rank, report, self.clock, self.heads)

    def comes(self, rank: SimRank, report: msg.Report, sent: float, head: int) -> None:
        if head != self.heads or self.away:
            return
        self.happens()
        if self.away:
            return
        if self.takeover is not None:
            if sent <= rank.lost_after and not self.forgotten(rank):
                self.takeover.on_report(rank.id, report)
            return
        heard = sent <= rank.lost_after and not self.forgotten(rank)
        if heard and isinstance(report, msg.Published):
            self.counts[rank.life] = self.counts.get(rank.life, 0) + 1
        self.arrives(rank, report, sent)

    def judged(self, rank: SimRank, report: msg.Report) -> None:
        if isinstance(report, msg.Published):
            self.counts[rank.life] = self.counts.get(rank.life, 0) + 1
        self.arrives(rank, report, self.clock)

    def disconnected(self, process: SimRank) -> None:
        process.lost_after = -1.0
        if self.takeover is not None:
            self.takeover.on_lost(process.id)
        elif not self.away and not self.forgotten(process):
            super().disconnected(process)

    def ended(self, process: SimRank) -> None:
        if self.forgotten(process):
            return
        if not self.away:
            self.happens()
        if self.away:
            del self.processes[process.id]
        elif self.takeover is not None:
            del self.processes[process.id]
            self.takeover.on_exit(process.id)
        else:
            super().ended(process)

    def beat(self) -> None:
        if not (self.away or self.takeover):
            super().beat()
        else:
            self.call(0.4, self.beat)

    def ask(self) -> None:
        if not (self.away or self.takeover):
            super().ask()

    def change(self) -> None:
        if not (self.away or self.takeover):
            super().change()

    def rebalance(self) -> None:
        if not (self.away or self.takeover):
            super().rebalance()

    def give_up(self) -> None:
        if self.away or self.takeover:
            if self.open:
                self.open.pop(self.draw.choice(list(self.open)))
        else:
            super().give_up()

    def well(self) -> bool:
        return not self.away and self.takeover is None and super().well()
