"""The fit: costs that made the measurements are found again."""

from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from simulator.test_virtual_services import PROFILE

from flexpert.errors import ConfigError
from flexpert.simulator.calibration import CalibrationPlan, fit_profile, random_load, settings_of
from flexpert.simulator.cost_fit import non_negative
from flexpert.simulator.cost_profile import StepCost, read_profile
from flexpert.simulator.real_runs import RealRun
from flexpert.simulator.simulation import simulate

KNOTS = [1, 4, 16, 64]


@hypothesis_settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6))
def test_no_other_costs_that_are_not_negative_fit_better(seed: int) -> None:
    draw = np.random.default_rng(seed)
    a, b = draw.normal(size=(12, 5)), draw.normal(size=12)
    x = non_negative(a, b)
    assert (x >= 0).all()
    # of a convex problem: no slope leads further down
    slope = a.T @ (a @ x - b)
    assert (slope >= -1e-8).all()
    assert abs(slope[x > 0]).max(initial=0.0) < 1e-8


def test_the_calibration_finds_costs_that_were_simulated() -> None:
    step = StepCost(
        base_s=0.004,
        knots=KNOTS,
        decode_s=[0.001, 0.002, 0.002, 0.01],
        prompt_token_s=1e-4,
        context_s=1e-6,
        rank_s=3e-4,
        shared=0.5,
    )
    profile = msgspec.structs.replace(PROFILE, step=step)
    loads = [(2, 1, 16, 20), (8, 4, 32, 12), (6, 3, 200, 6), (20, 16, 24, 8)]
    runs = []
    for ranks in (1, 2):
        for seed, (count, at_once, prompt, answer) in enumerate(loads):
            load = random_load(count * ranks, at_once * ranks, prompt, answer, seed)
            found = simulate(load, settings_of(profile.shape, ranks, ranks), profile)
            runs.append(
                RealRun(
                    load=load,
                    ranks=ranks,
                    answers=found.answers,
                    seconds=found.seconds,
                    head_cpu_s=found.head_busy_s,
                    outcomes=[],
                )
            )
    fitted = fit_profile(runs, profile.shape, profile.change, CalibrationPlan())
    for ranks in (1, 2):  # a load that was not fitted to
        load = random_load(20, 7, 60, 14, 99)
        settings = settings_of(profile.shape, ranks, ranks)
        real, predicted = (simulate(load, settings, one) for one in (profile, fitted))
        assert predicted.seconds == pytest.approx(real.seconds, rel=0.1)
    errors = [abs(run.fitted_s / run.measured_s - 1) for run in fitted.runs]
    assert max(errors) < 0.15


def test_a_file_that_is_no_profile_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "profile.json"
    file.write_bytes(msgspec.json.encode(PROFILE))
    assert read_profile(file) == PROFILE
    negative = msgspec.structs.replace(PROFILE.step, rank_s=-1.0)
    for wrong in (b"{}", msgspec.json.encode(msgspec.structs.replace(PROFILE, step=negative))):
        file.write_bytes(wrong)
        with pytest.raises(ConfigError, match=r"profile"):
            read_profile(file)
