"""Ranks of a plan that lose somebody between two exchanges, or before the first."""

from __future__ import annotations

import signal
from typing import Any

import pytest
import torch

from flexpert.comm.agreement import View
from flexpert.trials.plan import runner, worker
from flexpert.trials.plan.oracle import Sizes
from flexpert.trials.plan.plan_file import PlanPhase


class Barriers:
    """A buffer that only meets others: each barrier brings the next of these votes."""

    rank = 0

    def __init__(self, *votes: dict[int, int]) -> None:
        self.votes = list(votes)
        self.entered: list[tuple[int, ...]] = []
        self.active: tuple[int, ...] = ()

    def set_active(self, ids: tuple[int, ...], epoch: int) -> None:
        self.entered.append(ids)

    def barrier(self, payload: bytes, *, timeout_s: float) -> dict[int, bytes]:
        votes = self.votes.pop(0)
        self.active = tuple(votes)
        return {rank: number.to_bytes(4, "little") for rank, number in votes.items()}


def test_an_epoch_that_begins_without_somebody_is_agreed_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked_without = []

    def agree(store: Any, rank: int, view: View, *, suspects: set[int], **limits: float) -> View:
        asked_without.append(suspects)
        return View(view.epoch + 1, tuple(r for r in view.ranks if r not in suspects))

    monkeypatch.setattr(worker, "agree", agree)
    monkeypatch.setattr(worker, "asked", lambda store, view: False)
    buffer = Barriers({0: 4, 1: 4}, {0: 4, 1: 3})  # the lost rank 2 may have desired less
    setup = worker.Setup(Sizes(1, 16, 1, 1, torch.bfloat16), 3, "shm", None, 5, 1.0, 1.0, 0)
    run: Any = worker.Run(
        buffer,  # type: ignore[arg-type]
        setup,
        None,
        worker.WorkerTask(0, View(1, (0, 1, 2))),
        None,  # type: ignore[arg-type]
    )
    assert run.begin(4) == 3
    assert asked_without == [{2}]
    assert buffer.entered == [(0, 1, 2), (0, 1)]
    assert run.view == View(2, (0, 1))


def test_a_rank_that_dies_with_its_mail_unread_is_buried() -> None:
    sizes = Sizes(2, 32, 1, 1, torch.bfloat16)
    with runner.Runner(runner.Options(sizes, channel="shm"), 1) as made:
        rank = runner._Rank(0, made.setup, made.store)
        made.up[0] = rank
        made.answers([0], runner.START_S, worker.WorkerReady)
        rank.signal(signal.SIGSTOP)  # it will not read what comes now
        rank.ask(worker.Connect((0,)))
        rank.signal(signal.SIGKILL)
        rank.process.join()
        made.bury(PlanPhase((0,), (0,)), {})
        assert made.up == {}
        assert made.gone == {0}
