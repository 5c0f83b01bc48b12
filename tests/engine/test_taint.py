"""What was computed without some experts is marked, and nobody else reads it."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
from numpy.typing import NDArray
from test_scheduler import FakeModel, limits, sequence, tokens_of

from flexpert.engine.request import TokenEvent
from flexpert.engine.scheduler import Scheduler
from flexpert.engine.step_plan import StepPlan


class Tainting(FakeModel):
    """Knows which slots hold keys and values that some row without its experts went into."""

    def __init__(self, scheduler: Scheduler) -> None:
        super().__init__(scheduler.limits.block_size)
        self.scheduler = scheduler
        self.tainted: set[int] = set()

    def finish(self, plan: StepPlan, degraded: NDArray[np.bool_] | None) -> list[TokenEvent]:
        """Compute and commit; each event must be marked exactly if what it read was tainted."""
        expected = {}
        for at, state in enumerate(self.owners(plan)):
            start, end = plan.query_start[at : at + 2].tolist()
            table = plan.block_tables[at]
            slots = [
                int(table[position // self.block_size]) * self.block_size
                + position % self.block_size
                for position in range(int(plan.context_len[at]))
            ]
            before = len(slots) - (end - start)
            dirty = any(slot in self.tainted for slot in slots[:before])
            for row, slot in zip(range(start, end), slots[before:], strict=True):
                dirty |= degraded is not None and bool(degraded[row])
                self.tainted.discard(slot)
                if dirty:
                    self.tainted.add(slot)
            expected[state] = dirty
        events = self.scheduler.commit(plan, self.step(plan), degraded)
        for event in events:
            assert event.degraded == expected[event.id]
        size = self.block_size
        for block in self.scheduler.pool._published.values():
            assert self.tainted.isdisjoint(range(block * size, (block + 1) * size))
        return events

    @staticmethod
    def owners(plan: StepPlan) -> list[str]:
        return [s.id for s in (*plan.decoding, *(state for state, _ in plan.chunks))]


def test_only_the_sequence_that_lost_a_choice_is_marked_and_stays_so() -> None:
    scheduler = Scheduler(limits(blocks=40, max_tokens_per_step=40))
    model = Tainting(scheduler)
    scheduler.add(sequence("a", [1, 2, 3, 4, 5], max_tokens=6, ignore_eos=True))
    scheduler.add(sequence("b", [5, 4, 3, 2, 1], max_tokens=6, ignore_eos=True))
    plan = scheduler.plan()
    lost = np.zeros(plan.tokens, dtype=bool)
    lost[7] = True  # the third token of b
    marked = [(event.id, event.degraded) for event in model.finish(plan, lost)]
    while scheduler.has_work:
        marked += [(event.id, event.degraded) for event in model.finish(scheduler.plan(), None)]
    assert set(marked) == {("a", False), ("b", True)}


def test_a_tainted_prefix_is_computed_again_by_who_comes_next() -> None:
    scheduler = Scheduler(limits(blocks=40, max_tokens_per_step=40))
    model = Tainting(scheduler)
    prompt = list(range(5)) * 2
    scheduler.add(sequence("a", prompt, max_tokens=5))
    while scheduler.has_work:
        plan = scheduler.plan()
        model.finish(plan, np.ones(plan.tokens, dtype=bool))
    scheduler.add(sequence("b", prompt, max_tokens=5))
    plan = scheduler.plan()
    assert plan.tokens == len(prompt)
    assert not any(event.degraded for event in model.finish(plan, None))
    assert scheduler.cached_tokens == 0
    while scheduler.has_work:
        model.finish(scheduler.plan(), None)
    scheduler.add(sequence("c", prompt, max_tokens=5))
    assert scheduler.plan().tokens == 2, "what was computed with all experts is found"


def test_tainted_keys_and_values_do_not_move_but_what_was_offered_before_does() -> None:
    scheduler = Scheduler(limits(blocks=40, max_tokens_per_step=40))
    model = Tainting(scheduler)
    scheduler.add(sequence("a", list(range(9)), max_tokens=9, ignore_eos=True))
    scheduler.add(sequence("b", list(range(9, 18)), max_tokens=9, ignore_eos=True))
    model.finish(scheduler.plan(), None)
    assert [(held.id, held.computed) for held in scheduler.offer()] == [("a", 8), ("b", 8)]
    plan = scheduler.plan()
    model.finish(plan, np.array([False, True]))
    assert [held.id for held in scheduler.offer()] == ["a"]
    assert [(held.id, held.computed) for held in scheduler.hand_over()] == [("a", 10), ("b", 0)]


@pytest.mark.parametrize("seed", range(40))
def test_random_lives_with_steps_that_lack_experts(seed: int) -> None:
    random = Random(seed)
    scheduler = Scheduler(
        limits(max_tokens_per_step=random.choice([5, 12, 40]), blocks=random.choice([12, 20]))
    )
    model = Tainting(scheduler)
    got: dict[str, list[TokenEvent]] = {}
    for number in range(40):
        prompt = [1] * random.choice([1, 4, 9, 17]) + random.choices([0, 1], k=random.randrange(4))
        name = str(number)
        got[name] = []
        scheduler.add(sequence(name, prompt, max_tokens=random.randint(1, 18), ignore_eos=True))
        missing = random.random() < 0.5
        for _ in range(random.randrange(8)):
            plan = scheduler.plan()
            if random.random() < 0.2:
                scheduler.rollback(plan)
                continue
            share = random.choice([0.05, 0.5])
            lost = np.array([random.random() < share for _ in range(plan.tokens)], dtype=bool)
            for event in model.finish(plan, lost if missing else None):
                got[event.id].append(event)
    while scheduler.has_work:
        for event in model.finish(scheduler.plan(), None):
            got[event.id].append(event)
    assert all(tokens_of(events) for events in got.values())
    marks = [event.degraded for events in got.values() for event in events]
    assert any(marks)
    assert not all(marks)
