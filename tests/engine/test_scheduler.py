"""The scheduler against a fake model that reads what was really written into the KV cache."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from numpy.typing import NDArray

from flexpert.engine.draft_step import DraftRun
from flexpert.engine.engine_limits import EngineLimits
from flexpert.engine.request import (
    HeldKV,
    RequestSequence,
    SamplingParams,
    StructuredOutputsParams,
    TokenEvent,
    TokenLogprobs,
)
from flexpert.engine.scheduler import Scheduler
from flexpert.engine.sequence import Sampled
from flexpert.engine.step_costs import DraftPhases
from flexpert.engine.step_plan import StepPlan
from flexpert.errors import ConfigError, ContextOverflow, RequestError
from flexpert.models.state_runs import NO_STATE, StateRuns
from flexpert.speculative_settings import SpeculativeSettings

EOS = 6
BY_MODEL = (-1, -3)  # so many tokens are proposed by the model's own layer
Ints = NDArray[np.int64]


def limits(**changed: Any) -> EngineLimits:
    usual: dict[str, Any] = {
        "max_tokens_per_step": 16,
        "max_running": 4,
        "max_model_len": 40,
        "blocks": 12,
        "block_size": 4,
        "prefix_cache": True,
    }
    return EngineLimits(**(usual | changed))


def speculative(most: int) -> SpeculativeSettings:
    """Eager: even single tokens are looked up."""
    return SpeculativeSettings(
        num_speculative_tokens=most, prompt_lookup_min=1, prompt_lookup_max=3, max_rows=30
    )


def sequence(
    id: str, prompt: list[int], generated: list[int] | None = None, **params: Any
) -> RequestSequence:
    return RequestSequence(
        id=id,
        prompt=prompt,
        generated=generated or [],
        params=SamplingParams(**{"temperature": 0.0, **params}),
        eos=(EOS,),
    )


def next_token(tokens: list[int]) -> int:
    """The fake model: a function of all tokens so far, and of nothing else. After a first token 0
    it repeats itself, more often than not."""
    state = 17
    for token in tokens:
        state = (state * 31 + token + 7) % 1000003
    if tokens[0] == 0 and state % 5:
        return (2 * tokens[-1] + 1) % 6
    return state % 7


def answer(s: RequestSequence, max_model_len: int = 40) -> list[int]:
    """What the fake model answers when asked alone."""
    tokens = [*s.prompt, *s.generated]
    stops = {*s.params.stop_token_ids, *(() if s.params.ignore_eos else s.eos)}
    while True:
        tokens.append(next_token(tokens))
        count = len(tokens) - len(s.prompt)
        if tokens[-1] in stops and count > s.params.min_tokens:
            break
        if count == s.params.max_tokens or len(tokens) >= max_model_len:
            break
    return tokens[len(s.prompt) :]


class FakeModel:
    """Remembers what each slot of the cache holds, and reads a sequence only through its table."""

    def __init__(self, block_size: int, width: int = 1) -> None:
        """width: tokens that a step leaves for each sequence."""
        self.block_size = block_size
        self.width = width
        self.cache: dict[int, tuple[int, int]] = {}
        self.states: dict[int, tuple[int, ...]] = {}  # slot → the tokens that its state is of
        # of the draft layer: with the token after; None: it was not computed there
        self.after: dict[int, tuple[int, int] | None] = {}
        self.scores: list[list[TokenLogprobs]] = []  # of the latest step

    def write(self, plan: StepPlan, rows: int | None = None) -> None:
        """The step as far as `rows`: a broken step stops somewhere."""
        for row in range(plan.tokens if rows is None else rows):
            slot = int(plan.slot_mapping[row])
            self.cache[slot] = (int(plan.positions[row]), int(plan.token_ids[row]))

    def spoil(self, plan: StepPlan) -> None:
        """What a broken step may have left: anything, wherever the plan writes to."""
        self.states.update(dict.fromkeys(plan.states.targets if plan.states else (), (-1,)))
        for slot in plan.slot_mapping.tolist():
            self.cache[slot] = self.after[slot] = (-1, -1)

    def place(self, plan: StepPlan, left: list[list[int]], accepted: list[int]) -> StepPlan:
        """What a device does with rows that go on from the step before. left: of each of its
        sequences the last token that counts, and what is proposed to follow it. accepted: how many
        proposed tokens came true in it. Returns the plan with what is proposed in it."""
        if plan.sources is None:
            return plan
        owner = np.repeat(np.arange(len(plan.context_len)), np.diff(plan.query_start))
        for row in np.flatnonzero(plan.sources >= 0).tolist():
            sequence, place = divmod(int(plan.sources[row]), self.width)
            plan.token_ids[row] = left[sequence][place]
            plan.positions[row] += accepted[sequence]
            block, offset = divmod(int(plan.positions[row]), self.block_size)
            if block < plan.block_tables.shape[1]:  # else the answer has ended
                at = int(plan.block_tables[owner[row], block])
                plan.slot_mapping[row] = at * self.block_size + offset
        if plan.drafts is None:
            return plan
        drafts = [
            plan.token_ids[first + 1 : end].tolist()
            for first, end in pairwise(plan.query_start[: plan.decodes + 1].tolist())
        ]
        return replace(plan, drafts=drafts)

    def step(self, plan: StepPlan, before: Sampled | None = None) -> Sampled:
        """before: what the plan before has sampled, if that was not committed yet."""
        if before is not None:
            self.place(plan, [[token] for token in before.tokens], [0] * len(before.tokens))
        self.write(plan)
        self.mix(plan)
        owner = np.repeat(np.arange(len(plan.context_len)), np.diff(plan.query_start))
        tokens = []
        for row in plan.logit_rows.tolist():
            table, seen = plan.block_tables[owner[row]], []
            for position in range(int(plan.positions[row]) + 1):
                block, offset = divmod(position, self.block_size)
                at, token = self.cache[int(table[block]) * self.block_size + offset]
                assert at == position
                seen.append(token)
            if plan.states is not None:
                assert self.state_at(plan.states, row) == tuple(seen)
            tokens.append(next_token(seen))
        self.scores = [
            [
                TokenLogprobs(float(likeliest), [given], [])
                for likeliest, given in zip(tokens[chunk.start :], chunk.tokens, strict=False)
            ]
            for chunk in plan.scored
        ]
        return Sampled([tokens[at] for at in plan.sample_at], [None] * len(plan.sample_at))

    def propose(self, plan: StepPlan, sampled: Sampled) -> list[list[int]]:
        """What the draft layer does behind a step; it errs at each third place."""
        if not plan.on:
            assert not any(plan.asks)
            self.after.update(dict.fromkeys(plan.slot_mapping.tolist()))
            return []
        run = DraftRun(plan, sampled.tokens, ())
        first = run.first
        assert first.token_ids.shape == plan.token_ids.shape
        owner = np.repeat(np.arange(len(plan.context_len)), np.diff(plan.query_start))
        tables = plan.block_tables[owner[first.rows]]
        lasts = plan.positions[first.rows].tolist()
        self.draft(plan.slot_mapping, plan.positions, first.token_ids)
        run.hear(self.judge(run, tables, lasts, lasts), ())
        for place in range(1, max(plan.asks, default=1)):
            step = run.further(self.block_size)
            self.draft(step.slot_mapping, step.positions, step.token_ids)
            known = (step.positions - place).tolist()
            run.hear(self.judge(run, step.block_tables, step.positions.tolist(), known), ())
        return run.proposed

    def draft(self, slots: Ints, positions: Ints, token_ids: Ints) -> None:
        for slot, position, token in zip(
            slots.tolist(), positions.tolist(), token_ids.tolist(), strict=True
        ):
            self.after[slot] = (position, token)

    def judge(
        self, run: DraftRun, tables: NDArray[np.int32], lasts: list[int], known: list[int]
    ) -> list[int]:
        """known: the last position of each that the model itself has computed."""
        tokens = []
        for table, last, computed, state in zip(tables, lasts, known, run.samples, strict=True):
            slots = [
                int(table[position // self.block_size]) * self.block_size
                + position % self.block_size
                for position in range(last + 1)
            ]
            there = [one for slot in slots if (one := self.after[slot]) is not None]
            if len(there) <= last:  # who knows
                tokens.append(1)
                continue
            assert [at for at, _ in there] == [*range(last + 1)]
            seen = [token for _, token in there]
            for position in range(1, computed + 1):
                # of a block that another prompt began with, the last token may be followed by what
                # that one went on with
                block, offset = divmod(position, self.block_size)
                _, token = self.cache[int(table[block]) * self.block_size + offset]
                assert offset == 0 or token == seen[position - 1]
            assert state.tokens[-1] == seen[-1]
            _, first = self.cache[int(table[0]) * self.block_size]
            tokens.append(next_token([first, *seen]) + (last % 3 == 0))
        return tokens

    def mix(self, plan: StepPlan) -> None:
        """What layers with a state do: each run goes on where the state that it reads ends."""
        runs = plan.states
        if runs is None:
            return
        read = {slot for slot in runs.sources if slot not in runs.targets}
        assert not read & set(runs.targets)
        assert len(set(runs.targets)) == len(runs)
        assert runs.begins[-1] == plan.tokens
        for run in range(len(runs)):
            begin, end = runs.begins[run : run + 2]
            source = runs.sources[run]
            before = () if source == NO_STATE else self.states[source]
            assert len(before) == plan.positions[begin]
            assert run >= runs.decodes or (end == begin + 1 and source != NO_STATE)
            self.states[runs.targets[run]] = (*before, *plan.token_ids[begin:end].tolist())

    def state_at(self, runs: StateRuns, row: int) -> tuple[int, ...]:
        """The tokens that went into the state behind a row of the step that was computed last."""
        run = int(np.searchsorted(np.array(runs.begins), row, side="right")) - 1
        behind = self.states[runs.targets[run]]
        return behind[: len(behind) - (runs.begins[run + 1] - row - 1)]


def scores_of(prompt: list[int]) -> list[TokenLogprobs]:
    """What the fake model says of a prompt's tokens from the second on."""
    return [
        TokenLogprobs(float(next_token(prompt[:at])), [prompt[at]], [])
        for at in range(1, len(prompt))
    ]


def check_shapes(plan: StepPlan, own: EngineLimits) -> None:
    rows, sequences, sampled = plan.tokens, len(plan.context_len), len(plan.samples)
    assert rows <= own.max_tokens_per_step
    assert sequences <= own.max_running
    assert plan.token_ids.shape == plan.positions.shape == plan.slot_mapping.shape == (rows,)
    assert plan.query_start.shape == (sequences + 1,)
    assert plan.query_start[0] == 0
    assert plan.query_start[-1] == rows
    assert plan.block_tables.shape[0] == sequences
    scored = sum(len(chunk.tokens) for chunk in plan.scored)
    assert scored <= own.max_scored_per_step
    assert plan.logit_rows.shape == (sampled + scored,)
    assert plan.sample_at.shape == (sampled,)
    assert (np.diff(plan.logit_rows) > 0).all()
    assert len(set(plan.slot_mapping.tolist())) == rows
    ends = set((plan.query_start[1:] - 1).tolist())
    if plan.drafts is not None:
        assert len(plan.drafts) == plan.decodes
        counts = np.diff(plan.query_start[: plan.decodes + 1]).tolist()
        assert counts == [1 + len(draft) for draft in plan.drafts]
        ends |= set(range(plan.query_start[plan.decodes]))
    assert set(plan.logit_rows[plan.sample_at].tolist()) <= ends
    for array in (plan.token_ids, plan.positions, plan.slot_mapping, plan.logit_rows):
        assert array.dtype == np.int64
    for array in (plan.query_start, plan.context_len, plan.block_tables):
        assert array.dtype == np.int32
    for at in range(sequences):
        start, end = plan.query_start[at : at + 2].tolist()
        context = int(plan.context_len[at])
        assert plan.positions[start:end].tolist() == list(range(context - end + start, context))
        blocks = plan.block_tables[at][plan.positions[start:end] // own.block_size]
        slots = blocks * own.block_size + plan.positions[start:end] % own.block_size
        assert plan.slot_mapping[start:end].tolist() == slots.tolist()


def same(a: StepPlan, b: StepPlan) -> bool:
    arrays = ("token_ids", "positions", "query_start", "context_len", "slot_mapping", "logit_rows")
    width = [-(-int(c) // 4) for c in a.context_len]
    return (
        all(np.array_equal(getattr(a, name), getattr(b, name)) for name in arrays)
        and [s.id for s in a.samples] == [s.id for s in b.samples]
        and all(
            a.block_tables[i, :w].tolist() == b.block_tables[i, :w].tolist()
            for i, w in enumerate(width)
        )
    )


def run(
    scheduler: Scheduler, model: FakeModel | None = None, steps: int = 2000
) -> dict[str, list[TokenEvent]]:
    """All events by sequence, until there is no work."""
    model = model or FakeModel(scheduler.limits.block_size)
    events: dict[str, list[TokenEvent]] = {}
    for _ in range(steps):
        if not scheduler.has_work:
            return events
        plan = scheduler.plan()
        check_shapes(plan, scheduler.limits)
        for event in scheduler.commit(plan, model.step(plan), scores=model.scores):
            events.setdefault(event.id, []).append(event)
    raise AssertionError("the scheduler does not come to an end")


def tokens_of(events: list[TokenEvent]) -> list[int]:
    return [token for event in events for token in event.tokens]


def test_a_long_prompt_is_computed_in_chunks_beside_decoding() -> None:
    scheduler, model = Scheduler(limits(max_tokens_per_step=5, blocks=40)), FakeModel(4)
    scheduler.add(sequence("a", [1, 2, 3], max_tokens=20, ignore_eos=True))
    scheduler.commit(first := scheduler.plan(), model.step(first))
    scheduler.add(sequence("b", list(range(10)), max_tokens=2, ignore_eos=True))
    sizes, sampled = [], []
    for _ in range(4):
        plan = scheduler.plan()
        sizes.append(np.diff(plan.query_start).tolist())
        sampled.append([s.id for s in plan.samples])
        scheduler.commit(plan, model.step(plan))
    assert sizes == [[1, 4], [1, 4], [1, 2], [1, 1]]
    assert sampled == [["a"], ["a"], ["a", "b"], ["a", "b"]]


def test_a_prompt_cut_one_token_before_its_end_is_not_taken_for_complete() -> None:
    scheduler, model = Scheduler(limits(max_tokens_per_step=5)), FakeModel(4)
    own = [sequence("a", [1, 2], max_tokens=3), sequence("b", [1, 2, 3, 4], max_tokens=3)]
    for s in own:
        scheduler.add(s)
    plan = scheduler.plan()
    assert np.diff(plan.query_start).tolist() == [2, 3]
    scheduler.commit(plan, model.step(plan))
    events = run(scheduler, model)
    assert tokens_of(events["b"]) == answer(own[1])


def test_an_empty_scheduler_plans_an_empty_step() -> None:
    scheduler = Scheduler(limits())
    plan = scheduler.plan()
    check_shapes(plan, scheduler.limits)
    assert (plan.tokens, plan.query_start.tolist()) == (0, [0])
    assert scheduler.commit(plan, Sampled([], [])) == []
    assert not scheduler.has_work


def test_a_shared_prefix_is_computed_once() -> None:
    scheduler, model = Scheduler(limits(max_running=4)), FakeModel(4)
    prompt = list(range(5)) * 2
    scheduler.add(sequence("a", prompt, max_tokens=5))
    first = run(scheduler, model)
    scheduler.add(sequence("b", prompt, max_tokens=5))
    plan = scheduler.plan()
    assert plan.tokens == 2
    assert plan.positions.tolist() == [8, 9]
    scheduler.rollback(plan)
    assert tokens_of(run(scheduler, model)["b"]) == tokens_of(first["a"])
    assert scheduler.cached_tokens == 8


def with_states(**changed: Any) -> tuple[Scheduler, FakeModel]:
    """A scheduler for a model whose layers keep a state of each sequence."""
    own = limits(**{"state_slots": 12, "blocks": 60, **changed})
    return Scheduler(own), FakeModel(own.block_size)


def test_a_step_on_top_of_another_goes_on_with_the_states_that_it_will_leave() -> None:
    scheduler, model = with_states(max_running=3, state_slots=12)
    scheduler.add(sequence("a", [1, 2, 3], max_tokens=9, ignore_eos=True))
    scheduler.commit(begin := scheduler.plan(), model.step(begin))
    first = scheduler.plan()
    given = model.step(first)
    assert scheduler.looks_ahead
    second = scheduler.plan()
    assert first.states is not None
    assert second.states is not None
    assert second.states.sources == first.states.targets
    assert len({*first.states.sources, *first.states.targets, *second.states.targets}) == 3
    scheduler.rollback(second)
    scheduler.commit(first, given)
    assert len(run(scheduler, model)["a"]) == 7


def cached(scheduler: Scheduler, model: FakeModel, name: str, prompt: list[int]) -> int:
    """Tokens of a prompt that were found, and its answer computed."""
    before = scheduler.cached_tokens
    scheduler.add(sequence(name, prompt, max_tokens=10, ignore_eos=True))
    run(scheduler, model)
    return scheduler.cached_tokens - before


def test_a_prompt_goes_on_where_a_state_was_kept_of_one_like_it() -> None:
    scheduler, model = with_states()
    first = list(range(11))
    assert cached(scheduler, model, "a", first) == 0
    assert cached(scheduler, model, "again", first) == 8
    said = [*first, *answer(sequence("", first, max_tokens=10, ignore_eos=True))]
    assert cached(scheduler, model, "next turn", [*said, 5, 5, 5]) == 20  # of 21, the last is not


@pytest.mark.parametrize("said", range(6, 14))
def test_the_end_of_a_block_that_proposed_tokens_went_beyond_is_kept(said: int) -> None:
    own = limits(state_slots=30, blocks=60)
    by_model = SpeculativeSettings(method="mtp", num_speculative_tokens=3)
    scheduler, model = Scheduler(own, speculative=by_model), FakeModel(own.block_size, 4)
    prompt, steps = list(range(11)), 0
    asked = sequence("a", prompt, max_tokens=said, ignore_eos=True)
    scheduler.add(asked)
    while scheduler.has_work:
        plan = scheduler.plan()
        sampled = model.step(plan)
        scheduler.commit(plan, sampled, proposed=model.propose(plan, sampled))
        steps += 1
    assert steps < said
    conversation = [*prompt, *answer(asked)]
    found = cached(scheduler, model, "next turn", [*conversation, 5, 5, 5])
    assert found == (len(conversation) - 1) // 4 * 4


def test_a_state_is_kept_where_a_prompt_left_an_earlier_one() -> None:
    scheduler, model = with_states()
    shared = [1, 2, 3, 4, 5, 6, 7, 8]
    found = [cached(scheduler, model, str(n), [*shared, n, n, n, n, n]) for n in range(20, 24)]
    assert found == [0, 0, 8, 8]


def test_states_are_kept_only_as_far_as_slots_that_nobody_needs() -> None:
    scheduler, model = with_states(max_running=2, state_slots=6)
    prompts = [[n] * 9 for n in range(20, 30)]
    assert [cached(scheduler, model, f"{p[0]}", p) for p in prompts] == [0] * 10
    assert cached(scheduler, model, "latest", prompts[-1]) == 8
    assert cached(scheduler, model, "first", prompts[0]) == 0


def test_states_of_tokens_without_some_experts_are_not_kept() -> None:
    scheduler, model = with_states()
    prompt = list(range(11))
    scheduler.add(sequence("a", prompt, max_tokens=1))
    plan = scheduler.plan()
    scheduler.commit(plan, model.step(plan), np.arange(plan.tokens) == 3)
    assert cached(scheduler, model, "b", prompt) == 0


def test_a_state_comes_with_its_keys_and_values_or_all_is_computed_again() -> None:
    scheduler, _ = with_states()
    moved = sequence("a", list(range(9)), [1, 2])
    assert scheduler.adopt(moved, HeldKV("a", 10, [0, 1, 2]), []) is None
    scheduler.abort("a")
    assert scheduler.adopt(moved, HeldKV("a", 9, [0, 1, 2], 7), []) is not None
    assert scheduler.state_slot("a") is not None


def test_a_block_is_reused_only_after_its_step_was_whole() -> None:
    scheduler, model = Scheduler(limits(max_tokens_per_step=40, blocks=20)), FakeModel(4)
    scheduler.add(sequence("a", [1] * 9, max_tokens=5))
    scheduler.rollback(scheduler.plan())
    scheduler.add(sequence("b", [1] * 9, max_tokens=5))
    plan = scheduler.plan()
    assert np.diff(plan.query_start).tolist() == [9, 9]
    scheduler.commit(plan, model.step(plan))
    scheduler.add(sequence("c", [1] * 9, max_tokens=5))
    assert np.diff(scheduler.plan().query_start).tolist() == [1, 1, 1]


def test_the_latest_arrival_is_preempted_keeps_its_tokens_and_comes_back_first() -> None:
    scheduler, model = Scheduler(limits(blocks=6, max_running=3, prefix_cache=False)), FakeModel(4)
    own = [
        sequence(name, [at] * 3, max_tokens=15, ignore_eos=True) for at, name in enumerate("abcd")
    ]
    for s in own:
        scheduler.add(s)
    events: dict[str, list[TokenEvent]] = {}
    left: list[str] = []
    while scheduler.has_work:
        before = scheduler.preemptions
        plan = scheduler.plan()
        for event in scheduler.commit(plan, model.step(plan)):
            events.setdefault(event.id, []).append(event)
        left += [s.id for s in list(scheduler._waiting)[: scheduler.preemptions - before]]
    assert left
    assert set(left) <= {"b", "c", "d"}
    for s in own:
        assert tokens_of(events[s.id]) == answer(s)
        assert [e.position for e in events[s.id]] == list(range(15))
    ends = [next(i for i, e in enumerate(events[n]) if e.finish) for n in "abcd"]
    assert ends == [14] * 4


def test_the_same_plan_with_the_same_blocks_comes_again_after_a_rollback() -> None:
    scheduler, model = Scheduler(limits(blocks=20)), FakeModel(4)
    for name in "abc":
        scheduler.add(sequence(name, [1, 2, 3, 4], max_tokens=9, ignore_eos=True))
    scheduler.commit(plan := scheduler.plan(), model.step(plan))
    scheduler.add(sequence("d", [1, 2, 3, 4, 5], max_tokens=9))
    first = scheduler.plan()  # a block more for each of three, and d with a shared one
    scheduler.rollback(first)
    second = scheduler.plan()
    assert same(first, second)
    assert len(set(second.slot_mapping.tolist())) == 4


def test_admission_leaves_a_spare_block_for_each_that_runs() -> None:
    scheduler, model = Scheduler(limits(blocks=6, prefix_cache=False)), FakeModel(4)
    for name in "ab":
        scheduler.add(sequence(name, [1, 2, 3, 4], max_tokens=2, ignore_eos=True))
    scheduler.add(sequence("c", [1] * 9, max_tokens=2, ignore_eos=True))
    plan = scheduler.plan()  # c would need 3 of the 4 free blocks, a and b one each
    assert len(plan.context_len) == 2
    scheduler.commit(plan, model.step(plan))
    run(scheduler, model)
    assert scheduler.preemptions == 0


def test_a_resumed_sequence_goes_on_where_it_was() -> None:
    whole = sequence("a", [3, 1, 4, 1, 5], max_tokens=12, ignore_eos=True)
    want = answer(whole)
    scheduler = Scheduler(limits())
    scheduler.add(sequence("a", whole.prompt, want[:7], max_tokens=12, ignore_eos=True))
    events = run(scheduler)["a"]
    assert events[0].position == 7
    assert tokens_of(events) == want[7:]
    assert [e.finish for e in events] == [None] * 4 + ["length"]


@pytest.mark.parametrize(
    ("params", "generated", "finish"),
    [
        ({"max_tokens": 9}, [EOS], ["stop"]),
        ({"max_tokens": 1}, [EOS], ["stop"]),
        ({"max_tokens": 3, "ignore_eos": True}, [EOS, 1, 1], [None, None, "length"]),
        ({"max_tokens": 9, "min_tokens": 2}, [EOS, EOS, EOS], [None, None, "stop"]),
        ({"max_tokens": 9, "stop_token_ids": (5,)}, [4, 5], [None, "stop"]),
        ({"max_tokens": 9, "ignore_eos": True, "stop_token_ids": (5,)}, [6, 5], [None, "stop"]),
        ({"max_tokens": None}, [1, 1, 1], [None, None, "length"]),
    ],
)
def test_finish_rules(params: dict[str, Any], generated: list[int], finish: list[str]) -> None:
    scheduler = Scheduler(limits(max_model_len=8))
    scheduler.add(sequence("a", [1] * 5, **params))
    got = []
    for token in generated:
        (event,) = scheduler.commit(scheduler.plan(), Sampled([token], [None]))
        got.append(event.finish)
    assert got == finish
    assert not scheduler.has_work
    assert scheduler.kv_used == 0


def test_a_lower_number_is_admitted_earlier_and_preempted_later() -> None:
    scheduler, model = Scheduler(limits(max_running=1)), FakeModel(4)
    order = [("a", 0), ("b", 5), ("c", 0), ("d", -1), ("e", 5), ("f", -1)]
    for name, priority in order:
        scheduler.add(sequence(name, [1], max_tokens=1, priority=priority))
    assert list(run(scheduler, model)) == ["d", "f", "a", "c", "b", "e"]
    scheduler, model = Scheduler(limits(blocks=6, max_running=3, prefix_cache=False)), FakeModel(4)
    own = [
        sequence(name, [at] * 3, max_tokens=15, ignore_eos=True, priority=-at)
        for at, name in enumerate("abc")
    ]
    for s in own:
        scheduler.add(s)
    events = run(scheduler, model)
    assert scheduler.preemptions > 0
    ends = {name: [e.finish for e in events[name]].index("length") for name in "abc"}
    assert ends == dict.fromkeys("abc", 14)
    assert list(events) == ["c", "b", "a"]
    for s in own:
        assert tokens_of(events[s.id]) == answer(s)


def test_a_stream_that_has_begun_elsewhere_goes_on_before_others_begin() -> None:
    scheduler, model = Scheduler(limits(max_running=1)), FakeModel(4)
    for name, begun, priority in (
        *(("a", [], 0), ("b", [], 0), ("c", [3], 0), ("d", [3], 0)),
        *(("e", [3], 1), ("f", [], -1)),
    ):
        scheduler.add(sequence(name, [1], generated=begun, max_tokens=2, priority=priority))
    assert list(run(scheduler, model)) == ["f", "c", "d", "a", "b", "e"]


def test_a_salt_keeps_equal_prompts_apart() -> None:
    scheduler, model = Scheduler(limits()), FakeModel(4)
    for name, salt in (("a", ""), ("b", "x"), ("c", "y"), ("d", "x")):
        scheduler.add(sequence(name, [1] * 9, max_tokens=1, cache_salt=salt))
        (event,) = run(scheduler, model)[name]
        assert event.cached == (8 if name == "d" else 0)


def test_log_probabilities_of_a_prompt_come_with_the_first_token() -> None:
    scheduler, model = Scheduler(limits(max_scored_per_step=3)), FakeModel(4)
    prompt = [1, 2, 3, 4, 5, 0, 1, 2, 3]
    scheduler.add(sequence("before", prompt, max_tokens=1))
    run(scheduler, model)
    scheduler.add(sequence("a", prompt, max_tokens=2, prompt_logprobs=0, ignore_eos=True))
    first, second = run(scheduler, model)["a"]
    assert first.prompt_logprobs == scores_of(prompt)
    assert first.cached == 0, "what is not computed tells nothing"
    assert second.prompt_logprobs is None
    scheduler.add(sequence("b", prompt, max_tokens=4, prompt_logprobs=0, ignore_eos=True))
    scheduler.commit(plan := scheduler.plan(), model.step(plan), scores=model.scores)
    (held,) = scheduler.hand_over()
    assert held.computed == 0, "it begins anew elsewhere"


def test_logprobs_travel_with_their_token() -> None:
    scheduler = Scheduler(limits())
    scheduler.add(sequence("a", [1], max_tokens=3, logprobs=1))
    one = TokenLogprobs(-0.5, [2], [-0.5])
    (event,) = scheduler.commit(scheduler.plan(), Sampled([2], [one]))
    assert event.logprobs == [one]


def test_what_can_never_be_answered_is_refused() -> None:
    scheduler = Scheduler(limits(max_model_len=60))
    with pytest.raises(ContextOverflow, match="the prompt may have 59"):
        scheduler.add(sequence("a", [1] * 60))
    with pytest.raises(ContextOverflow, match="may reach 50 tokens"):
        scheduler.add(sequence("a", [1] * 40, max_tokens=10))
    with pytest.raises(RequestError, match="empty"):
        scheduler.add(sequence("a", []))
    with pytest.raises(ValueError, match="no seed"):
        scheduler.add(sequence("a", [1], temperature=1.0))
    with pytest.raises(ValueError, match="already complete"):
        scheduler.add(sequence("a", [1], [2, 3], max_tokens=2))
    assert not scheduler.has_work
    exact = sequence("a", [1] * 40, max_tokens=9, ignore_eos=True)
    scheduler.add(exact)
    with pytest.raises(ValueError, match="already here"):
        scheduler.add(exact)
    assert tokens_of(run(scheduler)["a"]) == answer(exact, 60)
    with pytest.raises(ConfigError, match="blocks"):
        limits(blocks=0)


def test_a_plan_is_used_once() -> None:
    scheduler = Scheduler(limits())
    scheduler.add(sequence("a", [1]))
    plan = scheduler.plan()
    scheduler.rollback(scheduler.plan())
    with pytest.raises(ValueError, match="2 tokens for 1"):
        scheduler.commit(plan, Sampled([1, 2], [None, None]))
    scheduler.rollback(plan)
    for use in (lambda: scheduler.rollback(plan), lambda: scheduler.commit(plan, Sampled([], []))):
        with pytest.raises(ValueError, match="not the one in flight"):
            use()


def test_the_next_step_is_planned_while_one_is_computed() -> None:
    scheduler, model = Scheduler(limits()), FakeModel(4)
    asked = [sequence(name, [1, 2, 3], max_tokens=9, ignore_eos=True) for name in "ab"]
    for one in asked:
        scheduler.add(one)
    first = scheduler.plan()
    tokens = model.step(first)
    assert scheduler.looks_ahead
    second = scheduler.plan()
    check_shapes(second, scheduler.limits)
    assert second.sources is not None
    assert second.sources.tolist() == [0, 1]
    assert second.positions.tolist() == [3, 3]
    assert not scheduler.looks_ahead
    with pytest.raises(RuntimeError, match="in flight"):
        scheduler.plan()
    with pytest.raises(ValueError, match="not the one in flight"):
        scheduler.commit(second, model.step(second, tokens))
    with pytest.raises(ValueError, match="not the one in flight"):
        scheduler.rollback(first)
    scheduler.rollback(second)
    again = scheduler.plan()
    after = model.step(again, tokens)
    answers = {
        one.id: [event] for one, event in zip(asked, scheduler.commit(first, tokens), strict=True)
    }
    for event in scheduler.commit(again, after):
        answers[event.id].append(event)
    for name, events in run(scheduler, model).items():
        answers[name] += events
    assert {one.id: tokens_of(answers[one.id]) for one in asked} == {
        one.id: answer(one) for one in asked
    }


def test_an_answer_that_ends_unseen_holds_its_blocks_until_the_next_step_is_over() -> None:
    scheduler, model = Scheduler(limits()), FakeModel(4)
    prompt = next(p for n in range(99) if next_token(p := [n % 7, n // 7]) == EOS)
    scheduler.add(sequence("a", prompt, max_tokens=9))
    first = scheduler.plan()
    tokens = model.step(first)
    second = scheduler.plan()
    (event,) = scheduler.commit(first, tokens)
    assert event.finish == "stop"
    assert not scheduler.has_work
    assert scheduler.pool.used == 1
    assert scheduler.commit(second, model.step(second, tokens)) == []
    assert scheduler.pool.used == 0


@pytest.mark.parametrize(
    "params",
    [
        {"repetition_penalty": 1.2},
        {"bad_token_ids": [(1, 2)]},
        {"structured_outputs": StructuredOutputsParams(choice=["a", "b"])},
    ],
)
def test_nothing_is_planned_ahead_where_the_next_token_depends_on_the_last(
    params: dict[str, Any],
) -> None:
    scheduler = Scheduler(limits())
    scheduler.add(sequence("a", [1, 2], max_tokens=9))
    scheduler.add(sequence("b", [1, 2], max_tokens=9, **params))
    scheduler.plan()
    assert not scheduler.looks_ahead


def test_nothing_is_planned_ahead_where_blocks_are_short() -> None:
    scheduler, model = Scheduler(limits(blocks=10)), FakeModel(4)
    for name in "ab":
        scheduler.add(sequence(name, [1, 2, 3, 4, 5], max_tokens=20, ignore_eos=True))
    ahead = []
    while scheduler.has_work:
        plan = scheduler.plan()
        ahead.append(scheduler.looks_ahead)
        scheduler.commit(plan, model.step(plan))
    assert ahead[0]
    assert not all(ahead[:-1])


def test_an_abort_in_flight_is_honoured_and_its_id_can_come_again() -> None:
    scheduler, model = Scheduler(limits()), FakeModel(4)
    for name in "ab":
        scheduler.add(sequence(name, [1, 2], max_tokens=4, ignore_eos=True))
    plan = scheduler.plan()
    assert scheduler.abort("a")
    assert not scheduler.abort("a")
    scheduler.add(again := sequence("a", [4, 4], max_tokens=2, ignore_eos=True))
    assert [e.id for e in scheduler.commit(plan, model.step(plan))] == ["b"]
    assert tokens_of(run(scheduler, model)["a"]) == answer(again)
    assert scheduler.kv_used == 0


def test_drain_takes_everything_out_in_order_of_arrival() -> None:
    scheduler, model = Scheduler(limits(max_running=2)), FakeModel(4)
    for name in "abcd":
        scheduler.add(sequence(name, [1, 2, 3], max_tokens=9, ignore_eos=True))
    scheduler.commit(plan := scheduler.plan(), model.step(plan))
    scheduler.plan()
    assert scheduler.drain() == ["a", "b", "c", "d"]
    assert (scheduler.running, scheduler.waiting, scheduler.kv_used) == (0, 0, 0.0)
    assert not scheduler.has_work
    assert scheduler.plan().tokens == 0


@dataclass(frozen=True)
class InFlight:
    """A step that was launched, and what it has given. drafted: its plan with all that the device
    knows of it."""

    plan: StepPlan
    drafted: StepPlan
    sampled: Sampled
    scores: list[list[TokenLogprobs]]
    proposed: list[list[int]]


class Life(RuleBasedStateMachine):
    """Adds, arrivals with KV, aborts, whole steps and broken ones in any order; then everything
    must complete."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: dict[str, RequestSequence] = {}
        self.got: dict[str, list[int]] = {}
        self.done: set[str] = set()
        self.started: list[str] = []
        self.came: set[str] = set()  # from another rank
        self.late: set[str] = set()  # overtake, or are overtaken
        self.in_flight: list[InFlight] = []
        self.ahead = 0  # steps with proposed tokens that the host did not know when they began
        self.broken: StepPlan | None = None  # rolled back, and nothing happened since
        self.quiet = True  # nothing was added or aborted since the plan
        self.visible: tuple[Any, ...] = ()  # before the plan

    @initialize(
        budget=st.sampled_from([1, 3, 8, 30]),
        running=st.sampled_from([1, 2, 5]),
        blocks=st.sampled_from([10, 11, 14, 30]),
        prefix_cache=st.booleans(),
        scored=st.sampled_from([1, 4, 256]),
        states=st.sampled_from([0, 0, 2, 3, 4]),
        proposed=st.sampled_from([0, 0, 1, 3, 9, *BY_MODEL, *BY_MODEL]),
    )
    def begin(
        self,
        budget: int,
        running: int,
        blocks: int,
        prefix_cache: bool,
        scored: int,
        proposed: int,
        states: int = 0,
    ) -> None:
        own = limits(
            max_tokens_per_step=budget,
            max_running=running,
            blocks=blocks,
            prefix_cache=prefix_cache,
            max_scored_per_step=scored,
            state_slots=states * min(running, budget),
        )
        how = speculative(proposed) if proposed > 0 else None
        if proposed in BY_MODEL:
            how = SpeculativeSettings(method="mtp", num_speculative_tokens=-proposed)
        self.drafts = proposed in BY_MODEL
        self.phases, self.commits = DraftPhases(), 0
        self.scheduler = Scheduler(own, speculative=how, phases=self.phases)
        self.model = FakeModel(own.block_size, 1 - proposed if self.drafts else 1)

    def look(self) -> tuple[Any, ...]:
        s = self.scheduler
        return (s.running, s.waiting, s.kv_used, s.has_work, s.preemptions, s.cached_tokens)

    @rule(
        prompt=st.lists(st.integers(0, 1), min_size=1, max_size=22),
        resumed=st.integers(0, 6),
        max_tokens=st.integers(1, 18),
        ignore_eos=st.booleans(),
        scored=st.booleans(),
        priority=st.sampled_from([0, 0, 0, 1, -1]),
    )
    def add(
        self,
        prompt: list[int],
        resumed: int,
        max_tokens: int,
        ignore_eos: bool,
        scored: bool,
        priority: int = 0,
    ) -> None:
        name = str(len(self.asked))
        params: dict[str, Any] = {"max_tokens": max_tokens, "ignore_eos": ignore_eos}
        params["priority"] = priority
        if priority or resumed:
            self.late.add(name)
        if scored:
            params["prompt_logprobs"] = 0
        before = answer(sequence(name, prompt, **params))[:-1][:resumed]
        self.asked[name] = sequence(name, prompt, before, **params)
        self.got[name] = list(before)
        self.scheduler.add(self.asked[name])
        self.broken, self.quiet = None, False

    @precondition(lambda self: not self.in_flight)
    @rule(
        prompt=st.lists(st.integers(0, 1), min_size=1, max_size=22),
        resumed=st.integers(0, 6),
        computed=st.integers(0, 28),
        ahead=st.booleans(),
    )
    def adopt(self, prompt: list[int], resumed: int, computed: int, ahead: bool) -> None:
        """From another rank, which has computed some of it; ahead: its full blocks are here."""
        name, size, pool = str(len(self.asked)), 4, self.scheduler.pool
        before = answer(sequence(name, prompt, max_tokens=18))[:-1][:resumed]
        s = self.asked[name] = sequence(name, prompt, before, max_tokens=18)
        self.got[name] = list(before)
        tokens = [*prompt, *before]
        computed = min(computed, len(tokens) - 1)
        full = computed // size
        ahead = ahead and full <= pool.free_count - self.scheduler.running - 1
        have = pool.allocate(full) if ahead else []
        queue = [waits for waits in self.scheduler._waiting if waits.blocks]
        pairs = self.scheduler.adopt(
            s, HeldKV(name, computed, list(range(-(-computed // size))), state=0), have
        )
        if pairs is not None and (slot := self.scheduler.state_slot(name)) is not None:
            self.model.states[slot] = tuple(tokens[:computed])
        for there, here in [*enumerate(have), *(pairs or [])]:
            for at in range(there * size, min((there + 1) * size, computed)):
                self.model.cache[here * size + at % size] = (at, tokens[at])
                self.model.after[here * size + at % size] = (at, tokens[at + 1])
        if pairs is not None:
            state = self.scheduler._states[name]
            assert computed == state.computed
            assert state.row < 0 or not queue, "it overtakes who waits with KV"
            self.scheduler.settle(name)
        self.came.add(name)
        self.broken, self.quiet = None, False

    @precondition(lambda self: set(self.asked) - self.done)
    @rule(pick=st.integers(0, 99))
    def abort(self, pick: int) -> None:
        here = sorted(set(self.asked) - self.done)
        name = here[pick % len(here)]
        assert self.scheduler.abort(name)
        self.done.add(name)
        self.broken, self.quiet = None, False

    @precondition(lambda self: not self.in_flight)
    @rule()
    def plan(self) -> None:
        before = self.look()
        plan = self.launch()
        assert self.look() == before
        assert (plan.tokens > 0) == self.scheduler.has_work
        if self.broken is not None:
            assert same(plan, self.broken)
        self.broken, self.visible, self.quiet = None, before, True

    @precondition(lambda self: self.in_flight and self.scheduler.looks_ahead)
    @rule()
    def plan_ahead(self) -> None:
        before = self.look()
        self.launch()
        assert self.look() == before

    def launch(self) -> StepPlan:
        plan = self.scheduler.plan()
        check_shapes(plan, self.scheduler.limits)
        drafted = plan
        if self.in_flight:
            before, sampled = self.in_flight[-1].drafted, self.in_flight[-1].sampled
            runs, proposed = before.runs(sampled.tokens, ()), self.in_flight[-1].proposed
            left = [
                [sampled.tokens[run.stop - 1], *further]
                for run, further in zip(runs, proposed or [[]] * len(runs), strict=True)
            ]
            drafted = self.model.place(plan, left, [len(run) - 1 for run in runs])
        sampled = self.model.step(drafted)
        scores = self.model.scores
        proposed = self.model.propose(drafted, sampled) if self.drafts else []
        self.in_flight.append(InFlight(plan, drafted, sampled, scores, proposed))
        return plan

    @precondition(lambda self: self.in_flight)
    @rule(steps=st.integers(0, 5))
    def commit(self, steps: int) -> None:
        self.finish_step()
        self.quiet = False
        for _ in range(steps):
            if not self.in_flight or self.scheduler.looks_ahead:
                self.launch()
            self.finish_step()

    @precondition(lambda self: self.in_flight)
    @rule()
    def rollback(self) -> None:
        first = self.in_flight[0].plan
        for flight in reversed(self.in_flight):
            self.model.spoil(flight.plan)
            self.scheduler.rollback(flight.plan)
        if self.quiet:
            assert self.look() == self.visible
            self.broken = first
        self.in_flight = []

    def finish_step(self) -> None:
        flight = self.in_flight.pop(0)
        self.commits += 1
        self.phases.on = self.commits % 30 < 22
        events = self.scheduler.commit(
            flight.plan, flight.sampled, scores=flight.scores, proposed=flight.proposed
        )
        self.ahead += flight.plan.sources is not None and flight.plan.drafts is not None
        for event in events:
            assert event.id not in self.done
            asked = self.asked[event.id]
            scored = asked.params.prompt_logprobs is not None and event.position == 0
            assert event.prompt_logprobs == (scores_of(asked.prompt) if scored else None)
            if event.id not in self.started:
                self.started.append(event.id)
            assert event.position == len(self.got[event.id])
            self.got[event.id] += event.tokens
            if event.finish:
                self.done.add(event.id)
                assert self.got[event.id] == answer(sequence_without_past(self.asked[event.id]), 40)

    @invariant()
    def nothing_is_leaked_or_shared_wrongly(self) -> None:
        if not hasattr(self, "scheduler") or self.in_flight:
            return
        pool = self.scheduler.pool
        running = [*self.scheduler._decoding, *self.scheduler._prefilling]
        with_kv = [s for s in self.scheduler._waiting if s.blocks]
        held = [block for s in (*running, *with_kv) for block in s.blocks]
        assert [pool.refs(b) for b in range(pool.blocks)] == [
            held.count(b) for b in range(pool.blocks)
        ]
        slots = self.scheduler._slots
        if slots is not None:
            held = [s.state.slot for s in (*running, *with_kv)]
            refs = [slots._pool.refs(slot) for slot in range(slots.slots)]
            assert refs == [held.count(slot) for slot in range(slots.slots)]
        for s in (*running, *with_kv):  # what it may still write to is its own
            assert all(pool.refs(b) == 1 for b in s.blocks[s.computed // 4 :])
        for s in self.scheduler._decoding:
            assert len(s.blocks) == -(-s.computed // 4), "what was taken for more goes back"
        assert len({s.row for s in running}) == len(running)
        assert set(self.scheduler._states) == set(self.asked) - self.done

    @invariant()
    def nobody_overtakes(self) -> None:
        started = [name for name in self.started if name not in self.came | self.late]
        assert started == sorted(started, key=int)
        if hasattr(self, "scheduler"):
            s = self.scheduler
            every = [each.id for each in (*s._decoding, *s._prefilling, *s._waiting)]
            order = [int(name) for name in every if name not in self.came | self.late]
            assert order == sorted(order)
            with_kv = [bool(each.blocks) for each in s._waiting]
            assert with_kv == sorted(with_kv, reverse=True), "who holds blocks waits in front"

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        if self.in_flight:
            self.rollback()
        for _ in range(3000):
            if not self.scheduler.has_work:
                break
            self.launch()
            self.finish_step()
        assert self.done == set(self.asked)
        assert self.scheduler.pool.used == 0
        assert self.scheduler._slots is None or self.scheduler._slots.used == 0


def sequence_without_past(s: RequestSequence) -> RequestSequence:
    return RequestSequence(id=s.id, prompt=s.prompt, generated=[], params=s.params, eos=s.eos)


TestLife = Life.TestCase
TestLife.settings = settings(
    max_examples=120, stateful_step_count=40, deadline=None, derandomize=True
)


@pytest.mark.parametrize("arrivals", [False, True])
@pytest.mark.parametrize("seed", range(60))
def test_long_random_lives_under_pressure(seed: int, arrivals: bool) -> None:
    """The rules of `Life`, by a random walk that keeps the cache full for long."""
    random, life = Random(seed), Life()
    life.begin(
        budget=random.choice([3, 8, 30]),
        running=random.choice([2, 5]),
        blocks=random.choice([10, 14, 18, 30]),
        prefix_cache=random.random() < 0.6,
        scored=random.choice([1, 4, 256]),
        states=random.choice([0, 2, 3, 4]),
        proposed=random.choice([0, 2, 9, *BY_MODEL]),
    )
    for _ in range(150):
        if len(life.asked) - len(life.done) < 8 and random.random() < 0.5:
            prompt = random.choices([0, 1], k=random.choice([1, 4, 5, 12, 22]))
            if random.random() < 0.4:
                prompt = [0] * len(prompt)
            life.add(
                prompt=prompt,
                resumed=random.randrange(5),
                max_tokens=18,
                ignore_eos=True,
                scored=random.random() < 0.3,
                priority=random.choice([0, 0, 0, 1, -1]),
            )
        if arrivals and not life.in_flight and random.random() < 0.2:
            prompt = random.choices([0, 1], k=random.choice([1, 5, 12, 22]))
            life.adopt(
                prompt=prompt,
                resumed=random.randrange(5),
                computed=random.randrange(28),
                ahead=random.random() < 0.5,
            )
        if len(life.done) < len(life.asked) and random.random() < 0.04:
            life.abort(pick=random.randrange(100))
        if not life.in_flight:
            life.plan()
        elif life.scheduler.looks_ahead and random.random() < 0.6:
            life.plan_ahead()
        elif random.random() < 0.4:
            life.rollback()
        else:
            life.commit(steps=random.choice([0, 0, 1, 4]))
        life.nothing_is_leaked_or_shared_wrongly()
        life.nobody_overtakes()
    life.teardown()
