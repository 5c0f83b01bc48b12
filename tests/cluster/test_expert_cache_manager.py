"""The copy of the experts in the host's memory: when it is made, and that it is made again."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from flexpert.cluster import expert_cache_manager
from flexpert.cluster.expert_cache_manager import ExpertCacheManager, cache_bytes
from flexpert.cluster.processes.expert_cache_messages import (
    CacheFailed,
    CacheFilled,
    CacheOpened,
    encode,
)
from flexpert.cluster.processes.model_report import served_model
from flexpert.config import Config, load_config
from flexpert.models.source import ModelSource

SOURCE = ModelSource.open("tiny")
MODEL = served_model(SOURCE, Config())
WHOLE = SOURCE.expert_shape().nbytes * SOURCE.info.experts * SOURCE.info.moe_layers


def config(**settings: object) -> Config:
    overrides = {"engine.device": "cuda", "cluster.ranks": 1, "cluster.max_ranks": 2}
    return load_config(environment={}, overrides={**overrides, **settings})


@pytest.mark.parametrize(
    ("settings", "available", "expected"),
    [
        ({}, 2 * WHOLE, WHOLE),
        ({}, 2 * WHOLE - 2, 0),
        ({"cluster.expert_cache": "0"}, 100 * WHOLE, 0),
        ({"cluster.expert_cache": str(WHOLE // 2)}, WHOLE, WHOLE // 2),
        ({"cluster.expert_cache": "100GiB"}, 1, WHOLE),
        ({"cluster.max_ranks": 1}, 100 * WHOLE, 0),
        ({"engine.device": "cpu", "cluster.expert_cache": "100GiB"}, 100 * WHOLE, 0),
    ],
)
def test_it_is_made_where_a_gpu_s_rank_can_be_lost_and_half_of_the_memory_holds_it(
    settings: dict[str, object], available: int, expected: int
) -> None:
    assert cache_bytes(config(**settings), MODEL, available) == expected


class Owner:
    """A head whose clock is moved by hand, and whose helpers can be ended."""

    def __init__(self) -> None:
        self.helpers: list[Helper] = []
        self.timers: list[Timer] = []

    def start_helper(
        self,
        entry: str,
        spec: bytes,
        on_message: Callable[[bytes], None],
        on_end: Callable[[str], None],
    ) -> Helper:
        self.helpers.append(Helper(on_message, on_end))
        return self.helpers[-1]

    def call_later(self, delay_s: float, action: Callable[[], None]) -> Timer:
        self.timers.append(Timer(action))
        return self.timers[-1]


class Helper:
    def __init__(self, on_message: Callable[[bytes], None], on_end: Callable[[str], None]) -> None:
        self.on_message = on_message
        self.on_end = on_end
        self.killed = False

    def send_pieces(self, pieces: object) -> None:
        raise NotImplementedError

    def kill(self) -> None:
        self.killed = True


class Timer:
    def __init__(self, action: Callable[[], None]) -> None:
        self.action = action
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


def test_ranks_are_told_of_it_while_it_is_there_and_it_is_made_again() -> None:
    owner = Owner()
    keeper = ExpertCacheManager(config(), MODEL, owner)
    keeper.start()
    assert keeper.address == b""
    first = owner.helpers[0]
    first.on_message(encode(CacheOpened(b"here", 5)))
    assert keeper.address == b"here"
    first.on_message(encode(CacheFilled(5)))
    assert keeper.filled
    first.on_end("signal 9")
    assert (keeper.address, keeper.filled) == (b"", False)
    owner.timers[-1].action()
    owner.helpers[1].on_message(encode(CacheOpened(b"there", 5)))
    owner.helpers[1].on_message(encode(CacheFailed("a file is damaged")))
    assert (keeper.address, keeper.filled) == (b"there", False)  # what it has can be read
    keeper.close()
    assert owner.helpers[1].killed
    owner.helpers[1].on_end("signal 9")
    assert len(owner.timers) == 1


def test_a_helper_that_cannot_be_started_is_tried_again_until_the_service_stops(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    owner = Owner()

    def refuse(*_: object) -> Helper:
        raise OSError("too many open files")

    monkeypatch.setattr(owner, "start_helper", refuse)
    keeper = ExpertCacheManager(config(), MODEL, owner)
    keeper.start()
    assert len(owner.timers) == 1
    keeper.close()
    assert owner.timers[0].cancelled
    monkeypatch.setattr(expert_cache_manager, "cache_bytes", lambda *_: 1)
    keeper.start()  # as a timer that was due already would
    assert len(owner.timers) == 1
