"""One rank's engine: commands that come at the worst moment leave it ready for the next epoch."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from support.checkpoints import make_checkpoint
from support.draft_checkpoints import with_draft_layer
from support.draft_turns import in_turns

from flexpert.comm import Buffer, RankTimeout, make_buffer
from flexpert.comm.host.host_buffer import HostBuffer
from flexpert.config import EngineConfig
from flexpert.engine import rank_protocol as msg
from flexpert.engine.device_profile import CpuProfile
from flexpert.engine.device_sampler import DeviceSampler
from flexpert.engine.memory_plan import buffer_spec
from flexpert.engine.rank_engine import VOTE, RankEngine
from flexpert.engine.request import HeldKV, KVMigration, RequestSequence, SamplingParams
from flexpert.engine.step_costs import DraftPhases
from flexpert.engine.step_plan import StepPlan
from flexpert.models.source import ModelSource, locate
from flexpert.moe.placement import replan
from flexpert.speculative_settings import SpeculativeSettings

CONFIG = EngineConfig(kv_memory=4 * 2**20, max_tokens_per_step=32, max_running=4)
LIMIT_S = 30.0


class Told:
    """What a rank says, in order. `interfere` may hold it up where it says something."""

    def __init__(self) -> None:
        self._said: queue.Queue[tuple[str, int]] = queue.Queue()
        self.tokens: dict[str, list[int]] = {}
        self.rejections: dict[str, tuple[str, bool]] = {}
        self.accepted = 0  # proposed tokens
        self.interfere: Callable[[str, int], None] = lambda what, epoch: None

    def next(self) -> tuple[str, int]:
        return self._said.get(timeout=LIMIT_S)

    def wait_for(self, what: str, epoch: int) -> None:
        while (said := self.next()) != (what, epoch):
            assert said[0] != "failed", said

    def _say(self, what: str, epoch: int) -> None:
        self.interfere(what, epoch)
        self._said.put((what, epoch))

    def __call__(self, report: msg.Report) -> None:
        match report:
            case msg.Published(events, _):
                self.accepted += sum(report.drafts.accepted) if report.drafts else 0
                for event in events:
                    self.tokens.setdefault(event.id, []).extend(event.tokens)
                    if event.finish:
                        self._say("finished", 0)
            case msg.Rejected(sequence_id, error, fault):
                self.rejections[sequence_id] = (error, fault)
                self._say("rejected", 0)
            case msg.OnTrial():
                self._say("on_trial", 0)
            case msg.Progress(epoch) | msg.Prepared(epoch) | msg.Failed(epoch) | msg.Broken(epoch):
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
    peer.barrier(bytes(VOTE.size), timeout_s=LIMIT_S)  # no work, armed for nothing
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


def many(longer: int = 11) -> list[RequestSequence]:
    """More than run at once; some end by a token, some are sampled, some need one at a time.

    longer: by so many tokens is each prompt longer than the one before it.
    """
    ways: list[dict[str, Any]] = [
        {"max_tokens": 1},
        {"max_tokens": 12},
        {"max_tokens": 9, "temperature": 1.0, "seed": 3},
        {"max_tokens": 30, "stop_token_ids": tuple(range(0, 400, 2))},
        {"max_tokens": 7, "repetition_penalty": 1.3},
        {"max_tokens": 20, "temperature": 0.8, "top_k": 5, "seed": 9, "min_tokens": 12},
        {"max_tokens": 14, "logprobs": 2},
        {"max_tokens": 30, "allowed_token_ids": (5, 6)},
        {"max_tokens": 30, "allowed_token_ids": (7, 9), "temperature": 0.5, "seed": 1},
        {
            "max_tokens": 25,
            "stop_token_ids": tuple(range(1, 400, 3)),
            "temperature": 1.2,
            "seed": 4,
        },
    ]
    sequences = []
    for number, way in enumerate(ways):
        params = SamplingParams(**{"temperature": 0, "seed": 0} | way)
        prompt = [(7 * number + 3 * at) % 400 for at in range(5 + longer * number)]
        sequences.append(
            RequestSequence(id=str(number), prompt=prompt, generated=[], params=params, eos=())
        )
    return sequences


def answers(
    source: ModelSource,
    *,
    longer: int = 11,
    looks_ahead: bool = False,
    broken: int | None = None,
    speculate: SpeculativeSettings | None = None,
    phases: tuple[int, int] | None = None,
) -> tuple[dict[str, list[int]], int]:
    """Of `many(longer)`, and how many steps were launched on top of another, or how many proposed
    tokens came true.

    broken: which step turns out not to be whole; an epoch later it is computed again.
    phases: for so many steps tokens are proposed, then for so many none; None: by what they take.
    """
    told, launched, checks = Told(), 0, 0
    config = CONFIG.model_copy(update={"deterministic": True, "speculate": speculate})
    with pytest.MonkeyPatch.context() as patch:
        if phases is not None:
            patch.setattr(DraftPhases, "passed", in_turns(*phases))
        if looks_ahead:
            patch.setattr(CpuProfile, "looks_ahead", True)
            patch.setattr(
                CpuProfile, "make_sampler", lambda self, kept, _: DeviceSampler(kept, self.stream)
            )
        engine = RankEngine(0, source, config, capacity=1, exchange_timeout_s=LIMIT_S, report=told)
        plan_step, check = engine.scheduler.plan, engine.buffer.check

        def counted() -> StepPlan:
            nonlocal launched
            step = plan_step()
            launched += step.sources is not None
            return step

        def breaking(*, wait: bool = True) -> tuple[int, ...]:
            nonlocal checks
            checks += 1
            if checks == broken:
                raise RankTimeout((1,), "combine", 1, 0.0)
            return check(wait=wait)

        patch.setattr(engine.scheduler, "plan", counted)
        patch.setattr(engine.buffer, "check", breaking)
        running = threading.Thread(target=engine.run)
        running.start()
        try:
            alone(source, engine, told)
            engine.submit(msg.Admit(many(longer)))
            unfinished = len(many(longer))
            while unfinished:
                what, epoch = told.next()
                unfinished -= what == "finished"
                if what == "broken":
                    engine.submit(msg.Halt(1))
                    engine.submit(plan(engine, 2, {}))
                elif (what, epoch) == ("prepared", 2):
                    engine.submit(msg.Commit(2))
        finally:
            engine.submit(msg.Stop())
            running.join(LIMIT_S)
        assert engine.scheduler.pool.used == 0
        assert broken is None or checks > broken
    assert not told.rejections
    return told.tokens, told.accepted if speculate else launched


def test_a_rank_that_looks_ahead_answers_as_one_that_does_not(source: ModelSource) -> None:
    expected, none = answers(source, looks_ahead=False)
    found, ahead = answers(source, looks_ahead=True)
    assert found == expected
    assert none == 0
    assert ahead > 10


@pytest.mark.parametrize("broken", [1, 2, 9, 20])
def test_what_was_launched_on_top_of_a_broken_step_is_computed_again(
    source: ModelSource, broken: int
) -> None:
    expected, _ = answers(source, looks_ahead=False)
    found, _ = answers(source, looks_ahead=True, broken=broken)
    assert found == expected


@pytest.fixture(scope="module")
def drafting(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    """The same with a layer that proposes tokens."""
    folder = with_draft_layer(locate("tiny"), tmp_path_factory.mktemp("drafting"), "mtp")
    return ModelSource.open(str(folder), drafts=True)


@pytest.mark.parametrize(
    ("broken", "proposed", "phases"),
    [
        (None, 1, (99, 0)),
        (3, 1, (6, 3)),
        (4, 1, (2, 1)),
        (None, 4, (5, 2)),
        (21, 4, (99, 0)),
        (22, 4, (99, 0)),
        (40, 4, (6, 3)),
    ],
)
def test_a_rank_whose_model_proposes_tokens_answers_as_one_that_does_not(
    source: ModelSource,
    drafting: ModelSource,
    broken: int | None,
    proposed: int,
    phases: tuple[int, int],
) -> None:
    """Of a step either the model's part is broken, or that of the layer that proposes."""
    expected, _ = answers(source)
    how = SpeculativeSettings(method="mtp", num_speculative_tokens=proposed)
    found, accepted = answers(drafting, speculate=how, broken=broken, phases=phases)
    assert found == expected
    assert accepted > 10


@pytest.mark.parametrize(
    ("broken", "looks_ahead"), [(None, False), (2, False), (9, False), (20, True), (None, True)]
)
def test_a_rank_that_speculates_answers_as_one_that_does_not(
    source: ModelSource, broken: int | None, looks_ahead: bool
) -> None:
    eager = SpeculativeSettings(prompt_lookup_min=1, num_speculative_tokens=5, max_rows=32)
    expected, _ = answers(source)
    found, accepted = answers(source, speculate=eager, broken=broken, looks_ahead=looks_ahead)
    assert found == expected
    assert accepted > 10


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[int]]]:
    """A checkpoint of which a layer keeps a state and another one proposes tokens, and what is
    answered without these."""
    kinds = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}
    plain = make_checkpoint("qwen3_next", tmp_path_factory.mktemp("plain"), vocab_size=400, **kinds)
    expected, _ = answers(ModelSource.open(str(plain)), longer=2)
    return with_draft_layer(plain, tmp_path_factory.mktemp("hybrid"), "mtp"), expected


@pytest.mark.parametrize(
    ("how", "broken"),
    [
        (SpeculativeSettings(prompt_lookup_min=1, num_speculative_tokens=5, max_rows=32), 9),
        (SpeculativeSettings(method="mtp", num_speculative_tokens=3), 14),
    ],
    ids=["ngram", "mtp"],
)
def test_states_are_those_behind_the_last_token_that_came_true(
    hybrid: tuple[Path, dict[str, list[int]]], how: SpeculativeSettings, broken: int
) -> None:
    path, expected = hybrid
    own = ModelSource.open(str(path), drafts=how.method == "mtp")
    ahead = how.method == "ngram"
    found, accepted = answers(own, longer=2, speculate=how, broken=broken, looks_ahead=ahead)
    assert found == expected
    assert accepted > 10
