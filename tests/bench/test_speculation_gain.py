"""`flexpert bench speculate`: the same requests of both services, and answers that are compared."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from flexpert.bench.speculation_gain import (
    FILE,
    RANDOM,
    REPEATING,
    SpeculatePlan,
    SpeculationGain,
    SpeculationRound,
    speculation_prompts,
)

PLAN = SpeculatePlan(
    texts=(REPEATING, RANDOM),
    concurrencies=(1,),
    rounds=1,
    answers=1,
    input_tokens=11,
    phrase_tokens=4,
    output_tokens=8,
    temperature=0.7,
    seed=0,
    how="ngram",
)


def test_prompts_repeat_a_phrase_or_nothing() -> None:
    pool = list(range(1000))
    for text in (REPEATING, RANDOM):
        prompts = speculation_prompts(PLAN, pool, text, 3, number=5)
        assert prompts == speculation_prompts(PLAN, pool, text, 3, number=5)
        assert [len(prompt) for prompt in prompts] == [11] * 3
        assert all((prompt[4:] == prompt[:-4]) == (text == REPEATING) for prompt in prompts)


def test_prompts_of_a_file_come_in_turn() -> None:
    plan = replace(PLAN, texts=(FILE,), prompts=("a", "b", "c"))
    assert [speculation_prompts(plan, [], FILE, 2, number) for number in (0, 1)] == [
        ["a", "b"],
        ["c", "a"],
    ]


def test_ratios_are_of_the_pairs_of_rounds() -> None:
    def rounds(*figures: tuple[float, float]) -> list[SpeculationRound]:
        return [
            SpeculationRound(tokens_per_s=speed, cpu_us=cpu, failed=0, drafted=4, accepted=1)
            for speed, cpu in figures
        ]

    gain = SpeculationGain(
        text=RANDOM,
        temperature=0.0,
        concurrency=1,
        rounds={
            "without": rounds((10.0, 100.0), (40.0, 50.0), (5.0, 10.0)),
            "with": rounds((20.0, 50.0), (40.0, 40.0), (20.0, 1.0)),
        },
        equal=5,
        answers=6,
    )
    assert gain.tokens_ratios == [2.0, 1.0, 4.0]
    assert gain.cpu_ratio == 0.5
    assert (gain.drafted, gain.accepted) == (12, 3)


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_short_run_has_equal_answers(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    command = [sys.executable, "-m", "flexpert", "bench", "speculate", "--output", str(report)]
    command += ["--rounds", "1", "--concurrency", "2", "--answers", "1", "--output-len", "60"]
    command += ["--input-len", "40", "--", "--deterministic"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    gains = json.loads(report.read_text())["gains"]
    assert [(one["text"], one["temperature"]) for one in gains] == [
        *((REPEATING, 0.0), (REPEATING, 0.7), (RANDOM, 0.0), (RANDOM, 0.7)),
    ]
    assert all((one["equal"], one["answers"]) == (2, 2) for one in gains)
    assert sum(one["accepted"] for gain in gains for one in gain["rounds"]["with"]) > 0
    assert not any(one["drafted"] for gain in gains for one in gain["rounds"]["without"])
