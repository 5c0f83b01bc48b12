"""Proposed tokens: what is proposed, and that no answer depends on it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from engine.test_sampler import VOCAB, logits, state
from engine.test_scheduler import (
    EOS,
    FakeModel,
    answer,
    check_shapes,
    limits,
    run,
    sequence,
    speculative,
    tokens_of,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from flexpert.engine.draft_counts import DraftCounts
from flexpert.engine.draft_step import DraftRun
from flexpert.engine.request import StructuredOutputsParams, TokenLogprobs
from flexpert.engine.sampler import Sampler
from flexpert.engine.scheduler import Scheduler
from flexpert.engine.sequence import Sampled
from flexpert.engine.speculation import NgramIndex, SequenceSpeculation
from flexpert.engine.step_costs import DraftPhases, StepCosts
from flexpert.speculative_settings import SpeculativeSettings

NEVER: frozenset[int] = frozenset()


def successor(tokens: list[int], shortest: int, longest: int) -> int | None:
    """By the definition: the longest n-gram, of equally long ones the latest."""
    for size in range(min(longest, len(tokens) - 1), shortest - 1, -1):
        for place in range(len(tokens) - 1, size - 1, -1):
            if tokens[place - size : place] == tokens[len(tokens) - size :]:
                return place
    return None


@given(
    tokens=st.lists(st.integers(0, 2), max_size=16),
    bounds=st.tuples(st.integers(1, 3), st.integers(0, 2)),
    steps=st.lists(st.integers(1, 4), max_size=6),
)
@settings(max_examples=300, deadline=None)
def test_the_longest_and_latest_ngram_is_found_however_its_tokens_came(
    tokens: list[int], bounds: tuple[int, int], steps: list[int]
) -> None:
    shortest, longest = bounds[0], sum(bounds)
    index = NgramIndex(shortest, longest)
    for count in steps:
        index.learn(tokens[: len(tokens) // 2], most=count)
    index.learn(tokens)
    assert index.find(tokens) == successor(tokens, shortest, longest)


def test_a_long_prompt_is_taken_in_over_several_steps_and_not_used_before() -> None:
    tokens = [*range(50)] * 4
    index = NgramIndex(2, 4)
    index.learn(tokens, most=150)
    assert index.find(tokens) is None
    index.learn(tokens, most=150)
    assert index.find(tokens) == 150


def proposed(tokens: list[int], most: int, ends: frozenset[int] = NEVER) -> list[int]:
    own = SequenceSpeculation(speculative(9))
    own.likely = 1.0
    own.learn(tokens)
    return own.propose(tokens, most, ends)


def test_a_loop_is_proposed_beyond_what_was_said_of_it() -> None:
    assert proposed([5, 1, 2, 1, 2], 7) == [1, 2, 1, 2, 1, 2, 1]
    assert proposed([5, 3, 3], 4) == [3, 3, 3, 3]
    assert proposed([1, 2, 3, 4, 1, 2], 3) == [3, 4, 1]
    assert proposed([1, 2, 3], 4) == []


def test_nothing_is_proposed_behind_a_token_that_ends_the_answer() -> None:
    assert proposed([1, 2, 3, 4, 1, 2], 4, frozenset([4])) == [3, 4]


def test_the_more_comes_true_the_more_is_proposed_and_in_the_end_hardly_anything() -> None:
    tokens = [1] * 40
    own = SequenceSpeculation(SpeculativeSettings(num_speculative_tokens=8))
    own.learn(tokens)
    first = own.depth
    assert 0 < first < 8
    for _ in range(5):
        own.learn(tokens, own.depth, own.depth)
    assert own.depth == 8
    drafted = 0
    for _ in range(1000):
        drafted += own.depth
        own.learn(tokens, own.depth, 0)
    assert drafted < 50
    while not own.depth:
        own.learn(tokens)
    assert own.depth == 1, "it is tried again, now and then"
    for _ in range(20):
        own.learn(tokens, own.depth, own.depth)
    assert own.depth == 8


def test_counts_of_proposals_add_up_place_by_place() -> None:
    one, other = DraftCounts(1, 4, [1, 1, 1]), DraftCounts(2, 5, [2])
    assert one + other == other + one == DraftCounts(3, 9, [3, 1, 1])


def test_an_answer_that_repeats_itself_takes_fewer_steps() -> None:
    asked = sequence("a", [0, 1, 2], max_tokens=36, ignore_eos=True)
    plain, faster = Scheduler(limits()), Scheduler(limits(), speculative=speculative(4))
    for scheduler in (plain, faster):
        scheduler.add(asked)
    alone, quick = run(plain)["a"], run(faster)["a"]
    assert tokens_of(quick) == tokens_of(alone) == answer(asked)
    assert len(quick) < 0.8 * len(alone)
    counts = faster.draft_counts()
    assert counts is not None
    assert 36 - len(quick) == sum(counts.accepted) <= counts.tokens
    assert faster.draft_counts() is plain.draft_counts() is None
    assert faster.pool.used == 0


def hopeful(scheduler: Scheduler) -> Scheduler:
    """All proposals of its sequences have come true so far."""
    for one in scheduler._decoding:
        assert one.speculation is not None
        one.speculation.likely = 1.0
    return scheduler


def drafting(tokens: list[int], **params: Any) -> Scheduler:
    """About to be proposed 1, 1, 1 after these tokens of an answer."""
    scheduler = Scheduler(limits(), speculative=speculative(3))
    scheduler.add(sequence("a", tokens, **{"max_tokens": 9, **params}))
    scheduler.commit(plan := scheduler.plan(), Sampled([tokens[-1]], [None]))
    assert plan.drafts is None
    return hopeful(scheduler)


@pytest.mark.parametrize(
    ("sampled", "params", "tokens", "finish"),
    [
        ([1, 1, 1, 5], {}, [1, 1, 1, 5], None),
        ([1, 2, 1, 1], {}, [1, 2], None),
        ([4, 1, 1, 1], {}, [4], None),
        ([1, EOS, 1, 1], {}, [1, EOS], "stop"),
        ([1, 1, 1, EOS], {}, [1, 1, 1, EOS], "stop"),
    ],
)
def test_what_is_sampled_counts_as_far_as_what_was_proposed_came_true(
    sampled: list[int], params: dict[str, Any], tokens: list[int], finish: str | None
) -> None:
    scheduler = drafting([1, 1, 1, 1], logprobs=0, **params)
    plan = scheduler.plan()
    check_shapes(plan, scheduler.limits)
    assert plan.drafts == [[1, 1, 1]]
    told = [TokenLogprobs(-float(place), [], []) for place in range(4)]
    (event,) = scheduler.commit(plan, Sampled(sampled, [*told]))
    assert (event.position, event.tokens, event.finish) == (1, tokens, finish)
    assert event.logprobs == told[: len(tokens)]
    if finish:
        assert (scheduler.pool.used, scheduler.has_work) == (0, False)
    else:
        assert scheduler._states["a"].computed == 4 + len(tokens)


def test_an_end_that_was_proposed_ends_the_answer() -> None:
    scheduler = Scheduler(limits(), speculative=speculative(3))
    scheduler.add(sequence("a", [1, EOS, 3], max_tokens=9))
    scheduler.commit(scheduler.plan(), Sampled([1], [None]))
    plan = scheduler.plan()
    assert plan.drafts == [[EOS]]
    (event,) = scheduler.commit(plan, Sampled([EOS, 3], [None, None]))
    assert (event.tokens, event.finish) == ([EOS], "stop")


def test_no_more_is_proposed_than_the_answer_and_the_step_have_room_for() -> None:
    for most in (9, 4, 3, 2, 1):
        plan = drafting([1, 1, 1, 1], max_tokens=1 + most).plan()
        assert plan.tokens == min(4, most)
    scheduler = Scheduler(limits(max_tokens_per_step=6, blocks=40), speculative=speculative(9))
    for name in "ab":
        scheduler.add(sequence(name, [1, 1], max_tokens=30))
    scheduler.commit(scheduler.plan(), Sampled([1, 1], [None, None]))
    plan = hopeful(scheduler).plan()
    assert plan.tokens == 6, "rows of proposals are within the budget"
    scheduler.rollback(plan)
    scheduler.add(sequence("c", [2, 3, 4, 5], max_tokens=3))
    assert scheduler.plan().drafts is None, "prompts come before them"


def test_nothing_is_proposed_in_steps_with_many_rows() -> None:
    few = SpeculativeSettings(prompt_lookup_min=1, max_rows=4)
    scheduler = Scheduler(limits(max_running=5, blocks=40), speculative=few)
    for name in "abcde":
        scheduler.add(sequence(name, [1, 1], max_tokens=9 if name < "d" else 2))
    sizes = []
    while scheduler.has_work:
        plan = scheduler.plan()
        sizes.append(plan.tokens)
        scheduler.commit(plan, Sampled([1] * len(plan.samples), [None] * len(plan.samples)))
    assert sizes[:2] == [10, 5]
    assert max(sizes[2:]) == 4


def test_beyond_few_rows_proposals_must_pay_for_all_that_are_computed_at_once() -> None:
    own = limits(max_running=16, blocks=200, max_tokens_per_step=64)
    scheduler = Scheduler(own, speculative=speculative(1))
    for number in range(16):
        scheduler.add(sequence(str(number), [1, 1], max_tokens=9))
    scheduler.commit(scheduler.plan(), Sampled([1] * 16, [None] * 16))
    states = scheduler._decoding
    for one in states[1:]:
        one.speculation = None
    scheduler.rollback(plan := scheduler.plan())
    assert plan.drafts is None, "one token, for which eight rows would be computed"
    for one in states:
        one.speculation = SequenceSpeculation(speculative(1))
        one.speculation.learn(one.tokens)
    assert sum(map(len, scheduler.plan().drafts or ())) == 14, "of the 30 rows there may be"


def test_where_blocks_are_short_what_is_proposed_stays_within_those_there_are() -> None:
    scheduler = Scheduler(limits(blocks=3, prefix_cache=False), speculative=speculative(9))
    scheduler.add(sequence("a", [1, 1, 1, 1, 1], max_tokens=6))
    scheduler.add(sequence("b", [2], max_tokens=1))
    scheduler.commit(plan := scheduler.plan(), Sampled([1], [None]))
    assert [s.id for s in plan.samples] == ["a"]
    plan = hopeful(scheduler).plan()
    assert plan.drafts == [[1, 1]]
    assert plan.extra == []


def test_a_proposed_token_that_cannot_be_sampled_is_left_to_the_next_step() -> None:
    scheduler = drafting([1, 1, 1, 1])
    plan = scheduler.plan()
    assert [plan.supposed(row) for row in range(4)] == [False, True, True, True]
    (event,) = scheduler.commit(plan, Sampled([1, 1, 0, 1], [None] * 4), failed=[2])
    assert event.tokens == [1, 1]


def test_nothing_is_proposed_for_a_structured_answer() -> None:
    structure = StructuredOutputsParams(choice=["a", "b"])
    scheduler = Scheduler(limits(), speculative=speculative(3))
    scheduler.add(sequence("a", [1, 1, 1, 1], structured_outputs=structure))
    scheduler.commit(scheduler.plan(), Sampled([1], [None]))
    assert scheduler.plan().drafts is None


WAYS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0, "seed": 5},
    {"temperature": 0.7, "seed": 6, "top_p": 0.9, "top_k": 40},
    {"temperature": 0.0, "repetition_penalty": 1.5, "frequency_penalty": 0.7},
    {"temperature": 1.0, "seed": 7, "presence_penalty": 1.0},
    {"temperature": 0.0, "min_tokens": 40, "stop_token_ids": [*range(0, VOCAB, 2)]},
    {"temperature": 0.0, "bad_token_ids": [(1, token) for token in range(0, VOCAB, 2)]},
    {"temperature": 1.0, "seed": 8, "logit_bias": {3: 5.0}, "logprobs": 2},
]


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("answered", [0, 29, 38])
def test_a_proposed_token_is_sampled_as_if_those_before_it_had_been_said(
    way: dict[str, Any], answered: int
) -> None:
    """Also where the drawn numbers run out, and where min_tokens is reached."""
    rows, draft = logits(6, seed=answered), [1, 2, 1, 3, 1]
    own = state([1, 2, 3], [1] * answered, **way)
    together = Sampler().sample(rows, [own, *own.after(draft)])
    assert own.position == answered
    one = state([1, 2, 3], [1] * answered, **way)
    apart = []
    for row, token in zip(rows, [*draft, 0], strict=True):
        apart.append(Sampler().sample(row[None], [one]))
        one.append(token)
    assert together.tokens == [each.tokens[0] for each in apart]
    assert together.logprobs == [each.logprobs[0] for each in apart]
    assert torch.equal(rows, logits(6, seed=answered))


def test_what_the_model_proposes_is_checked_in_the_next_step_and_forgotten_after_it() -> None:
    asked = sequence("a", [0, 1, 2, 1, 0], max_tokens=30, ignore_eos=True)
    mtp = SpeculativeSettings(method="mtp", num_speculative_tokens=1)
    scheduler, model = Scheduler(limits(), speculative=mtp), FakeModel(4)
    scheduler.add(asked)
    events, sizes = [], []
    while scheduler.has_work:
        plan = scheduler.plan()
        sampled = model.step(plan)
        drafts = model.propose(plan, sampled)
        if len(sizes) == 6:
            drafts = []  # a step behind which nothing was proposed
        events += scheduler.commit(plan, sampled, proposed=drafts)
        sizes.append(plan.tokens)
    assert tokens_of(events) == answer(asked)
    assert sizes[1] == 2
    assert sizes[7] == 1
    counts = scheduler.draft_counts()
    assert counts is not None
    assert 30 - len(events) == sum(counts.accepted)
    assert 8 <= sum(counts.accepted) < counts.tokens


@pytest.mark.parametrize("method", ["ngram", "mtp"])
@pytest.mark.parametrize("takes", [1.2, 4.0])
def test_where_steps_take_too_long_with_proposed_tokens_there_are_none(
    method: Literal["ngram", "mtp"], takes: float
) -> None:
    """takes: such a step, of what one without takes."""
    eager = {"prompt_lookup_min": 1} if method == "ngram" else {}
    how = SpeculativeSettings(method=method, num_speculative_tokens=1, **eager)
    costs, phases, now = StepCosts(method), DraftPhases(), 0.0
    scheduler = Scheduler(limits(max_model_len=500, blocks=200), speculative=how, phases=phases)
    model, on = FakeModel(4), []
    asked = sequence("a", [0, 1, 2, 1, 0], max_tokens=450, ignore_eos=True)
    scheduler.add(asked)
    events = []
    while scheduler.has_work:
        plan = scheduler.plan()
        assert plan.on == phases.on
        assert plan.on or (plan.drafts is None and not any(plan.asks))
        phases.passed([costs.saved])
        sampled = model.step(plan)
        # by a layer that has keys of all tokens
        proposed = model.propose(replace(plan, on=True), sampled) if method == "mtp" else []
        events += (new := scheduler.commit(plan, sampled, proposed=proposed))
        now += takes if plan.speculates else 1.0
        costs.published(plan, len(new[0].tokens), now)
        on.append(plan.on)
    assert tokens_of(events) == answer(asked, 500)
    assert sum(on[:40]) == 32
    assert (sum(on[80:]) > 0.8 * len(on[80:])) == (takes < 2)
    assert takes < 2 or sum(on[80:]) < 0.4 * len(on[80:])


def test_a_step_is_planned_for_the_least_that_may_come_true_and_has_blocks_for_the_most() -> None:
    mtp = SpeculativeSettings(method="mtp", num_speculative_tokens=3)
    scheduler = Scheduler(limits(blocks=30), speculative=mtp)
    scheduler.add(sequence("a", [0, 1, 2, 1, 0], max_tokens=30, ignore_eos=True))
    commit = scheduler.commit
    commit(first := scheduler.plan(), Sampled([1], [None]), proposed=[[2, 3, 4]])
    assert first.asks == [1]
    hopeful(scheduler)
    second = scheduler.plan()
    assert second.drafts == [[2, 3, 4]]
    assert second.positions.tolist() == [5, 6, 7, 8]
    assert second.asks == [3]
    third = scheduler.plan()
    assert third.drafts == [[0, 0, 0]], "what the device knows"
    assert third.sources is not None
    assert third.sources.tolist() == [0, 1, 2, 3]
    assert third.positions.tolist() == [6, 7, 8, 9]
    assert third.blocks.tolist() == [4], "for 15 tokens, if all come true, and two to be proposed"
    assert third.unseen is not None
    assert third.unseen.tokens.tolist() == [1, 2, 3, 4]
    assert third.unseen.more.tolist() == [3] * 4
    (event,) = commit(second, Sampled([2, 3, 0, 0], [None] * 4), proposed=[[5, 6, 7]])
    assert event.tokens == [2, 3, 0]
    assert third.drafts == [[5, 6, 7]]
    (event,) = commit(third, Sampled([5, 5, 0, 0], [None] * 4), proposed=[[]])
    assert event.tokens == [5, 5]
    assert scheduler.pool.used == 3, "of 10 tokens; the rest went back"


def test_behind_an_answer_with_a_structure_and_its_last_token_the_model_is_not_asked() -> None:
    structure = StructuredOutputsParams(choice=["a", "b"])
    mtp = SpeculativeSettings(method="mtp", num_speculative_tokens=1)
    scheduler = Scheduler(limits(), speculative=mtp)
    scheduler.add(sequence("a", [1, 1, 1], structured_outputs=structure))
    scheduler.add(sequence("b", [1, 1, 1], max_tokens=3))
    scheduler.add(sequence("c", [1, 1, 1], max_tokens=2))
    plan = scheduler.plan()
    assert plan.asks == [0, 1, 0]
    step = DraftRun(plan, [4, 5, 6], ())
    assert step.first.token_ids.tolist() == [1, 1, 4, 1, 1, 5, 1, 1, 6]
    assert step.first.rows.tolist() == [5]
    assert step.samples[0].tokens == [5]
    assert DraftRun(plan, [4, 5, 6], {1}).first.rows.tolist() == []
    step.hear([7], {0})
    assert step.proposed == [[], [], []]
    step.hear([7], ())
    assert step.proposed == [[], [7], []]
