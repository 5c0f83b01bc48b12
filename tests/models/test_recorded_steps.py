"""A recorded step computes what was recorded, for any number of rows and samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.checkpoints import prompt_of, single_runner
from torch import Tensor

from flexpert.errors import UnsupportedModel
from flexpert.kernels.cpu.program import RowProgram
from flexpert.models.batch import ForwardBatch
from flexpert.models.recorded_steps import RecordedSteps, record, trial_batch

Checkpoints = Callable[..., Path]
BLOCK = 16
WIDTH = 24
VOCAB = 40


def steps_of(walk: Callable[[ForwardBatch], Tensor]) -> RecordedSteps:
    return RecordedSteps(record(lambda batch: (walk(batch),), BLOCK))


def no_experts(*_: object) -> Tensor:
    raise AssertionError("there are none")


def batch_of(rows: int, samples: int) -> ForwardBatch:
    dice = torch.Generator().manual_seed(rows * 100 + samples)
    batch = trial_batch(rows, samples, BLOCK)
    return replace(
        batch,
        token_ids=torch.randint(0, VOCAB, (rows,), generator=dice),
        positions=torch.randint(0, 500, (rows,), generator=dice),
        sample_rows=torch.randint(0, max(rows, 1), (samples,), generator=dice),
    )


# ---- programs of random operations --------------------------------------------------------------


def rotated(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def normed(x: Tensor) -> Tensor:
    return (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype)


def by_heads(x: Tensor) -> Tensor:
    return x.view(-1, 4, WIDTH // 4).transpose(0, 1).contiguous().transpose(0, 1).reshape(x.shape)


def shares(x: Tensor) -> Tensor:
    chosen, ids = torch.topk(x.float().softmax(-1), 3)
    return torch.zeros_like(x).scatter(1, ids, (chosen / chosen.sum(-1, keepdim=True)).to(x.dtype))


def columns(x: Tensor) -> Tensor:
    return x[:, 1::2].repeat_interleave(2, dim=1) + x[:, :1]


def in_place(x: Tensor) -> Tensor:
    y = x.clone()
    y[:, 3:9].mul_(0.5)
    return y.add_(x, alpha=0.25)


WEIGHT = torch.randn((WIDTH, WIDTH), generator=torch.Generator().manual_seed(3)) / 5
WEIGHTS = {
    dtype: (WEIGHT.to(dtype), torch.linspace(-1, 1, WIDTH).to(dtype))
    for dtype in (torch.float32, torch.bfloat16)
}

UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": torch.nn.functional.silu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "exp": lambda x: torch.exp(-x.abs()),
    "neg": torch.neg,
    "relu": torch.relu,
    "clamped": lambda x: x.clamp(-0.3, 0.4).clamp_max(0.3) + x.clamp_min(0.1),
    "twice": lambda x: 2.0 * x - 0.5,
    "under one": lambda x: 1 / (x.abs() + 1),
    "converted": lambda x: x.float().to(torch.bfloat16).to(x.dtype),
    "linear": lambda x: torch.nn.functional.linear(x, *WEIGHTS[x.dtype]),
    "linear without a bias": lambda x: torch.nn.functional.linear(x, WEIGHTS[x.dtype][0]),
    "rotated": rotated,
    "normed": normed,
    "by heads": by_heads,
    "shares": shares,
    "columns": columns,
    "in place": in_place,
    "softmax": lambda x: x.softmax(-1),
}
BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": lambda a, b: a / (b.abs() + 1),
    "max": torch.maximum,
    "min": torch.minimum,
    "first column": lambda a, b: a * b[:, :1],
    "outer": lambda a, b: a + (b[:, :1, None] @ a[:, None, :])[:, 0],
}
STEP = st.tuples(st.sampled_from([*UNARY, *BINARY]), st.integers(0, 5), st.integers(0, 5))
EMBEDDING = torch.randn((VOCAB, WIDTH), generator=torch.Generator().manual_seed(5))


def walk_of(
    plan: list[tuple[str, int, int]], dtype: torch.dtype
) -> Callable[[ForwardBatch], Tensor]:
    """A model of some kind: tokens and positions go in, each step takes what earlier ones gave."""
    embedding = EMBEDDING.to(dtype)
    frequencies = torch.logspace(0, -3, WIDTH)[None]

    def walk(batch: ForwardBatch) -> Tensor:
        x = torch.nn.functional.embedding(batch.token_ids, embedding)
        angles = batch.positions[:, None].float() @ frequencies
        values = [x, x * angles.cos().to(dtype) + x * angles.sin().to(dtype)]
        for name, first, second in plan:
            a, b = values[-1 - first % len(values)], values[-1 - second % len(values)]
            values.append(UNARY[name](a) if name in UNARY else BINARY[name](a, b))
        return values[-1][batch.sample_rows].float()

    return walk


@settings(max_examples=60, deadline=None)
@given(
    plan=st.lists(STEP, min_size=1, max_size=12),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    sizes=st.lists(st.tuples(st.integers(1, 40), st.integers(0, 9)), min_size=1, max_size=4),
)
def test_whatever_is_computed_is_computed_again_for_any_size(
    plan: list[tuple[str, int, int]], dtype: torch.dtype, sizes: list[tuple[int, int]]
) -> None:
    walk = walk_of(plan, dtype)
    steps = steps_of(walk)
    for rows, samples in [*sizes, sizes[0]]:
        batch = batch_of(rows, samples)
        found, expected = steps.forward(batch, no_experts), walk(batch)
        assert found.shape == expected.shape
        close = (
            {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.1, "atol": 0.1}
        )
        torch.testing.assert_close(found, expected, **close)


@pytest.mark.parametrize("name", [*UNARY, *BINARY])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_operation_alone(name: str, dtype: torch.dtype) -> None:
    """Only what sums or takes functions in another way may round otherwise."""
    walk = walk_of([(name, 0, 1)], dtype)
    steps = steps_of(walk)
    for rows in (1, 2, 17, 40):
        batch = batch_of(rows, rows)
        found, expected = steps.forward(batch, no_experts), walk(batch)
        rounding = torch.finfo(dtype).eps
        torch.testing.assert_close(found, expected, rtol=3 * rounding, atol=8 * rounding)


def test_a_row_has_the_same_bits_in_any_company() -> None:
    plan = [(name, at % 3, at % 2) for at, name in enumerate([*UNARY, *BINARY]) if name != "shares"]
    for dtype in (torch.float32, torch.bfloat16):
        steps = steps_of(walk_of(plan, dtype))
        batch = batch_of(37, 37)
        batch.sample_rows = torch.arange(37)
        whole = steps.forward(batch, no_experts)
        for begin, end in ((0, 1), (3, 4), (5, 20), (36, 37)):
            part = trial_batch(end - begin, end - begin, BLOCK)
            part.token_ids, part.positions = batch.token_ids[begin:end], batch.positions[begin:end]
            assert torch.equal(steps.forward(part, no_experts), whole[begin:end])


def test_results_stay_what_they_were() -> None:
    steps = steps_of(walk_of([("silu", 0, 0)], torch.float32))
    first = steps.forward(batch_of(5, 3), no_experts)
    kept = first.clone()
    steps.forward(batch_of(6, 3), no_experts)
    assert torch.equal(first, kept)


STATE = torch.zeros(WIDTH)


@pytest.mark.parametrize(
    ("why", "walk"),
    [
        ("computes with values", lambda x: x * float(x.sum())),
        ("computes with values", lambda x: x[x[:, 0] > 0]),
        ("do not grow evenly", lambda x: x[: x.shape[0] // 2].repeat(3, 1)),
        ("something else for another number", lambda x: x if x.shape[0] % 2 else x + 1),
        ("something else for another number", lambda x: x / x.shape[0] ** 0.5),
        ("changes a weight or buffer", lambda x: x + STATE.add_(1)),
    ],
)
def test_what_is_no_list_of_operations_is_refused(
    why: str, walk: Callable[[Tensor], Tensor]
) -> None:
    def model(batch: ForwardBatch) -> Tensor:
        return walk(torch.nn.functional.embedding(batch.token_ids, EMBEDDING)).float()

    with pytest.raises(UnsupportedModel, match=why):
        steps_of(model)


def test_a_token_that_does_not_exist_is_an_error() -> None:
    steps = steps_of(walk_of([("neg", 0, 0)], torch.float32))
    batch = batch_of(4, 2)
    batch.token_ids[2] = VOCAB
    with pytest.raises(IndexError, match="does not exist"):
        steps.forward(batch, no_experts)


# ---- models -------------------------------------------------------------------------------------


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_a_model_gives_the_logits_of_its_modules(
    family: str, deterministic: bool, checkpoint: Checkpoints
) -> None:
    path = checkpoint(family)
    recorded, modules = (
        single_runner(path, deterministic=deterministic, latent_cache=not deterministic)
        for _ in ("recorded", "modules")
    )
    assert not recorded.runner.not_recorded
    assert recorded.runner.recorded is not None
    assert not [name for name in recorded.runner.recorded.left if "topk" in name]
    assert all(isinstance(one.apply_gate, RowProgram) for one in recorded.runner._experts)
    modules.runner.recorded = None
    work = {"a": prompt_of(19, seed=2), "b": prompt_of(3, seed=3)}
    for step in range(4):
        found, expected = recorded.step(work), modules.step(work)
        for name in work:
            torch.testing.assert_close(found[name], expected[name], rtol=2e-4, atol=2e-4)
        work = {"a": [5 + step], "b": [9 + step]}
