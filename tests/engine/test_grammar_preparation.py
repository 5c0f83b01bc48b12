"""Sequences wait for their grammars outside of the scheduler, and leave no trace there."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from typing import Any

import pytest

from flexpert.engine import rank_protocol as msg
from flexpert.engine.engine_limits import EngineLimits
from flexpert.engine.grammar_preparation import GrammarPreparer, GrammarReady
from flexpert.engine.output_grammar import GrammarCache, resolve
from flexpert.engine.request import RequestSequence, SamplingParams, StructuredOutputsParams
from flexpert.engine.scheduler import Scheduler
from flexpert.engine.sequence_intake import SequenceIntake
from flexpert.errors import ModelError
from flexpert.models.source import ModelSource

LIMITS = EngineLimits(
    max_tokens_per_step=8,
    max_running=4,
    max_model_len=100,
    blocks=16,
    block_size=16,
    prefix_cache=True,
)


class Rank:
    """An intake with its scheduler; `settle` hands it what the thread has done."""

    def __init__(self, tokens: Any) -> None:
        self.ready: queue.Queue[GrammarReady] = queue.Queue()
        self.said: list[msg.Report] = []
        self.grammars = GrammarCache(tokens)
        self.preparer = GrammarPreparer(self.grammars, self.ready.put)
        self.scheduler = Scheduler(LIMITS)
        self.intake = SequenceIntake(self.scheduler, self.said.append, self.preparer)

    def settle(self) -> None:
        self.intake.grammar_ready(self.ready.get(timeout=10))


@pytest.fixture(scope="module")
def source() -> ModelSource:
    return ModelSource.open("tiny")


@pytest.fixture
def rank(source: ModelSource) -> Iterator[Rank]:
    rank = Rank(lambda: source.grammar_tokens)
    yield rank
    rank.preparer.close()


def asked(id: str, regex: str, on_trial: bool = False) -> RequestSequence:
    structure = resolve(StructuredOutputsParams(regex=regex))
    params = SamplingParams(seed=1, structured_outputs=structure)
    return RequestSequence(
        id=id, prompt=[1, 2], generated=[], params=params, eos=(0,), on_trial=on_trial
    )


def test_a_sequence_is_scheduled_once_its_grammar_is_compiled(rank: Rank) -> None:
    rank.intake.admit([asked("a", "x+")])
    assert not rank.scheduler.has_work
    rank.settle()
    assert "a" in rank.scheduler
    rank.intake.admit([asked("b", "x+")])  # known by now
    assert "b" in rank.scheduler
    assert rank.said == []


def test_one_that_is_aborted_while_it_waits_does_not_come(rank: Rank) -> None:
    rank.intake.admit([asked("a", "x+")])
    rank.intake.abort(["a"])
    rank.settle()
    assert not rank.scheduler.has_work


def test_one_that_waits_goes_on_elsewhere_when_its_rank_leaves(rank: Rank) -> None:
    rank.intake.admit([asked("a", "x+")])
    rank.intake.leave()
    rank.settle()
    assert not rank.scheduler.has_work


def test_one_that_is_on_trial_is_named_before_it_is_compiled(rank: Rank) -> None:
    rank.intake.admit([asked("a", "x+", on_trial=True)])
    assert rank.said == [msg.OnTrial("a")]


def test_what_is_expected_need_not_be_waited_for(rank: Rank) -> None:
    sequence = asked("a", "y+")
    rank.intake.expect([sequence])
    rank.preparer.close()  # waits for what is under way
    assert not rank.preparer.needs(sequence)
    assert rank.ready.empty()


def test_without_a_tokenizer_a_sequence_is_rejected() -> None:
    def none() -> Any:
        raise ModelError("there is no tokenizer")

    rank = Rank(none)
    rank.intake.admit([asked("a", "x+")])
    rank.settle()
    assert rank.said == [msg.Rejected("a", "there is no tokenizer")]
    rank.preparer.close()


def test_what_nobody_foresaw_rejects_the_sequence_too() -> None:
    def broken() -> Any:
        raise KeyboardInterrupt("a panic")

    rank = Rank(broken)
    rank.intake.admit([asked("a", "x+")])
    rank.settle()
    assert rank.said == [msg.Rejected("a", "KeyboardInterrupt: a panic")]
    rank.preparer.close()
