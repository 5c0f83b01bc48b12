"""One rank's engine: commands that come at the worst moment leave it ready for the next epoch."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import pytest

from flexpert.comm import Buffer, make_buffer
from flexpert.comm.host.host_buffer import HostBuffer
from flexpert.config import EngineConfig
from flexpert.engine import rank_protocol as msg
from flexpert.engine.memory_plan import buffer_spec
from flexpert.engine.rank_engine import RankEngine
from flexpert.engine.request import HeldKV, KVMigration, RequestSequence, SamplingParams
from flexpert.models.source import ModelSource
from flexpert.moe.placement import replan

CONFIG = EngineConfig(kv_memory=4 * 2**20, max_tokens_per_step=32, max_running=4)
LIMIT_S = 30.0


class Told:
    """What a rank says, in order. `interfere` may hold it up where it says something."""

    def __init__(self) -> None:
        self._said: queue.Queue[tuple[str, int]] = queue.Queue()
        self.tokens: dict[str, list[int]] = {}
        self.rejections: dict[str, tuple[str, bool]] = {}
        self.interfere: Callable[[str, int], None] = lambda what, epoch: None

    def wait_for(self, what: str, epoch: int) -> None:
        while (said := self._said.get(timeout=LIMIT_S)) != (what, epoch):
            assert said[0] != "failed", said

    def _say(self, what: str, epoch: int) -> None:
        self.interfere(what, epoch)
        self._said.put((what, epoch))

    def __call__(self, report: msg.Report) -> None:
        match report:
            case msg.Published(events, _):
                for event in events:
                    self.tokens.setdefault(event.id, []).extend(event.tokens)
                    if event.finish:
                        self._say("finished", 0)
            case msg.Rejected(sequence_id, error, fault):
                self.rejections[sequence_id] = (error, fault)
                self._say("rejected", 0)
            case msg.OnTrial():
                self._say("on_trial", 0)
            case msg.Progress(epoch) | msg.Prepared(epoch) | msg.Failed(epoch):
                self._say(type(report).__name__.lower(), epoch)
            case msg.Switched(epoch):
                self._say("switched", epoch)


@pytest.fixture(scope="module")
def source() -> ModelSource:
    return ModelSource.open("tiny")


@contextmanager
def rank_and_peer(source: ModelSource) -> Iterator[tuple[RankEngine, Told, Buffer]]:
    """Rank 0 in a thread, and the bare buffer of a rank 1 that does what the test says."""
    told = Told()
    engine = RankEngine(0, source, CONFIG, capacity=2, exchange_timeout_s=LIMIT_S, report=told)
    peer = make_buffer(1, buffer_spec(source.info, CONFIG, 2), timeout_s=LIMIT_S)
    running = threading.Thread(target=engine.run)
    running.start()
    try:
        yield engine, told, peer
    finally:
        engine.submit(msg.Stop())
        engine.submit(msg.Halt(0))
        running.join(LIMIT_S)
        peer.close()
    assert not running.is_alive()


def plan(engine: RankEngine, epoch: int, members: dict[int, bytes]) -> msg.Prepare:
    info = engine.source.info
    ids = {0, *members}
    placement = replan(None, ids, experts=info.experts, layers=info.moe_layers, redundant=0)
    return msg.Prepare(epoch, {0: engine.buffer.address, **members}, placement)


def meets(told: Told, engine: RankEngine, peer: Buffer, epoch: int) -> None:
    """Rank 0 enters a prepared epoch, and both hear each other's first vote."""
    peer.connect({0: engine.buffer.address})
    engine.submit(msg.Commit(epoch))
    peer.set_active([0, 1], epoch)
    peer.barrier(bytes(5), timeout_s=LIMIT_S)  # no work, armed for nothing
    told.wait_for("switched", epoch)


def test_without_planted_faults_a_rank_works_on_the_bare_buffer(source: ModelSource) -> None:
    with rank_and_peer(source) as (engine, told, _):
        assert isinstance(engine.buffer, HostBuffer)
        assert engine.report is told


def test_a_halt_that_comes_while_an_epoch_is_entered_is_obeyed(source: ModelSource) -> None:
    with rank_and_peer(source) as (engine, told, peer):
        engine.submit(plan(engine, 1, {1: peer.address}))
        told.wait_for("prepared", 1)
        halting, voted = threading.Event(), threading.Event()
        interrupt, post_vote = engine.buffer.interrupt, engine.buffer.post_vote

        def interrupt_first() -> None:
            """The rank enters the epoch between the interrupt and what follows it."""
            interrupt()
            halting.set()
            voted.wait(0.5)  # not, if the rank has heard of the halt before

        def note(payload: bytes) -> None:
            post_vote(payload)
            voted.set()

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engine.buffer, "interrupt", interrupt_first)
            patch.setattr(engine.buffer, "post_vote", note)
            told.interfere = lambda what, epoch: _wait(halting, what == "rejected")
            engine.submit(msg.Admit([_too_long()]))  # keeps the rank busy until the halt is there
            engine.submit(msg.Commit(1))
            engine.submit(msg.Halt(0))
        engine.submit(plan(engine, 2, {1: peer.address}))
        told.wait_for("prepared", 2)
        meets(told, engine, peer, 2)


def test_a_withdrawn_preparation_that_ends_late_takes_nothing_from_the_next(
    source: ModelSource,
) -> None:
    with rank_and_peer(source) as (engine, told, peer):
        engine.submit(plan(engine, 1, {}))
        told.wait_for("prepared", 1)
        engine.submit(msg.Commit(1))
        told.wait_for("switched", 1)
        begun, next_begun = threading.Event(), threading.Event()

        def hold_up(what: str, epoch: int) -> None:
            if (what, epoch) == ("progress", 2) and not begun.is_set():
                begun.set()
                next_begun.wait(0.5)  # not, if the next one waits for this one
            if (what, epoch) == ("progress", 3):
                next_begun.set()

        told.interfere = hold_up
        engine.submit(plan(engine, 2, {1: peer.address}))
        assert begun.wait(LIMIT_S)
        engine.submit(msg.Halt(0))
        engine.submit(plan(engine, 3, {1: peer.address}))
        told.wait_for("prepared", 3)
        meets(told, engine, peer, 3)


def _wait(event: threading.Event, yes: bool) -> None:
    assert not yes or event.wait(LIMIT_S)


def _too_long() -> RequestSequence:
    greedy = SamplingParams(max_tokens=1, temperature=0.0)
    return RequestSequence(id="long", prompt=[1] * 10**6, generated=[], params=greedy, eos=())


def alone(source: ModelSource, engine: RankEngine, told: Told) -> None:
    """Rank 0 serves by itself."""
    engine.submit(plan(engine, 1, {}))
    told.wait_for("prepared", 1)
    engine.submit(msg.Commit(1))
    told.wait_for("switched", 1)


def asked(name: str, **params: Any) -> RequestSequence:
    greedy = SamplingParams(**{"max_tokens": 6, "temperature": 0, "seed": 0} | params)
    return RequestSequence(id=name, prompt=[*range(10, 30)], generated=[], params=greedy, eos=())


@pytest.mark.parametrize(
    "held",
    [
        HeldKV("lie", 10**6, [0]),
        HeldKV("lie", 16, [10**6]),
        HeldKV("lie", 16, [-1]),
        HeldKV("lie", 16, []),
        HeldKV("lie", -5, []),
        HeldKV("lie", 16, [0, 1, 2, 3]),
    ],
)
@pytest.mark.parametrize("address", [b"", b"?"])
def test_what_a_rank_says_of_its_kv_is_not_believed_where_it_cannot_be(
    source: ModelSource, held: HeldKV, address: bytes
) -> None:
    with rank_and_peer(source) as (engine, told, _):
        alone(source, engine, told)
        engine.submit(msg.Admit([asked("true")]))
        told.wait_for("finished", 0)
        engine.submit(msg.Adopt(1, address, [KVMigration(asked("lie"), held)]))
        told.wait_for("finished", 0)
        assert told.tokens["lie"] == told.tokens["true"]
        assert not told.rejections


def test_a_sequence_that_cannot_be_sampled_fails_alone(source: ModelSource) -> None:
    with rank_and_peer(source) as (engine, told, _):
        alone(source, engine, told)
        engine.submit(msg.Admit([asked("before")]))
        told.wait_for("finished", 0)
        # no such sequence passes the head's checks: its logits cannot be counted
        odd = asked("odd", temperature=0.5, logprobs=3, top_k=-3)
        engine.submit(msg.Admit([asked("beside"), odd, msgspec.structs.replace(odd, id="after")]))
        told.wait_for("finished", 0)
        assert told.tokens["beside"] == told.tokens["before"]
        assert {name: fault for name, (_, fault) in told.rejections.items()} == {
            "odd": True,
            "after": True,
        }
        assert engine.scheduler.running == engine.scheduler.waiting == 0


def test_the_first_step_with_a_suspect_is_told(source: ModelSource) -> None:
    with rank_and_peer(source) as (engine, told, _):
        alone(source, engine, told)
        engine.submit(msg.Admit([msgspec.structs.replace(asked("a"), on_trial=True)]))
        told.wait_for("on_trial", 0)
        told.wait_for("finished", 0)
