"""The device's sampler chooses what the CPU's does, whatever is asked for."""

from __future__ import annotations

from random import Random
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="the GPU kernels need the package triton")

from flexpert.engine.device_sampler import DeviceSampler
from flexpert.engine.request import RequestSequence, SamplingParams
from flexpert.engine.sampler import Masks, Sampler
from flexpert.engine.sequence import SampleState, Unseen
from flexpert.kernels.cuda import sampling
from flexpert.kernels.device_stream import HostStream

VOCAB = 1333  # more than one block, and no multiple of anything
MOST = 64


def sampler() -> DeviceSampler:
    return DeviceSampler(torch.zeros(MOST, dtype=torch.int64), HostStream())


def state(generated: int = 3, **params: Any) -> SampleState:
    answer = [7, 8, 9, 7, 7, 11][:generated]
    settings = SamplingParams(**{"max_tokens": 1000, "seed": 0, **params})
    return SampleState(
        RequestSequence(id="s", prompt=[1, 2, 3], generated=answer, params=settings, eos=(5, 6))
    )


def params_of(random: Random) -> dict[str, Any]:
    """Any settings of a request."""
    given: dict[str, Any] = {
        "temperature": random.choice([0.0, 0.0, 0.3, 1.0, 1.7]),
        "seed": random.randrange(10**6),
    }
    ways: list[dict[str, Any]] = [
        {"top_k": random.choice([1, 2, 20, 700, VOCAB, 5000])},
        {"top_p": random.choice([0.01, 0.5, 0.9, 0.999])},
        {"min_p": random.choice([0.01, 0.2])},
        {"repetition_penalty": random.choice([0.7, 1.4]), "frequency_penalty": 0.3},
        {"presence_penalty": -0.5},
        {"logit_bias": {3: 4.0, 1000: -100.0, 99999: 1.0}},
        {"allowed_token_ids": [4, 9, 33, 1100, 99999]},
        {"bad_token_ids": [(8, 9, 12), (40,)]},
        {"min_tokens": 4},
        {"logprobs": random.choice([0, 3])},
    ]
    for way in ways:
        if random.random() < 0.25:
            given |= way
    return given


def masks_of(random: Random, rows: int) -> Masks:
    words = np.full((rows, -(-VOCAB // 32)), -1, dtype=np.int32)
    for row in range(0, rows, 3):
        words[row] = np.frombuffer(random.randbytes(words.shape[1] * 4), dtype=np.int32)
    return words


@pytest.mark.parametrize("seed", range(16))
def test_it_chooses_as_the_sampler_of_a_cpu(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    random = Random(seed)
    monkeypatch.setattr(sampling, "_BLOCK", random.choice([512, 2048]))
    rows = random.choice([1, 4])
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, VOCAB, generator=draw) * random.choice([0.3, 3.0])
    ties = random.random() < 0.4
    if ties:
        logits = (logits * 4).round() / 4
    kept = logits.clone()
    every = [(random.randrange(6), params_of(random)) for _ in range(rows)]
    masks = masks_of(random, rows) if random.random() < 0.3 else None
    expected = Sampler().start(logits, [state(n, **p) for n, p in every], masks).finish()
    given = [state(n, **p) for n, p in every]
    found = sampler().start(logits, given, masks).finish()
    assert found.failed.keys() == expected.failed.keys()
    for row in set(range(rows)) - found.failed.keys():
        assert found.sampled.tokens[row] == expected.sampled.tokens[row], every[row]
        mine, theirs = found.sampled.logprobs[row], expected.sampled.logprobs[row]
        assert (mine is None) == (theirs is None)
        if mine is not None and theirs is not None:
            assert mine.chosen == pytest.approx(theirs.chosen, abs=1e-9)
            assert ties or mine.top_ids == theirs.top_ids
            assert mine.top == pytest.approx(theirs.top, abs=1e-9)
            assert mine.rank == theirs.rank
    assert torch.equal(logits, kept)


def test_a_token_that_the_host_has_not_seen_counts() -> None:
    """For the number that is drawn, and for the fewest tokens of an answer."""
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(1))
    logits[:, 5] = 30.0  # ends the answer
    every: list[dict[str, Any]] = [
        {"temperature": 1.0, "min_tokens": 9, "seed": 3},
        {"temperature": 0.0, "min_tokens": 4},
        {"temperature": 0.0, "min_tokens": 5},
    ]
    seen = Sampler().sample(logits, [state(4, **params) for params in every]).tokens
    later = Unseen(np.ones(3, np.int64), np.zeros(3, np.int64), np.arange(3))
    states = [state(3, **params) for params in every]
    unseen = sampler().start(logits, states, unseen=later).finish()
    assert unseen.sampled.tokens == seen
    assert unseen.sampled.tokens[1] == 5
    assert unseen.sampled.tokens[2] != 5


def test_the_number_is_that_of_the_position_that_only_the_device_knows() -> None:
    """Wherever the numbers that a sequence has drawn so far end."""
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(1)).expand(8, VOCAB)
    own = state(3, temperature=1.5, seed=7)
    for answered in range(3, 60):
        come = torch.tensor([0, 2, 3, 1, 0])  # of the sequences of the step before
        own.tokens += [1] * (answered - own.position)
        places = [answered + 1 + int(come[2]) + place for place in range(4)]
        alone = state(0, temperature=1.5, seed=7)
        expected = []
        for place in places:
            alone.tokens += [1] * (place - alone.position)
            expected += Sampler().sample(logits[:1], [alone]).tokens
        known = torch.zeros(MOST, dtype=torch.int64)
        chooses = DeviceSampler(known, HostStream(), accepted=come)
        later = Unseen(np.arange(1, 5), np.full(4, 3), np.full(4, 2))
        found = chooses.start(logits[:4], [own] * 4, unseen=later).finish().sampled.tokens
        assert found == expected
        assert len(set(found)) > 1


def test_a_row_without_a_possible_token_fails_alone() -> None:
    logits = torch.randn(3, VOCAB)
    logits[1] = -torch.inf
    given = [state(temperature=1.0), state(temperature=1.0, top_k=3), state(temperature=0.0)]
    tokens = sampler().start(logits, given).finish()
    assert list(tokens.failed) == [1]
    assert "no token is possible" in str(tokens.failed[1])
    assert tokens.sampled.tokens[2] == int(logits[2].argmax())


def test_the_tokens_of_a_step_stay_on_the_device_for_the_next() -> None:
    kept = torch.zeros(MOST, dtype=torch.int64)
    device = DeviceSampler(kept, HostStream())
    first = device.start(logits := torch.randn(4, VOCAB), [state(temperature=0.0)] * 4)
    assert kept[:4].tolist() == logits.argmax(dim=1).tolist()
    second = device.start(-logits, [state(temperature=0.0)] * 4)
    assert first.finish().sampled.tokens == logits.argmax(dim=1).tolist()
    assert second.finish().sampled.tokens == logits.argmin(dim=1).tolist()
