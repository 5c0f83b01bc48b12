"""Simulated histories hold every invariant, and a broken rule of the control plane is found."""

from __future__ import annotations

import logging
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from typing import Any

import msgspec
import pytest
import simulation
from simulation import Simulation, Violation, histories, history

from flexpert.cluster import coordinator, coverage, membership
from flexpert.cluster.journal import Entry
from flexpert.cluster.membership import Kind, Membership, Phase
from flexpert.cluster.replacement import Replacements
from flexpert.engine.request import Sequence
from flexpert.moe.placement import Placement

HISTORIES = int(os.environ.get("FLEXPERT_HISTORIES", "20000"))
SHARE = 250  # of one process at a time
FOUND_WITHIN = 10_000

Patch = pytest.MonkeyPatch


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Histories warn by the thousand; other tests want to see what is logged."""
    logger = logging.getLogger("flexpert")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    yield
    logger.setLevel(before)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_histories_hold_every_invariant() -> None:
    parts = [range(at, min(at + SHARE, HISTORIES)) for at in range(0, HISTORIES, SHARE)]
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        assert all(steps > 0 for steps in pool.map(histories, parts))


def test_a_seed_is_a_history() -> None:
    first, again = history(3), history(3)
    assert (first.clock, first.steps, first.answers) == (again.clock, again.steps, again.answers)
    assert history(4).answers != first.answers


# ---- broken rules --------------------------------------------------------------------------------


def ids_are_free_at_once(patch: Patch) -> None:
    """An id is used again only when its old process is certainly gone."""

    def anyway(*_: Any) -> bool:
        return True

    rules = tuple(
        replace(rule, when=anyway)
        if (rule.phase, rule.event, rule.then) == (Phase.RELEASE, Kind.EXITED, Phase.IDLE)
        else rule
        for rule in membership.RULES
    )
    patch.setattr(membership, "RULES", rules)
    patch.setitem(membership._PASSES, Phase.RELEASE, (Kind.EXITED, anyway))


def experts_of_the_dead_stay_there(patch: Patch) -> None:
    """Every expert has an owner in every epoch."""

    def only_who_is_left(before: Placement, ranks: frozenset[int]) -> Placement:
        left = [{rank: layer[rank] for rank in sorted(ranks)} for layer in before.layers]
        return Placement(before.experts, left)

    patch.setattr(coverage, "cover", only_who_is_left)


def an_epoch_is_used_twice(patch: Patch) -> None:
    """No two memberships have the same number."""
    recovery = Membership._recovery

    def again(self: Membership, *args: Any) -> Any:
        self._epochs_used -= 1
        return recovery(self, *args)

    patch.setattr(Membership, "_recovery", again)


def a_request_goes_on_one_token_too_late(patch: Patch) -> None:
    """What moves goes on where its journal ends."""
    resume = Entry.resume

    def late(self: Entry) -> Sequence:
        sequence = resume(self)
        started = sequence.generated
        return msgspec.structs.replace(sequence, generated=[*started, 0] if started else [])

    patch.setattr(Entry, "resume", late)


def requests_of_the_dead_stay_there(patch: Patch) -> None:
    """What a dead rank ran goes on elsewhere."""
    patch.setattr(Simulation, "moved", lambda *_: 0)


def nobody_comes_back(patch: Patch) -> None:
    """Lost ranks are replaced."""
    patch.setattr(Replacements, "due", lambda *_: frozenset())
    patch.setattr(Replacements, "next_s", lambda *_: None)


def who_is_silent_is_let_be(patch: Patch) -> None:
    """A rank that has stalled is ended."""
    patch.setattr(coordinator, "STALLED", float("inf"))
    patch.setattr(coordinator.Coordinator, "_end_stalled", lambda *_: None)


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "broken",
    [
        ids_are_free_at_once,
        experts_of_the_dead_stay_there,
        an_epoch_is_used_twice,
        a_request_goes_on_one_token_too_late,
        requests_of_the_dead_stay_there,
        nobody_comes_back,
        who_is_silent_is_let_be,
    ],
    ids=lambda rule: rule.__name__,
)
def test_a_broken_rule_is_found(broken: Callable[[Patch], None], monkeypatch: Patch) -> None:
    broken(monkeypatch)
    for seed in range(FOUND_WITHIN):
        try:
            simulation.history(seed)
        except Violation:
            return
    raise AssertionError(f"not found in {FOUND_WITHIN} histories")
