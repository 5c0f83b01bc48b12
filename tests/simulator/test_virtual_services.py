"""The simulation: every request is answered once, time goes forward, and equal seeds are equal."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexpert.bench.machine import Machine
from flexpert.bench.offered_load import OfferedLoad
from flexpert.bench.statistics import figures
from flexpert.bench.timed_events import parse_event
from flexpert.cluster.autoscaler import parse_goals
from flexpert.engine.engine_limits import EngineLimits
from flexpert.errors import ConfigError
from flexpert.simulator.cost_profile import (
    ChangeCost,
    CostProfile,
    HeadTimes,
    ServedShape,
    StepCost,
)
from flexpert.simulator.simulated_service import SimulatedSettings, skewed_loads
from flexpert.simulator.simulation import SimulationResult, simulate
from flexpert.simulator.virtual_time import VirtualTime

MACHINE = Machine(cores=1, cpu="none", system="none", python="none", date="2026-01-01")
PROFILE = CostProfile(
    command="",
    machine=MACHINE,
    load_average=0.0,
    ranks=2,
    shape=ServedShape(),
    step=StepCost(base_s=0.004, knots=[1, 64], decode_s=[0.001, 0.01], prompt_token_s=1e-4),
    head=HeadTimes(latency_s=0.002, request_s=0.001, token_s=2e-5),
    change=ChangeCost(
        join_s=0.5,
        join_pause_s=0.005,
        leave_s=0.1,
        leave_pause_s=0.004,
        detect_s=0.05,
        recover_s=0.02,
        restart_s=0.4,
        slowdown=1.5,
    ),
)
LIMITS = EngineLimits(
    max_tokens_per_step=32,
    max_running=4,
    max_model_len=128,
    blocks=24,
    block_size=4,
    prefix_cache=True,
)


def load_of(
    count: int, *, rate: float | None = None, tokens: int = 12, seed: int = 0
) -> OfferedLoad:
    return OfferedLoad(
        count=count,
        input_tokens=20,
        output_tokens=tokens,
        concurrency=6,
        request_rate=rate,
        warmup=0,
        seed=seed,
    )


def simulated(load: OfferedLoad, ranks: int = 2, *events: str, **more: object) -> SimulationResult:
    capacity = 6
    of = SimulatedSettings(
        ranks=ranks, capacity=capacity, limits=LIMITS, experts=8, layers=2, **more
    )
    return simulate(load, of, PROFILE, events=[parse_event(event) for event in events])


def check_whole(load: OfferedLoad, result: SimulationResult) -> None:
    """Each request has all of its tokens once, in order."""
    assert len(result.answers) == load.count
    for answer in result.answers:
        assert answer.error is None
        assert answer.finish == "length"
        assert len(answer.times) == load.output_tokens
        assert answer.sent < answer.times[0]
        assert all(before <= after for before, after in pairwise(answer.times))
        assert answer.ended == answer.times[-1]
    assert all(before.at_s <= after.at_s for before, after in pairwise(result.samples))


EVENTS = st.lists(
    st.one_of(
        st.integers(1, 6).map(lambda n: f"scale {n}"),
        st.integers(0, 5).map(lambda n: f"kill {n}"),
        st.integers(0, 5).map(lambda n: f"remove {n}"),
        st.just("rebalance"),
    ),
    max_size=4,
)


@settings(max_examples=25, deadline=None)
@given(
    ranks=st.integers(1, 4),
    rate=st.sampled_from([None, 5.0, 60.0]),
    what=EVENTS,
    times=st.lists(st.floats(0, 1.5), min_size=4, max_size=4),
    seed=st.integers(0, 99),
)
def test_every_request_is_answered_once_whatever_happens(
    ranks: int, rate: float | None, what: list[str], times: list[float], seed: int
) -> None:
    load = load_of(14, rate=rate, seed=seed)
    events = [f"t={at:.3f} {event}" for at, event in zip(times, what, strict=False)]
    result = simulated(load, ranks, *events)
    check_whole(load, result)
    assert simulated(load, ranks, *events) == result
    assert all(change.state != "running" for change in result.changes)


@pytest.mark.parametrize("ranks", [1, 3, 6])
def test_more_ranks_lose_nothing_and_are_not_slower_on_processors_of_their_own(ranks: int) -> None:
    load = load_of(40)
    result, alone = simulated(load, ranks), simulated(load, 1)
    check_whole(load, result)
    assert result.seconds <= alone.seconds * 1.02


def test_a_killed_rank_comes_back_and_its_requests_go_on() -> None:
    load = load_of(60, rate=30.0)
    result = simulated(load, 2, "t=0.5 kill 1")
    check_whole(load, result)
    kill, restart = result.changes
    assert (kill.state, kill.what, restart.what) == ("done", "kill 1", "restart 1")
    assert kill.detected_s == pytest.approx(0.55)
    assert kill.recovered_s == pytest.approx(0.57, abs=0.01)
    assert kill.moved_requests > 0
    assert kill.ended_s is not None
    assert 0.97 <= kill.ended_s <= 1.1


def test_all_ranks_killed_is_no_request_lost() -> None:
    load = load_of(30, rate=30.0)
    result = simulated(load, 2, "t=0.4 kill 0", "t=0.41 kill 1")
    check_whole(load, result)
    assert [sample.ranks for sample in result.samples][-1] == 2


def test_requests_of_a_leaver_go_on_with_their_kv() -> None:
    load = load_of(40, rate=40.0, tokens=60)
    result = simulated(load, 3, "t=0.5 remove 0")
    check_whole(load, result)
    (change,) = result.changes
    assert change.moved_requests > 0
    assert change.pause_ms == pytest.approx(4.0)


def test_the_autoscaler_follows_the_load() -> None:
    load = load_of(300, rate=60.0)
    goals = parse_goals("max=4,ttft_p99=100ms,every=0.5s,settle=3s", 6)
    result = simulated(load, 1, goals=goals)
    check_whole(load, result)
    assert max(sample.ranks for sample in result.samples) > 1
    assert all(change.what.startswith("autoscale") for change in result.changes)


def test_uneven_experts_hold_steps_up_until_they_are_rebalanced() -> None:
    load = load_of(60)
    skewed = {"expert_loads": skewed_loads(2, 8, 1.5, 0), "expert_share": 1.0}
    even = simulated(load, 2)
    uneven = simulated(load, 2, **skewed)
    rebalanced = simulated(load, 2, "t=0 rebalance", **skewed)
    assert even.seconds < rebalanced.seconds < uneven.seconds


def test_what_is_too_much_is_refused() -> None:
    result = simulated(load_of(30, rate=1000.0), 1, max_sequences=5)
    assert figures(result.answers).failed > 0
    with pytest.raises(ConfigError, match="longer than"):
        simulated(load_of(1, tokens=400))
    with pytest.raises(ConfigError, match="room for"):
        simulated(load_of(1), 1, "t=0 scale 9")


def test_time_never_runs_backwards() -> None:
    time = VirtualTime()
    seen: list[float] = []
    for delay in (3.0, 1.0, 1.0, 0.0):
        time.after(delay, lambda: seen.append(time.now))
    time.at(-5.0, lambda: time.after(0.5, lambda: seen.append(time.now)))
    time.run()
    assert seen == [0.0, 0.5, 1.0, 1.0, 3.0]
    with pytest.raises(ValueError, match="past"):
        time.after(-1.0, lambda: None)
