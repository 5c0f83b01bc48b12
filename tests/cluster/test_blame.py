"""Who counts as having failed, when a change ends because of one of its ranks: the coordinator."""

from __future__ import annotations

from collections.abc import Callable
from unittest.mock import MagicMock

from flexpert.cluster.coordinator import Coordinator
from flexpert.cluster.processes.model_report import served_model
from flexpert.config import load_config
from flexpert.engine import rank_protocol as msg
from flexpert.models.source import ModelSource

MEMORY = msg.Memory(0, 0, 0, 0, 0)
LOAD = msg.Load(0, 0, 0.0, 0)


class Ranks:
    """A coordinator, and what its ranks say to it. Time stands still; timers are kept."""

    def __init__(self) -> None:
        self.later: list[Callable[[], None]] = []
        head = MagicMock(**{"now.return_value": 0.0, "hand_over.return_value": {}})
        head.call_later = lambda delay_s, action: self._keep(delay_s, action)
        self.head = head
        config = load_config(environment={}, overrides={"cluster.ranks": 3})
        self.coordinator = Coordinator(config, served_model(ModelSource.open("tiny"), config), head)

    def _keep(self, delay_s: float, action: Callable[[], None]) -> MagicMock:
        if delay_s == 0.0:
            self.later.append(action)
        return MagicMock()

    @property
    def epoch(self) -> int:
        change = self.coordinator._cluster.membership.change
        assert change
        return change.epoch

    def hello(self, *ranks: int) -> None:
        for rank in ranks:
            greeting = msg.Hello(100 + rank, "here", b"", b"", b"")
            self.coordinator.on_report(rank, greeting)

    def enter(self, *ranks: int) -> None:
        for rank in ranks:
            self.coordinator.on_report(rank, msg.Prepared(self.epoch, 0, MEMORY))
        for rank in ranks:
            self.coordinator.on_report(rank, msg.Switched(self.epoch, None, LOAD))

    def end(self, *ranks: int) -> None:
        for rank in ranks:
            self.coordinator.on_exit(rank, -9)

    def replace(self) -> None:
        actions, self.later = self.later, []
        for action in actions:
            action()


def replacing() -> Ranks:
    """Ranks 1 and 2 of three were lost, and their successors are up."""
    ranks = Ranks()
    ranks.coordinator.begin_first(3)
    ranks.hello(0, 1, 2)
    ranks.enter(0, 1, 2)
    assert ranks.coordinator.members == {0, 1, 2}
    ranks.end(1, 2)
    ranks.enter(0)
    assert ranks.coordinator.members == {0}
    ranks.replace()
    ranks.hello(1, 2)
    return ranks


def lives(ranks: Ranks) -> tuple[int, int]:
    """Short ones in a row, of ranks 1 and 2."""
    short = ranks.coordinator._cluster.restart_policy._short
    return short[1], short[2]


def test_a_newcomer_that_is_ended_because_another_died_is_not_blamed() -> None:
    ranks = replacing()
    assert lives(ranks) == (1, 1)
    ranks.end(1)
    ranks.head.kill.assert_any_call(2)
    ranks.end(2)
    assert lives(ranks) == (2, 1)


def test_newcomers_that_are_ended_because_a_member_died_are_not_blamed() -> None:
    ranks = replacing()
    ranks.end(0, 1, 2)
    assert lives(ranks) == (1, 1)


def test_newcomers_whose_change_failed_otherwise_are_started_less_and_less_often() -> None:
    """A member that cannot load, for example: at once and for ever would be no help."""
    ranks = replacing()
    ranks.coordinator.on_report(0, msg.Failed(ranks.epoch, "the file is gone"))
    ranks.end(1, 2)
    assert lives(ranks) == (2, 2)
