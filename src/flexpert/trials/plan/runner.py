"""Takes rank processes through the phases of a plan and judges what they saw."""

from __future__ import annotations

import contextlib
import random
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from statistics import median
from typing import Any, TypeVar

from flexpert.bench.processes import forks
from flexpert.bench.processes.connection import Closed
from flexpert.bench.processes.socket_store import StoreServer
from flexpert.comm.agreement import View
from flexpert.comm.buffer import Channel, Scales
from flexpert.trials.plan import worker
from flexpert.trials.plan.oracle import Sizes
from flexpert.trials.plan.plan_file import PlanPhase
from flexpert.trials.plan.worker import (
    POINTS,
    SIGNALS,
    Answer,
    BeginWorker,
    Command,
    Connect,
    Disconnect,
    Done,
    Dying,
    Exchanged,
    ExchangeTask,
    Leave,
    Point,
    Setup,
    WorkerOutcome,
    WorkerReady,
    WorkerTask,
)

T = TypeVar("T")

START_S = 60.0
ANSWER_S = 20.0  # beyond what a phase's own limits add up to


@dataclass(frozen=True, slots=True)
class Options:
    sizes: Sizes
    channel: Channel = "auto"
    fp8: Scales | None = None
    exchanges: int = 10
    timeout_s: float = 2.0
    kill: str = "sigkill"
    at: Point = "random"
    seed: int = 0


@dataclass(slots=True)
class PhaseResult:
    """Times in seconds; None where nothing of the kind happened. errors: empty if all was right.

    connect_s: the slowest rank's, without the start of processes. rejoin_s: with it.
    """

    phase: str
    ranks: tuple[int, ...]
    killed: tuple[int, ...]
    errors: list[str] = field(default_factory=list)
    connect_s: float | None = None
    rejoin_s: float | None = None
    disconnect_s: float | None = None
    detect_s: list[float] = field(default_factory=list)
    agree_s: float | None = None
    commit_s: float | None = None
    exchanges: int = 0
    exchange_s: float | None = None
    gigabytes_per_s: float | None = None
    bytes_sent: int = 0
    bytes_undeduplicated: int = 0


class PlanFailed(Exception):  # noqa: N818
    """A rank did not answer, or answered with an error; the rest of the plan makes no sense."""


class _Rank:
    def __init__(self, rank: int, setup: Setup, store: StoreServer) -> None:
        self.rank = rank
        self.doing = "starting"
        self.process = forks.start(f"{worker.__name__}:serve", store.hand_out())
        self.say(BeginWorker(rank, setup))

    def ask(self, command: Command) -> None:
        self.doing = type(command).__name__.lower()
        self.say(command)

    def say(self, command: Command) -> None:
        with contextlib.suppress(Closed):  # it has ended; whoever listens finds out
            self.process.connection.send(worker.encode(command))

    def heard(self, timeout_s: float = 0.0) -> Answer:
        """Raises: Closed, TimeoutError"""
        return worker.decode_answer(self.process.connection.receive(timeout_s))

    def signal(self, number: int) -> None:
        self.process.signal(number)

    def end(self) -> None:
        self.process.end()


class Runner:
    """One run of a plan. A context manager: leaving it ends every process."""

    def __init__(self, options: Options, capacity: int) -> None:
        self.options = options
        self.store = StoreServer()
        self.setup = Setup(
            sizes=options.sizes,
            capacity=capacity,
            channel=options.channel,
            fp8=options.fp8,
            exchanges=options.exchanges,
            timeout_s=options.timeout_s,
            connect_s=max(15.0, 4 * options.timeout_s),
            seed=options.seed,
        )
        self.draw = random.Random(options.seed)
        self.up: dict[int, _Rank] = {}
        self.stopped: list[_Rank] = []
        self.gone: set[int] = set()  # ids that the others have not let go of yet
        self.epoch = 0

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *_: object) -> None:
        for rank in (*self.up.values(), *self.stopped):
            rank.end()
        self.store.close()

    def run(
        self, plan: list[PlanPhase], progress: Callable[[PhaseResult], None]
    ) -> list[PhaseResult]:
        results: list[PhaseResult] = []
        before: set[int] = set()
        for number, phase in enumerate(plan):
            result = PhaseResult(str(phase), phase.ranks, phase.kill)
            results.append(result)
            try:
                self.change(phase, result, rejoining=bool(before & set(phase.ranks) - set(self.up)))
                self.exchange(number, phase, result)
                if number == len(plan) - 1:
                    self.wake(result)
            except PlanFailed as error:
                result.errors.append(str(error))
                progress(result)
                break
            before |= set(phase.ranks)
            progress(result)
        return results

    # ---- between phases -----------------------------------------------------------------------

    def change(self, phase: PlanPhase, result: PhaseResult, *, rejoining: bool) -> None:
        """Let go of those that left or died; start those that come; connect all."""
        leaving = set(self.up) - set(phase.ranks)
        gone, self.gone = self.gone | leaving, set()
        if gone:
            for rank in self.up:
                leave = rank in leaving
                self.up[rank].ask(Leave() if leave else Disconnect(tuple(sorted(gone))))
            parted = self.answers(self.up, self.setup.connect_s + ANSWER_S, Done)
            result.disconnect_s = max((done.seconds for done in parted.values()), default=None)
        for rank in leaving:
            self.up.pop(rank).end()
        new = [rank for rank in phase.ranks if rank not in self.up]
        if not new:
            return
        began = time.monotonic()
        for rank in new:
            with _uninterrupted():  # a process that nobody knows would stay behind
                self.up[rank] = _Rank(rank, self.setup, self.store)
        self.answers(new, START_S, WorkerReady)
        for up in self.up.values():
            up.ask(Connect(phase.ranks))
        connected = self.answers(self.up, self.setup.connect_s + ANSWER_S, Done)
        took = max(done.seconds for done in connected.values())
        if rejoining:
            result.rejoin_s = time.monotonic() - began
        else:
            result.connect_s = took

    def wake(self, result: PhaseResult) -> None:
        """Ranks that were stopped find themselves evicted, and have changed nothing."""
        for rank in self.stopped:
            rank.signal(signal.SIGCONT)
        for rank in self.stopped:
            answer = self.hear(rank, self.limit())
            if not (isinstance(answer, Exchanged) and answer.outcome.evicted):
                result.errors.append(f"rank {rank.rank} woke and was not told: {answer}")
            rank.end()
        self.stopped.clear()

    # ---- a phase ------------------------------------------------------------------------------

    def exchange(self, number: int, phase: PlanPhase, result: PhaseResult) -> None:
        self.epoch += 1
        view = View(self.epoch, phase.ranks)
        own_points = self.options.at != "random"
        for rank in phase.ranks:
            task = WorkerTask(number, view, frozenset(phase.kill))
            if rank in phase.kill and own_points:
                at = self.draw.randrange(self.options.exchanges)
                task = replace(task, kill=SIGNALS[self.options.kill], point=self.options.at, at=at)
            self.up[rank].ask(ExchangeTask(task))
        sleeping, self.stopped = self.stopped, []
        for old in sleeping:  # in the middle of the others' exchanges
            old.signal(signal.SIGCONT)
        died = self.kill(phase) if not own_points else {}
        survivors = [rank for rank in phase.ranks if rank not in phase.kill]
        exchanged = self.answers(survivors, self.limit(), Exchanged)
        outcomes = {rank: answer.outcome for rank, answer in exchanged.items()}
        self.bury(phase, died)
        self.stopped, mine = sleeping, self.stopped
        self.wake(result)
        self.stopped = mine
        self.judge(phase, outcomes, died, result)

    def kill(self, phase: PlanPhase) -> dict[int, float]:
        """At a random moment; returns when."""
        died: dict[int, float] = {}
        for rank in phase.kill:
            time.sleep(self.draw.uniform(0.0, 0.1))
            died[rank] = time.monotonic()
            self.up[rank].signal(SIGNALS[self.options.kill])
        return died

    def bury(self, phase: PlanPhase, died: dict[int, float]) -> None:
        for rank in phase.kill:
            dead = self.up.pop(rank)
            with contextlib.suppress(Closed, TimeoutError):
                while True:
                    answer = dead.heard()
                    if isinstance(answer, Dying):
                        died[rank] = answer.at
            self.gone.add(rank)
            if self.options.kill == "sigstop":
                self.stopped.append(dead)
            else:
                dead.end()

    def judge(
        self,
        phase: PlanPhase,
        outcomes: dict[int, WorkerOutcome],
        died: dict[int, float],
        result: PhaseResult,
    ) -> None:
        survivors = tuple(sorted(outcomes))
        for rank, outcome in outcomes.items():
            result.errors += [f"rank {rank}: {error}" for error in outcome.errors]
            if outcome.active != survivors:
                result.errors.append(f"rank {rank} ends with ranks {outcome.active}")
            if not set(survivors) <= set(outcome.active):
                result.errors.append(f"rank {rank} lost a healthy rank: {outcome.active}")
        epochs = {outcome.epoch for outcome in outcomes.values()}
        if len(epochs) > 1:
            result.errors.append(f"the survivors are in different epochs: {sorted(epochs)}")
        self.epoch = max(epochs)
        changed = any(outcome.agree_s for outcome in outcomes.values())
        if died:
            first = min(died.values())
            seen = [outcome.detected - first for outcome in outcomes.values() if outcome.detected]
            result.detect_s = sorted(seen)
        if changed:
            result.agree_s = max(outcome.agree_s for outcome in outcomes.values())
        result.commit_s = max(outcome.commit_s for outcome in outcomes.values())
        result.exchanges = sum(outcome.exchanges for outcome in outcomes.values())
        latencies = [s for outcome in outcomes.values() for s in outcome.latencies]
        result.bytes_sent = sum(outcome.bytes_sent for outcome in outcomes.values())
        result.bytes_undeduplicated = sum(o.bytes_undeduplicated for o in outcomes.values())
        if latencies:
            result.exchange_s = median(latencies)
            each = result.bytes_sent / len(latencies) * len(outcomes)
            result.gigabytes_per_s = each / result.exchange_s / 1e9

    # ---- talking to ranks ---------------------------------------------------------------------

    def limit(self) -> float:
        """Seconds in which a phase must be over, whatever dies in it."""
        each = 2 * self.options.timeout_s + 0.5
        return self.setup.connect_s * 2 + each * self.options.exchanges / 4 + ANSWER_S

    def answers(self, ranks: Iterable[int], limit_s: float, kind: type[T]) -> dict[int, T]:
        deadline = time.monotonic() + limit_s
        found: dict[int, T] = {}
        for rank in ranks:
            answer = self.hear(self.up[rank], max(0.0, deadline - time.monotonic()))
            if isinstance(answer, worker.TaskFailed):
                raise PlanFailed(f"rank {rank} failed in {self.up[rank].doing}: {answer.why}")
            if not isinstance(answer, kind):
                raise PlanFailed(f"rank {rank} answered {self.up[rank].doing} with {answer}")
            found[rank] = answer
        return found

    def hear(self, rank: _Rank, limit_s: float) -> Answer:
        deadline = time.monotonic() + limit_s
        while True:
            try:
                answer = rank.heard(max(0.0, deadline - time.monotonic()))
            except Closed:
                raise PlanFailed(f"rank {rank.rank} exited by itself while {rank.doing}") from None
            except TimeoutError:
                raise PlanFailed(
                    f"rank {rank.rank} is stuck in {rank.doing} after {limit_s:.0f} s"
                ) from None
            if not isinstance(answer, Dying):
                return answer


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C waits until the end of the block."""
    came: list[int] = []
    handler = signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if came:
        raise KeyboardInterrupt


def run(
    plan: list[PlanPhase], options: Options, progress: Callable[[PhaseResult], None]
) -> list[PhaseResult]:
    """Run a plan; every phase's result, up to the first that cannot be gone on from."""
    if options.at not in ("random", *POINTS):
        raise ValueError(f"no such point: {options.at}")
    capacity = max(max(phase.ranks) for phase in plan) + 1
    with Runner(options, capacity) as runner:
        return runner.run(plan, progress)


def as_json(results: list[PhaseResult]) -> list[dict[str, Any]]:
    return [asdict(result) for result in results]
