"""A rank as the head sees it: `engine/rank_engine.py` and `cluster/processes/rank_process.py`
without processes.

What it computes has no content and takes no time; when it hears, loads, copies, votes, switches,
publishes and breaks off is as there. A step is torn when a rank stops or ends in the middle of it:
peers that lack what it has not sent wait for it in the step, until it wakes or they are halted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from random import Random
from typing import Protocol

from flexpert.engine import rank_protocol as msg
from flexpert.engine.request import HeldKV, RequestSequence, TokenEvent

LOAD = msg.Load(0, 0, 0.0, 0)
MEMORY = msg.Memory(1, 1, 1, 1, 1)
NEVER_S = 1e9
EXCHANGE_TIMEOUT_S = 6.0  # longer than the stall timeout, as by default

Weights = frozenset[tuple[int, int]]  # (layer, expert)


class Violation(AssertionError):  # noqa: N818
    """An invariant does not hold."""


class World(Protocol):
    """What lies around a rank."""

    draw: Random
    clock: float

    def end(self, rank: SimRank, status: int) -> None: ...
    def call(self, delay_s: float, action: Callable[..., None], *args: object) -> None: ...
    def tell(self, rank: SimRank, report: msg.Report) -> None: ...
    def living(self, addresses: Iterable[bytes]) -> bool:
        """Whether all these processes live, as who connects to them finds out."""
        ...

    def enters(self, rank: SimRank, plan: msg.Prepare) -> None: ...
    def takes(self, rank: SimRank, sequence_id: str) -> None: ...
    def poisons(self, rank: SimRank) -> bool: ...
    def adopted(self, rank: SimRank, kv: bytes) -> None: ...
    def attaches(self, rank: SimRank) -> None:
        """It hears of a new head, behind all that the one before has sent."""
        ...

    def token(self, previous: int) -> int:
        """A token that is computed now, after `previous` (-1: the first)."""
        ...


class Running:
    """A sequence in a rank. last: its latest token, -1 before the first."""

    __slots__ = ("desired", "last", "length")

    def __init__(self, generated: list[int], desired: int) -> None:
        self.length = len(generated)
        self.last = generated[-1] if generated else -1
        self.desired = desired


class SimRank:
    """One life of a rank.

    well: nothing has been done to it. behind: in a torn step, who must wake for it to go on.
    owed: what is left of that step. inbox: what it will find when it wakes.
    """

    __slots__ = (
        "address",
        "alive",
        "armed",
        "behind",
        "cut_until",
        "entered",
        "entering",
        "epoch",
        "fetches",
        "hangs_since",
        "id",
        "inbox",
        "interrupted",
        "left",
        "lies",
        "life",
        "lost_after",
        "member",
        "on_trial",
        "owed",
        "persisted",
        "plan",
        "prepared",
        "preparing",
        "proven",
        "sequences",
        "status",
        "stopped",
        "stopped_at",
        "told",
        "unpersisted",
        "wait",
        "waiting",
        "weights",
        "well",
        "world",
    )

    def __init__(self, world: World, rank: int, life: int) -> None:
        self.world = world
        self.id = rank
        self.life = life
        self.address = str(life).encode()
        self.alive = True
        self.status = 0  # of its exit
        self.told = False  # that its connection has ended
        self.well = True
        self.proven = False
        self.lies = False
        self.on_trial: set[str] = set()
        self.stopped = False
        self.stopped_at = 0.0
        self.cut_until = 0.0  # its exchanges are held up
        self.hangs_since = float("inf")
        self.lost_after = float("inf")  # what it sent later went down with its connection
        self.member = False
        self.left = False
        self.entering = False
        self.epoch = 0  # the latest it was a member of
        self.entered = 0  # or left by
        self.armed = 0
        self.plan: msg.Prepare | None = None
        self.weights: Weights = frozenset()
        self.preparing: msg.Prepare | None = None
        self.prepared: tuple[msg.Prepare, Weights] | None = None
        self.sequences: dict[str, Running] = {}
        self.persisted = 0  # of all that it has published, by its head
        self.unpersisted: list[msg.Published] = []
        self.fetches: dict[int, msg.Fetch] = {}  # from these leavers
        self.inbox: list[Callable[[], None]] = []
        self.interrupted = False  # a halt is in it
        self.owed: Callable[[], None] | None = None
        self.behind: SimRank | None = None
        self.waiting = ""  # for peers in an exchange: "" not, "long", or one is "gone"
        self.wait = 0  # number of the wait

    @property
    def runs(self) -> bool:
        return self.alive and not self.stopped

    def hear(self, command: msg.Command) -> None:
        if not self.alive:
            return
        if self.stopped:
            self.inbox.append(partial(self.hear, command))
            self.interrupted |= isinstance(command, msg.Halt)
            return
        match command:
            case msg.Admit(sequences):
                self._take(sequences)
            case msg.Offer(epoch):
                if self.prepared and self.prepared[0].epoch == epoch:
                    self.world.tell(self, msg.Offered(epoch, self._held()))
            case msg.Fetch():
                if self.prepared and self.prepared[0].epoch == command.epoch:
                    slow = self.world.draw.random() < 0.02
                    seconds = 10.0 if slow else 0.05 * self.world.draw.random()
                    self.fetches[command.source] = command
                    self.world.call(seconds, self._fetched, command)
            case msg.Adopt():
                self._adopt(command)
            case msg.Abort(ids):
                for name in ids:
                    self.sequences.pop(name, None)
            case msg.Prepare():
                self._forget()
                self.preparing = command
                self._load(command)
            case msg.Commit(epoch):
                if self.prepared is None or self.prepared[0].epoch != epoch:
                    raise Violation(f"rank {self.id} is told to commit {epoch}, unprepared")
                self.armed = epoch
                if not self.member:
                    self.switch()
            case msg.Cancel(epoch):
                if self.armed != epoch:
                    self._forget()
            case msg.Halt(epoch):
                self.world.tell(self, msg.Halted(epoch))
                self._forget()
                self.armed, self.entering = 0, False
                self._leave()
            case msg.Hold():
                pass  # it has left its epoch and waits for the next one anyway
            case msg.Stop():
                self.world.end(self, 0)
            case msg.Persisted(count):
                while self.persisted < count and self.unpersisted:
                    self.unpersisted.pop(0)
                    self.persisted += 1
            case msg.Attach():
                self.world.attaches(self)

    def _take(self, sequences: list[RequestSequence]) -> None:
        if self.left:
            held = [HeldKV(sequence.id, 0, []) for sequence in sequences]
            self.world.tell(self, msg.HandedOver(self.epoch, held))
            return
        for sequence in sequences:
            self.world.takes(self, sequence.id)
            assert sequence.params.max_tokens is not None
            running = Running(sequence.generated, sequence.params.max_tokens)
            self.sequences[sequence.id] = running
            if sequence.on_trial:
                self.on_trial.add(sequence.id)

    def _held(self) -> list[HeldKV]:
        """In place of blocks, the latest token that was computed: it names all before it."""
        return [
            HeldKV(name, running.length, [running.last] if running.length else [])
            for name, running in self.sequences.items()
        ]

    def _fetched(self, fetch: msg.Fetch) -> None:
        if not self.alive or self.fetches.get(fetch.source) is not fetch:
            return
        if self.stopped:
            self.inbox.append(partial(self._fetched, fetch))
            return
        self.world.tell(self, msg.Fetched(fetch.epoch, fetch.source, 0))

    def _adopt(self, command: msg.Adopt) -> None:
        self.world.adopted(self, command.kv)
        self._take([move.sequence for move in command.migrations])
        if self.left:
            return
        fetch = self.fetches.pop(command.source, None)
        ahead = {move.held.id: move.held for move in fetch.migrations} if fetch else {}
        for move in command.migrations:
            for held in (move.held, ahead.get(move.held.id)):
                named = held.blocks if held else []
                if held and named and move.sequence.generated[held.computed - 1] != named[0]:
                    raise Violation(f"{held.id} goes on from the KV of other tokens")
        self.world.tell(self, msg.Adopted(command.source, len(command.migrations), 0, 0))

    def _forget(self) -> None:
        """Back to how it was before it was told to prepare."""
        self.prepared = self.preparing = None
        self.fetches.clear()

    # ---- epochs ---------------------------------------------------------------------------------

    def _load(self, plan: msg.Prepare) -> None:
        seconds = 0.001 + 0.1 * self.world.draw.random()
        if self.world.draw.random() < 0.015:
            seconds = NEVER_S if self.world.draw.random() < 0.5 else 10.0
            self.well = False
        if self.id in plan.members:
            seconds = max(seconds, self.cut_until - self.world.clock)
        self.world.call(seconds, self._loaded, plan)

    def _loaded(self, plan: msg.Prepare) -> None:
        if self.preparing is not plan or not self.alive:
            return
        if self.stopped:
            self.inbox.append(partial(self._loaded, plan))
            return
        self.preparing = None
        held: Weights = frozenset()
        if self.id in plan.members:
            if not self.world.living(plan.members.values()):
                self.world.tell(self, msg.Failed(plan.epoch, "a peer cannot be reached"))
                return
            if self.world.draw.random() < 0.02:
                self.world.tell(self, msg.Failed(plan.epoch, "the checkpoint cannot be read"))
                return
            desired = weights_of(plan, self.id)
            read = desired - self.weights
            held = (self.weights & desired) | read
        self.prepared = plan, held
        self.world.tell(self, msg.Prepared(plan.epoch, 0, MEMORY))

    def switch(self) -> None:
        """Leave the old epoch and enter the prepared one."""
        assert self.prepared is not None
        (plan, weights), self.prepared, self.armed = self.prepared, None, 0
        self.world.enters(self, plan)
        self.entered = plan.epoch
        self._through()
        if self.id not in plan.members:
            self.member, self.left = False, True
            held, self.sequences = self._held(), {}
            self.world.tell(self, msg.HandedOver(plan.epoch, held))
            return
        self.epoch, self.plan, self.weights = plan.epoch, plan, weights
        self.member = self.entering = True

    def _leave(self) -> None:
        """The epoch is broken for this rank: it waits outside for the next one."""
        self.member = False
        self._through()

    def _through(self) -> None:
        self.owed, self.behind, self.waiting = None, None, ""
        self.wait += 1

    # ---- steps ----------------------------------------------------------------------------------

    @property
    def votes(self) -> bool:
        """Whether it begins a vote; a rank without a reason sleeps until a peer does."""
        return bool(self.sequences or self.armed or self.entering or self.owed)

    def voted(self) -> None:
        """All votes of a round are there."""
        self.waiting = ""
        self.wait += 1
        if self.entering:
            self.entering = False
            self.world.tell(self, msg.Switched(self.epoch, 0.0, LOAD))

    def publish(self) -> None:
        """The step is whole."""
        self._through()
        if self.world.poisons(self):
            return
        events = []
        for name, running in list(self.sequences.items()):
            running.last = self.world.token(running.last)
            last = running.length + 1 >= running.desired
            finish = "length" if last else None
            events.append(TokenEvent(name, running.length, [running.last], None, finish))
            running.length += 1
            if last:
                del self.sequences[name]
        if events:
            self.world.tell(self, msg.Published(events, LOAD))

    def waits(self, missing: Iterable[bytes]) -> None:
        """Some peers do not take part. An end is seen soon, silence when the exchange's time is up.

        missing: addresses of peers whose processes have exited.
        """
        if missing and self.waiting != "gone":
            self.waiting = "gone"
            self.world.call(0.001 + 0.02 * self.world.draw.random(), self._breaks_off, self.wait)
        elif not self.waiting:
            self.waiting = "long"
            limit_s = EXCHANGE_TIMEOUT_S + 0.1 * self.world.draw.random()
            self.world.call(limit_s, self._breaks_off, self.wait)

    def _breaks_off(self, wait: int) -> None:
        if not self.alive or not self.member or wait != self.wait:
            return
        if self.stopped:
            self.inbox.append(partial(self._breaks_off, wait))
            return
        self._leave()
        self.world.tell(self, msg.Broken(self.epoch, [], "a peer does not answer"))

    # ---- faults ---------------------------------------------------------------------------------

    def stop(self, now: float) -> None:
        """As by SIGSTOP."""
        self.stopped, self.stopped_at, self.well = True, now, False

    def wake(self) -> bool:
        """Returns whether it has sent what it owed to its peers.

        The step it stopped in goes on, unless a halt has come and is seen first.
        """
        self.stopped = False
        goes_on = self.owed is not None and self.behind is None
        if goes_on and self.interrupted:
            goes_on = self.world.draw.random() < 0.5
        self.interrupted = False
        if goes_on and self.owed:
            self.owed()
        inbox, self.inbox = self.inbox, []
        for action in inbox:
            action()
        return goes_on


def weights_of(plan: msg.Prepare, rank: int) -> Weights:
    """The experts that a plan gives to a rank."""
    held = plan.placement.held_by(rank)
    return frozenset((layer, expert) for layer, experts in enumerate(held) for expert in experts)
