"""Sequences that move to another rank with what is computed, against a fake model that reads it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from random import Random

import msgspec
import pytest
import torch
from test_scheduler import FakeModel, answer, limits, run, sequence, tokens_of
from torch import Tensor

from flexpert.comm.errors import PeerUnreachable
from flexpert.config import EngineConfig
from flexpert.engine import rank_protocol as msg
from flexpert.engine.arrivals import Arrivals
from flexpert.engine.device_profile import CpuProfile
from flexpert.engine.grammar_preparation import GrammarPreparer
from flexpert.engine.kv_transfer import KVTransfer
from flexpert.engine.output_grammar import GrammarCache
from flexpert.engine.request import HeldKV, KVMigration, RequestSequence, TokenEvent
from flexpert.engine.scheduler import Scheduler
from flexpert.engine.sequence_intake import SequenceIntake
from flexpert.models.kv_cache import KVCache
from flexpert.models.source import ModelSource

SIZE = 4


class Rank:
    """A scheduler, its model, and what each sequence has answered here."""

    def __init__(self, **changed: object) -> None:
        own = limits(**{"blocks": 60, "max_running": 8, "max_model_len": 60, **changed})
        self.scheduler, self.model = Scheduler(own), FakeModel(SIZE)
        self.got: dict[str, list[int]] = {}
        self.computed = 0  # tokens

    def add(self, s: RequestSequence) -> None:
        self.got[s.id] = list(s.generated)
        self.scheduler.add(s)

    def step(self, times: int = 1) -> None:
        for _ in range(times):
            plan = self.scheduler.plan()
            self.computed += plan.tokens
            for event in self.scheduler.commit(plan, self.model.step(plan)):
                self.keep(event)

    def keep(self, event: TokenEvent) -> None:
        assert event.position == len(self.got[event.id])
        self.got[event.id] += event.tokens

    def copy(self, other: Rank, pairs: list[tuple[int, int]]) -> None:
        for there, here in pairs:
            for offset in range(SIZE):
                entry = other.model.cache.get(there * SIZE + offset)
                if entry:
                    self.model.cache[here * SIZE + offset] = entry

    def resumed(self, s: RequestSequence) -> RequestSequence:
        return msgspec.structs.replace(s, generated=list(self.got[s.id]))

    def adopt(self, other: Rank, s: RequestSequence, held: HeldKV, have: list[int]) -> bool:
        self.got[s.id] = list(s.generated)
        pairs = self.scheduler.adopt(s, held, have)
        if pairs is None:
            return False
        self.copy(other, pairs)
        self.scheduler.settle(s.id)
        return True

    def check_empty(self) -> None:
        assert self.scheduler.pool.used == 0
        assert len(self.scheduler._free_rows) == len(self.scheduler._tables)


def test_a_sequence_goes_on_without_computing_anything_again() -> None:
    leaver, destination = Rank(), Rank()
    asked = sequence("a", list(range(7)), max_tokens=20, ignore_eos=True)
    leaver.add(asked)
    leaver.step(6)
    (held,) = leaver.scheduler.hand_over()
    assert held.computed == 7 + 6 - 1
    assert destination.adopt(leaver, leaver.resumed(asked), held, [])
    destination.step(3)
    assert destination.computed == 3
    assert destination.got["a"] == answer(asked, 60)[: 6 + 3]
    leaver.check_empty()


def test_a_prompt_that_is_half_computed_goes_on_where_it_was() -> None:
    leaver, destination = Rank(max_tokens_per_step=5), Rank(max_tokens_per_step=5)
    asked = sequence("a", list(range(12)), max_tokens=3, ignore_eos=True)
    leaver.add(asked)
    leaver.step(1)
    (held,) = leaver.scheduler.hand_over()
    assert held.computed == 5
    assert destination.adopt(leaver, leaver.resumed(asked), held, [])
    destination.step(2)
    assert destination.computed == 7
    destination.step(2)
    assert destination.got["a"] == answer(asked, 60)
    destination.check_empty()


def test_a_shared_prefix_moves_once_and_a_known_one_not_at_all() -> None:
    leaver, destination = Rank(), Rank()
    prompt = list(range(8))
    asked = [sequence(name, [*prompt, number], max_tokens=8) for number, name in enumerate("abc")]
    for s in asked:
        leaver.add(s)
        leaver.step()
    migrations = [
        KVMigration(leaver.resumed(s), held)
        for s, held in zip(asked, leaver.scheduler.offer(), strict=True)
    ]
    arrivals = Arrivals(destination.scheduler.pool)
    pairs = arrivals.reserve(migrations, spare=0)
    own = len({block for move in migrations for block in move.held.blocks[2:]})
    assert len(pairs) == 2 + own
    destination.copy(leaver, pairs)
    arrivals.settle()
    arrivals.drop()
    again = Arrivals(destination.scheduler.pool)
    assert again.reserve(migrations, spare=0) == [], "all of it is in the prefix cache now"
    again.drop()
    destination.check_empty()


def test_what_no_sequence_holds_any_more_moves_into_blocks_that_nothing_is_in() -> None:
    leaver, destination = Rank(), Rank(blocks=20)
    talks = [[number] * 9 for number in (1, 2, 3)]
    for number, prompt in enumerate(talks):
        leaver.add(sequence(f"s{number}", prompt, max_tokens=2, ignore_eos=True))
        leaver.step(2)
    destination.add(sequence("known", talks[1], max_tokens=2, ignore_eos=True))
    destination.step(2)
    leaver.scheduler.offer()
    cached = leaver.scheduler.offer_cached(100)
    assert len(cached) == 6, "two full blocks of each"
    assert leaver.scheduler.offer_cached(100) == [], "each once"
    arrivals = Arrivals(destination.scheduler.pool)
    pairs = arrivals.reserve_cached(cached, spare=0)
    assert len(pairs) == 4, "what is known does not move"
    leaver.scheduler.withdraw()
    destination.copy(leaver, pairs)
    arrivals.settle()
    destination.check_empty()
    before = destination.computed
    for number, prompt in enumerate(talks):
        again = sequence(f"again{number}", [*prompt, 9], max_tokens=2, ignore_eos=True)
        destination.add(again)
        destination.step(2)
        assert destination.got[again.id] == answer(again, 60)
    assert destination.computed - before == 3 * (2 + 1), "eight of ten tokens were found"
    leaver.check_empty()


def test_cached_blocks_take_no_room_that_anybody_needs() -> None:
    leaver, destination = Rank(), Rank(blocks=12, max_model_len=40)
    for number in (1, 2, 3):
        leaver.add(sequence(f"s{number}", [number] * 9, max_tokens=2, ignore_eos=True))
        leaver.step(2)
    for number in (4, 5):
        destination.add(sequence(f"s{number}", [number] * 17, max_tokens=2, ignore_eos=True))
        destination.step(3)
    unused = destination.scheduler.pool.unused
    assert unused < 6
    cached = leaver.scheduler.offer_cached(100)
    arrivals = Arrivals(destination.scheduler.pool)
    pairs = arrivals.reserve_cached(cached, spare=0)
    assert len(pairs) == unused
    assert [there for there, _ in pairs] == [one.block for one in cached[:unused]]
    arrivals.drop()
    destination.check_empty()
    busy = Rank(blocks=30, max_model_len=40)
    for number in range(3):
        busy.add(sequence(f"b{number}", [number] * 9, max_tokens=20, ignore_eos=True))
        busy.step()
    assert busy.scheduler.offer_cached(100) == [], "it needs its blocks itself"


def test_what_was_offered_is_not_overwritten_when_its_sequence_ends() -> None:
    leaver, destination = Rank(blocks=8, max_model_len=24), Rank()
    asked = sequence("a", list(range(9)), max_tokens=2, ignore_eos=True)
    leaver.add(asked)
    leaver.step()
    (held,) = leaver.scheduler.offer()
    migrations = [KVMigration(leaver.resumed(asked), held)]
    arrivals = Arrivals(destination.scheduler.pool)
    pairs = arrivals.reserve(migrations, spare=0)
    leaver.step()  # the sequence ends, and others want its blocks
    for number in range(4):
        leaver.add(sequence(f"n{number}", [number + 1] * 15, max_tokens=2, ignore_eos=True))
    leaver.step(8)
    destination.copy(leaver, pairs)
    arrivals.settle()
    arrivals.drop()
    other = sequence("later", [*range(9), 3], max_tokens=2, ignore_eos=True)
    destination.add(other)
    destination.step(2)
    assert destination.got["later"] == answer(other, 60)
    assert destination.scheduler.cached_tokens == 8
    leaver.scheduler.withdraw()
    leaver.scheduler.drain()
    leaver.check_empty()


def test_without_a_free_row_it_waits_with_its_kv_and_nothing_is_computed_again() -> None:
    leaver, destination = Rank(), Rank(max_running=1)
    asked = [sequence(n, [i] * 9, max_tokens=12, ignore_eos=True) for i, n in enumerate("abcd")]
    for s in asked[:3]:
        leaver.add(s)
    destination.add(asked[3])
    destination.step()
    leaver.step(4)
    held = {one.id: one for one in leaver.scheduler.hand_over()}
    for s in asked[:3]:
        assert destination.adopt(leaver, leaver.resumed(s), held[s.id], [])
    later = sequence("e", [9] * 9, max_tokens=12, ignore_eos=True)
    destination.add(later)
    assert (destination.scheduler.running, destination.scheduler.waiting) == (1, 4)
    before = destination.computed
    desired = sum(12 - len(destination.got[s.id]) for s in asked)
    destination.step(desired)
    assert destination.computed - before == desired, "a token each, one sequence at a time"
    assert [len(destination.got[s.id]) for s in (*asked, later)] == [12, 12, 12, 12, 0]
    destination.step(12)
    for s in (*asked, later):
        assert destination.got[s.id] == answer(s, 60)
    destination.check_empty()


def test_what_waits_with_its_kv_moves_on_with_it() -> None:
    leaver, destination, third = Rank(), Rank(max_running=1), Rank()
    asked = [sequence(n, [i] * 9, max_tokens=12, ignore_eos=True) for i, n in enumerate("ab")]
    leaver.add(asked[0])
    leaver.step(4)
    destination.add(asked[1])
    destination.step()
    (held,) = leaver.scheduler.hand_over()
    assert destination.adopt(leaver, leaver.resumed(asked[0]), held, [])
    assert [(one.id, one.computed) for one in destination.scheduler.offer()] == [
        ("b", 8),
        ("a", 12),
    ]
    for one in destination.scheduler.hand_over():
        s = next(s for s in asked if s.id == one.id)
        assert third.adopt(destination, destination.resumed(s), one, [])
    destination.check_empty()
    third.step(11)
    assert third.computed == 11 + 8
    assert [third.got[s.id] for s in asked] == [answer(s, 60) for s in asked]


def test_those_that_run_take_the_blocks_of_those_that_wait() -> None:
    leaver, destination = (
        Rank(),
        Rank(blocks=8, max_running=1, max_model_len=30, prefix_cache=False),
    )
    asked = [sequence(n, [i] * 9, max_tokens=18, ignore_eos=True) for i, n in enumerate("abc")]
    for s in asked[:2]:
        leaver.add(s)
    leaver.step()
    destination.add(asked[2])
    destination.step()
    held = {one.id: one for one in leaver.scheduler.hand_over()}
    assert destination.adopt(leaver, leaver.resumed(asked[0]), held["a"], [])
    assert not destination.adopt(leaver, leaver.resumed(asked[1]), held["b"], []), (
        "5 of 8 are taken"
    )
    destination.step(17)
    assert destination.scheduler.preemptions == 1
    destination.step(40)
    for s in asked:
        assert destination.got[s.id] == answer(s, 30)
    destination.check_empty()


def test_without_room_it_waits_and_is_computed_again() -> None:
    leaver, destination = Rank(), Rank(blocks=6, max_model_len=24)
    asked = sequence("a", list(range(9)), max_tokens=9, ignore_eos=True)
    other = sequence("o", list(range(50, 62)), max_tokens=8, ignore_eos=True)
    leaver.add(asked)
    leaver.step(3)
    destination.add(other)
    destination.step()
    (held,) = leaver.scheduler.hand_over()
    arrivals = Arrivals(destination.scheduler.pool)
    moved = leaver.resumed(asked)
    pairs = arrivals.reserve([KVMigration(moved, held)], spare=2)
    assert len(pairs) == 1
    destination.copy(leaver, pairs)
    arrivals.settle()
    assert not destination.adopt(leaver, moved, held, arrivals.take("a"))
    events = run(destination.scheduler, destination.model)
    assert destination.got["a"] + tokens_of(events["a"]) == answer(asked, 24)
    destination.check_empty()


def test_a_sequence_that_cannot_be_taken_gives_its_blocks_back() -> None:
    destination = Rank(blocks=4, max_model_len=60)
    too_long = sequence("a", list(range(20)), max_tokens=30, ignore_eos=True)
    arrivals = Arrivals(destination.scheduler.pool)
    held = HeldKV("a", 16, [0, 1, 2, 3])
    arrivals.reserve([KVMigration(too_long, held)], spare=0)
    arrivals.settle()
    with pytest.raises(Exception, match="may reach 50 tokens"):
        destination.scheduler.adopt(too_long, held, arrivals.take("a"))
    destination.check_empty()


@pytest.mark.parametrize("seed", range(150))
def test_random_moves_change_no_answer_and_leak_nothing(seed: int) -> None:
    draw = Random(seed)
    shape = {
        "prefix_cache": draw.random() < 0.7,
        "max_tokens_per_step": draw.choice([4, 9, 30]),
        "max_model_len": 40,
    }
    ranks = [
        Rank(blocks=draw.choice([11, 16, 40]), max_running=draw.choice([1, 2, 5]), **shape)
        for _ in range(3)
    ]
    asked = {}
    for number in range(draw.randint(2, 9)):
        prompt = draw.choices([0, 1], k=draw.choice([1, 5, 12, 20]))
        s = sequence(str(number), prompt, max_tokens=draw.randint(1, 18), ignore_eos=True)
        asked[s.id] = s
        draw.choices(ranks, [7, 3, 1])[0].add(s)
    for rank, most in zip(ranks, (12, 6, 6), strict=True):
        rank.step(draw.randint(0, most))
    over: dict[str, list[int]] = {}
    for leaver, destination in pairwise(ranks):  # what has moved once migrations again
        move_all(leaver, destination, asked, draw)
        over |= {n: got for n, got in leaver.got.items() if n not in destination.got}
        leaver.check_empty()
        destination.step(draw.randint(0, 5))
    last = ranks[-1]
    for _ in range(500):
        if not last.scheduler.has_work:
            break
        last.step()
    over |= last.got
    for name, s in asked.items():
        assert over[name] == answer(s, 40), name
    last.check_empty()


def move_all(
    leaver: Rank, destination: Rank, asked: dict[str, RequestSequence], draw: Random
) -> None:
    """A change in which a rank leaves, as `engine/rank_engine.py` does it."""
    arrivals = Arrivals(destination.scheduler.pool)
    if draw.random() < 0.8:
        migrations = [KVMigration(leaver.resumed(asked[h.id]), h) for h in leaver.scheduler.offer()]
        spare = destination.scheduler.running + draw.choice([0, 3])
        pairs = arrivals.reserve(migrations, spare=spare)
        for rank in (leaver, destination):
            rank.step(draw.randint(0, 8))
        destination.copy(leaver, pairs)
        if draw.random() < 0.9:
            arrivals.settle()
        else:
            arrivals.drop()  # the copy failed
        for rank in (leaver, destination):
            rank.step(draw.randint(0, 5))
    for held in leaver.scheduler.hand_over():
        destination.adopt(leaver, leaver.resumed(asked[held.id]), held, arrivals.take(held.id))
    arrivals.drop()


class CutOff:
    """Ranks of other machines to which every link has just broken."""

    def is_far(self, rank: int) -> bool:
        return True

    def kv_at_switch(self, rank: int) -> CutOff:
        return self

    def copy(self, parts: Sequence[tuple[int, Tensor]]) -> None:
        raise PeerUnreachable("cut")


def test_what_cannot_be_read_from_another_machine_at_the_switch_is_computed_again() -> None:
    leaver, destination = Rank(), Rank()
    asked = [sequence(name, [i] * 9, max_tokens=12, ignore_eos=True) for i, name in enumerate("ab")]
    for s in asked:
        leaver.add(s)
    leaver.step(3)
    moves = [
        KVMigration(leaver.resumed(s), held)
        for s, held in zip(asked, leaver.scheduler.hand_over(), strict=True)
    ]
    source, reports = ModelSource.open("tiny"), []
    info, grammars = source.info, GrammarCache(lambda: source.grammar_tokens)
    memory = torch.zeros(KVCache.nbytes(info, 60, SIZE), dtype=torch.uint8)
    transfer = KVTransfer(
        info,
        destination.scheduler,
        KVCache(info, 60, SIZE, memory),
        CpuProfile(EngineConfig()),
        SequenceIntake(
            destination.scheduler, reports.append, GrammarPreparer(grammars, reports.append)
        ),
        CutOff(),
        report=reports.append,
        done=reports.append,
    )
    transfer.adopt(msg.Adopt(1, b"an address that nobody opens", moves))
    computed = sum(move.held.computed for move in moves)
    assert reports == [msg.Adopted(1, 0, 0, computed)]
    destination.got = {move.sequence.id: list(move.sequence.generated) for move in moves}
    destination.step(12)
    assert destination.got == {s.id: answer(s, 60) for s in asked}
    destination.check_empty()
