"""Choices of experts are counted where they are made, and told completely."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flexpert.cluster.load_tracker import LoadTracker
from flexpert.engine.load_report import RoutingReport, decode_load, encode_load
from flexpert.engine.rank_protocol import Contradiction, RouterLoad
from flexpert.moe.load_counter import DeviceLoadCounter, HostLoadCounter
from flexpert.moe.load_snapshot import LoadSnapshot

LAYERS, EXPERTS = 3, 7


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_host_and_device_count_every_choice_and_no_hole(dtype: torch.dtype) -> None:
    host = HostLoadCounter(LAYERS, EXPERTS)
    device = DeviceLoadCounter(LAYERS, EXPERTS, torch.device("cpu"))
    expected = np.zeros((LAYERS, EXPERTS), dtype=np.int64)
    draw = torch.Generator().manual_seed(0)
    for step in range(20):
        ids = torch.randint(-1, EXPERTS, (step % 5 + 1, 2), generator=draw, dtype=dtype)
        for expert in ids.flatten().tolist():
            expected[step % LAYERS, expert] += expert >= 0
        host.count(step % LAYERS, ids, holes=True)
        device.count(step % LAYERS, ids)
    assert np.array_equal(host.snapshot().choices, expected)
    assert np.array_equal(device.snapshot().choices, expected)
    device.count(0, torch.tensor([[0, 1]], dtype=dtype))
    assert device.snapshot().choices.sum() == expected.sum() + 2


def test_a_device_counts_beyond_its_32_bits() -> None:
    counter = DeviceLoadCounter(1, 2, torch.device("cpu"))
    counter._choices[0, 1] = 2**31 - 1
    assert counter.snapshot().choices[0, 0] == 2**31 - 1
    counter.count(0, torch.zeros((5, 1), dtype=torch.int64))
    assert counter.snapshot().choices[0, 0] == 2**31 + 4


def test_what_is_told_adds_up_to_what_was_counted_since_the_first_epoch() -> None:
    counter = HostLoadCounter(LAYERS, EXPERTS)
    report = RoutingReport(counter.snapshot)
    counter.count(0, torch.tensor([[1, 2]]), holes=False)  # to warm up
    report.look(0.0)
    assert report.take() is None
    report.begin()
    told = np.zeros((LAYERS, EXPERTS), dtype=np.int64)
    for second in range(5):
        counter.count(second % LAYERS, torch.tensor([[second, 6]]), holes=False)
        counter.compute_s += 0.5
        report.begin()  # of a later epoch: counts go on
        report.look(float(second))
        load = report.take()
        assert load is not None
        assert load.compute_s == 0.5
        told += decode_load(load, LAYERS, EXPERTS)
        assert report.take() is None
    assert told.sum() == 10
    assert told[:, 6].tolist() == [2, 2, 1]


@pytest.mark.parametrize(
    "load",
    [
        RouterLoad(b"\0" * 7),
        RouterLoad(np.array([LAYERS * EXPERTS, 1], dtype="<u4").tobytes()),
        RouterLoad(b"", -1.0),
        RouterLoad(b"", float("nan")),
    ],
)
def test_a_load_that_cannot_be_is_refused(load: RouterLoad) -> None:
    with pytest.raises(Contradiction):
        decode_load(load, LAYERS, EXPERTS)


def test_an_older_load_counts_less_and_rates_stay() -> None:
    """Whatever the half-life, what comes at a constant rate is found at that rate."""
    tracker = LoadTracker(1, 2, half_life_s=10.0)
    for second in range(200):
        tracker.add(np.array([[30, 10]]), 0.25, float(second))
    recent = tracker.recent(199.5)
    assert recent.choices[0] / recent.seconds == pytest.approx([30, 10], rel=0.05)
    assert recent.compute_s / recent.seconds == pytest.approx(0.25, rel=0.05)
    for second in range(200, 260):
        tracker.add(np.array([[0, 40]]), 0.25, float(second))
    changed = tracker.recent(259.5)
    assert changed.choices[0] / changed.seconds == pytest.approx([0.5, 39.5], abs=1.0)
    assert tracker.recent(1000.0).choices.sum() / tracker.recent(1000.0).seconds < 1e-6
    assert tracker.take_window().tolist() == [[6000, 4400]]
    assert tracker.take_window().tolist() == [[0, 0]]


def test_a_snapshot_is_not_what_is_counted_on() -> None:
    counter = HostLoadCounter(1, 2)
    before = counter.snapshot()
    counter.count(0, torch.tensor([[1, 1]]), holes=False)
    assert counter.snapshot().since(before).choices.tolist() == [[0, 2]]
    assert encode_load(LoadSnapshot(before.choices)).choices == b""
