"""The sampler: what is kept, with which number it draws, and that a row stands alone."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexpert.engine.request import RequestSequence, SamplingParams
from flexpert.engine.sampler import Sampler, philox4x32, score, score_on_device, uniforms
from flexpert.engine.sequence import SampleState

VOCAB = 331  # no multiple of anything the sampler works in


def state(
    prompt: list[int] | None = None,
    generated: list[int] | None = None,
    eos: tuple[int, ...] = (),
    **params: Any,
) -> SampleState:
    return SampleState(
        RequestSequence(
            id="s",
            prompt=prompt or [1, 2, 3],
            generated=generated or [],
            params=SamplingParams(**{"max_tokens": 1000, "seed": 0, **params}),
            eos=eos,
        )
    )


def logits(rows: int, scale: float = 3.0, vocab: int = VOCAB, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, vocab, generator=generator) * scale


def drawn(row: torch.Tensor, seeds: int = 400, **params: Any) -> list[int]:
    states = [state(seed=seed, **params) for seed in range(seeds)]
    return Sampler().sample(row.expand(seeds, -1), states).tokens


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([2**32 - 1] * 4, [2**32 - 1] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_gives_the_known_answers_of_its_authors(
    counter: list[int], key: list[int], words: list[int]
) -> None:
    """Random123's kat_vectors; numpy.random.Philox is the 64-bit variant and cannot be compared."""
    got = philox4x32(
        np.array(counter, dtype=np.uint64)[:, None], np.array(key, dtype=np.uint64)[:, None]
    )
    assert got[:, 0].tolist() == words


def philox4x64(counter: list[int], key: list[int]) -> list[int]:
    """The same rounds as `philox4x32`, in plain integers of 64 bits."""
    c, k, mask = list(counter), list(key), 2**64 - 1
    for _ in range(10):
        a, b = c[0] * 0xD2E7470EE14C6C93, c[2] * 0xCA5A826395121157
        c = [(b >> 64) ^ c[1] ^ k[0], b & mask, (a >> 64) ^ c[3] ^ k[1], a & mask]
        k = [(k[0] + 0x9E3779B97F4A7C15) & mask, (k[1] + 0xBB67AE8584CAA73B) & mask]
    return c


def test_the_round_structure_is_that_of_numpys_philox() -> None:
    """Written out in integers the rounds are numpy's with 64-bit constants, ours with 32-bit."""
    reference = np.random.Philox(key=np.array([5, 7], dtype=np.uint64), counter=0)
    assert philox4x64([1, 0, 0, 0], [5, 7]) == reference.random_raw(4).tolist()


def test_uniforms_depend_on_each_seed_and_position_alone() -> None:
    seeds = [0, 1, 2**64 - 1, 2**40, 1]
    positions = [0, 0, 5, 2**33, 2**33]
    together = uniforms(seeds, positions)
    alone = [uniforms([s], [p])[0] for s, p in zip(seeds, positions, strict=True)]
    assert together.tolist() == alone
    assert len(set(alone)) == len(alone)
    many = uniforms([3] * 20000, list(range(20000)))
    assert 0 <= many.min() < many.max() < 1
    assert abs(many.mean() - 0.5) < 0.01
    assert abs(many.var() - 1 / 12) < 0.002


PARAMS = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 1e-6, 0.3, 0.8, 1.0, 5.0]),
        "top_k": st.sampled_from([0, 0, 1, 5, 64, 65, 200, 10**6]),
        "top_p": st.sampled_from([1.0, 1.0, 0.9999999, 0.95, 0.5, 1e-4]),
        "min_p": st.sampled_from([0.0, 0.0, 0.05, 1.0]),
        "repetition_penalty": st.sampled_from([1.0, 1.3]),
        "presence_penalty": st.sampled_from([0.0, 0.5]),
        "frequency_penalty": st.sampled_from([0.0, -0.3]),
        "min_tokens": st.sampled_from([0, 10]),
        "logprobs": st.sampled_from([None, 0, 5]),
        "seed": st.integers(-(2**63), 2**63 - 1),
    }
)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    params=st.lists(PARAMS, min_size=2, max_size=9),
    vocab=st.sampled_from([1, 7, 64, 331, 3001]),
    scale=st.sampled_from([0.0, 0.5, 3.0, 30.0]),
    seed=st.integers(0, 1000),
)
def test_a_row_has_the_same_result_alone_and_in_any_batch(
    params: list[dict[str, Any]], vocab: int, scale: float, seed: int
) -> None:
    rows = logits(len(params), scale, vocab, seed)
    rows = (rows * 4).round() / 4 if seed % 3 == 0 else rows  # many ties
    states = [state([0], [0, *range(i % vocab)], (0,), **p) for i, p in enumerate(params)]
    together = Sampler().sample(rows, states)
    order = list(reversed(range(len(states))))
    turned = Sampler().sample(rows[order], [states[i] for i in order])
    for i, own in enumerate(states):
        alone = Sampler().sample(rows[i : i + 1], [own])
        assert alone.tokens == [together.tokens[i]] == [turned.tokens[order[i]]]
        assert alone.logprobs == [together.logprobs[i]] == [turned.logprobs[order[i]]]
        assert 0 <= together.tokens[i] < vocab


def expected_kept(row: torch.Tensor, top_k: int, top_p: float, min_p: float) -> set[int]:
    """The tokens that may be drawn at temperature 1, by the definition."""
    weight = torch.softmax(row.double(), 0).tolist()
    order = sorted(range(len(weight)), key=lambda i: (-weight[i], i))
    order = [i for i in order if weight[i] >= min_p * weight[order[0]]]
    order = order[: top_k or None]
    total, kept, mass = sum(weight[i] for i in order), set(), 0.0
    for i in order:
        if mass >= top_p * total:
            break
        kept.add(i)
        mass += weight[i]
    return kept


@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"),
    [(0, 0.9, 0.0), (5, 1.0, 0.0), (40, 0.8, 0.0), (0, 1.0, 0.2), (8, 0.95, 0.1), (0, 0.3, 0.0)],
)
@pytest.mark.parametrize("vocab", [40, 331, 5000])
def test_only_tokens_within_top_k_top_p_and_min_p_are_drawn_and_all_of_them(
    top_k: int, top_p: float, min_p: float, vocab: int
) -> None:
    row = logits(1, 2.0, vocab)
    kept = expected_kept(row[0], top_k, top_p, min_p)
    got = drawn(row, 3000, top_k=top_k, top_p=top_p, min_p=min_p)
    assert set(got) <= kept
    if len(kept) < 20:
        probability = torch.softmax(row[0].double(), 0)
        share = {i: float(probability[i] / sum(probability[list(kept)])) for i in kept}
        for token, expected in share.items():
            deviation = math.sqrt(3000 * expected * (1 - expected)) + 1
            assert abs(got.count(token) - 3000 * expected) < 4.5 * deviation


def test_top_p_is_a_share_of_what_top_k_keeps_whoever_else_is_in_the_batch() -> None:
    row = logits(1, 1.0)
    kept = expected_kept(row[0], 8, 0.6, 0.0)
    assert kept < expected_kept(row[0], 8, 1.0, 0.0)
    states = [state(seed=seed, top_k=8, top_p=0.6) for seed in range(500)]
    others = [state(seed=seed, top_p=0.99) for seed in range(3)]  # these need nearly all sorted
    got = Sampler().sample(row.expand(503, -1), [*states, *others]).tokens[:500]
    assert set(got) == kept


def test_of_equal_tokens_those_with_the_lowest_ids_are_kept() -> None:
    row = torch.zeros(1, VOCAB)
    assert set(drawn(row, top_k=3)) == {0, 1, 2}
    assert set(drawn(row, top_p=3.5 / VOCAB)) == {0, 1, 2, 3}
    assert Sampler().sample(row, [state(temperature=0)]).tokens == [0]


def test_a_tiny_temperature_is_greedy_and_impossible_tokens_are_never_drawn() -> None:
    rows = logits(6)
    rows[:, ::2] = -math.inf
    best = rows.argmax(1).tolist()
    for temperature in (0, 1e-300, 1e-12, 1e-4):
        states = [state(temperature=temperature, seed=s) for s in range(6)]
        assert Sampler().sample(rows, states).tokens == best
    assert all(token % 2 == 1 for token in drawn(rows[:1], temperature=100))


def test_penalties_follow_their_definitions() -> None:
    row = logits(1)[0]
    own = state(
        prompt=[4, 5, 5],
        generated=[5, 9],
        temperature=0,
        repetition_penalty=1.5,
        presence_penalty=0.25,
        frequency_penalty=0.5,
    )
    own.append(9)
    own.append(200)
    expected = row.clone()
    for token in (4, 5, 9, 200):
        expected[token] = row[token] / 1.5 if row[token] > 0 else row[token] * 1.5
    for token, times in ((5, 1), (9, 2), (200, 1)):
        expected[token] -= 0.5 * times + 0.25
    for token in (4, 5, 9, 200, 17):
        for shift in np.linspace(-3, 3, 13):
            # token 17 is untouched: raise it to just beside where the penalised one is
            tried, adjusted = row.clone().clamp(max=-20), expected.clone().clamp(max=-20)
            tried[token], adjusted[token] = row[token], expected[token]
            tried[30] = adjusted[30] = float(expected[token]) + shift + 1e-3
            got = Sampler().sample(tried[None], [own]).tokens
            assert got == [int(adjusted.argmax())]


def test_counts_kept_step_by_step_equal_counts_of_a_resumed_sequence() -> None:
    generator = np.random.default_rng(1)
    answer = generator.integers(0, 300, 500).tolist()
    stepped = state(generated=[], repetition_penalty=1.1)
    for token in answer:
        stepped.append(token)
    resumed = state(generated=answer, repetition_penalty=1.1)
    assert stepped.counts is not None
    assert resumed.counts is not None
    assert stepped.counts.ids.tolist() == resumed.counts.ids.tolist()
    assert stepped.counts.answer.tolist() == resumed.counts.answer.tolist()
    assert stepped.position == resumed.position == 500


def test_end_tokens_are_impossible_before_min_tokens_and_possible_after() -> None:
    row = torch.full((1, VOCAB), -50.0)
    row[0, 7], row[0, 8], row[0, 9] = 9, 8, 7
    ends: dict[str, Any] = {"eos": (7,), "stop_token_ids": (8, 10**9), "min_tokens": 2}
    for temperature in (0.0, 0.5):
        before = state(generated=[1], temperature=temperature, **ends)
        after = state(generated=[1, 1], temperature=temperature, top_k=1, **ends)
        assert Sampler().sample(row, [before]).tokens == [9]
        assert Sampler().sample(row, [after]).tokens == [7]


def test_logprobs_are_of_the_raw_distribution_whatever_shapes_the_choice() -> None:
    rows = logits(2)
    params = {"temperature": 0.3, "repetition_penalty": 1.4, "top_k": 3}
    states = [state(logprobs=4, **params), state(logprobs=0, **params)]
    sampled = Sampler().sample(rows, states)
    want = torch.log_softmax(rows.double(), 1)
    first, second = sampled.logprobs
    assert first is not None
    assert second is not None
    top = want[0].topk(4)
    assert first.top_ids == top.indices.tolist()
    assert first.top == pytest.approx(top.values.tolist(), abs=1e-6)
    assert first.chosen == pytest.approx(float(want[0, sampled.tokens[0]]), abs=1e-6)
    assert (second.top_ids, second.top) == ([], [])


def test_a_sequence_resumed_elsewhere_draws_the_tokens_it_would_have_drawn() -> None:
    rows = logits(20, 1.0)
    whole = state(seed=99, top_p=0.95, temperature=1.2)
    answer: list[int] = []
    for row in rows:
        answer += Sampler().sample(row[None], [whole]).tokens
        whole.append(answer[-1])
    resumed = state(seed=99, top_p=0.95, temperature=1.2, generated=answer[:12])
    for at in range(12, 20):
        (token,) = Sampler().sample(rows[at][None], [resumed]).tokens
        assert token == answer[at]
        resumed.append(token)


def test_logits_are_not_changed_and_wrong_shapes_are_refused() -> None:
    rows = logits(2)
    before = rows.clone()
    Sampler().sample(rows, [state(repetition_penalty=2.0, top_p=0.5), state(temperature=0)])
    assert torch.equal(rows, before)
    with pytest.raises(ValueError, match="for 1 sequences"):
        Sampler().sample(rows, [state()])
    assert Sampler().sample(rows[:0], []).tokens == []


def test_only_allowed_tokens_are_chosen_and_bad_ones_never() -> None:
    row = logits(1)[0]
    for temperature in (0.0, 1.0, 100.0):
        allowed = drawn(row, allowed_token_ids=(5, 300, 7, VOCAB + 9), temperature=temperature)
        assert set(allowed) <= {5, 300, 7}
    best = int(row.argmax())
    greedy = {"temperature": 0.0, "bad_token_ids": ((best,),)}
    assert Sampler().sample(row[None], [state(**greedy)]).tokens == [int(row.topk(2).indices[1])]
    pair: dict[str, Any] = {"temperature": 0.0, "bad_token_ids": ((9, best), (1, 2, 3, best))}
    for generated, expected in (([], best), ([8], best), ([8, 9], int(row.topk(2).indices[1]))):
        one = state(generated=generated, **pair)
        assert Sampler().sample(row[None], [one]).tokens == [expected], "the prompt does not count"


def test_a_bias_is_added_before_anything_is_chosen() -> None:
    row = logits(1)[0]
    asked = {"temperature": 0.0, "logit_bias": {17: 100.0, VOCAB + 3: 100.0}, "logprobs": 1}
    sampled = Sampler().sample(row[None], [state(**asked)])
    assert sampled.tokens == [17]
    (probabilities,) = sampled.logprobs
    assert probabilities is not None
    assert probabilities.chosen == pytest.approx(float(row.log_softmax(0)[17]), abs=1e-5), "raw"
    shares = drawn(torch.zeros(VOCAB), seeds=2000, logit_bias={3: math.log(VOCAB - 1)})
    assert shares.count(3) / 2000 == pytest.approx(0.5, abs=0.05)


def test_steered_rows_leave_the_others_as_they_are() -> None:
    rows = logits(3)
    plain = [state(seed=s) for s in range(3)]
    alone = Sampler().sample(rows, plain).tokens
    mixed = [plain[0], state(seed=1, allowed_token_ids=(2,), logit_bias={2: -5.0}), plain[2]]
    assert Sampler().sample(rows, mixed).tokens == [alone[0], 2, alone[2]]


@pytest.mark.parametrize("top", [0, 1, 5])
def test_given_tokens_are_scored_alike_on_the_host_and_where_the_logits_are(top: int) -> None:
    rows = logits(70)
    tokens = [(7 * at) % VOCAB for at in range(70)]
    here, there = score(rows, tokens, top), score_on_device(rows, tokens, top)
    for row, token, one, other in zip(rows, tokens, here, there, strict=True):
        assert one.chosen == pytest.approx(float(row.double().log_softmax(0)[token]), abs=1e-9)
        assert other.chosen == pytest.approx(one.chosen, abs=1e-9)
        assert one.rank == other.rank == 1 + int((row > row[token]).sum())
        assert one.top_ids == other.top_ids == row.topk(top).indices.tolist()
        assert other.top == pytest.approx(one.top, abs=1e-9)
