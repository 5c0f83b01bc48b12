"""The kernels that see what became of proposed tokens, against a few lines of Python."""

from __future__ import annotations

from random import Random

import pytest
import torch

pytest.importorskip("triton", reason="the GPU kernels need the package triton")

from flexpert.kernels.cuda.drafts import (
    clear_rows,
    further_rows,
    judge_rows,
    place_rows,
    tokens_after,
)

WIDTH, SIZE, MOST = 4, 8, 90  # sequences: more than a program has


def numbers(count: int, value: int = 0) -> torch.Tensor:
    return torch.full((count,), value, dtype=torch.int64)


@pytest.mark.parametrize("seed", range(3))
def test_proposed_tokens_count_as_far_as_they_are_what_was_sampled(seed: int) -> None:
    random = Random(seed)
    drafted = [random.randrange(WIDTH) for _ in range(MOST)]
    agreed = [random.randrange(1 + count) for count in drafted]
    first = [sum(drafted[:at]) + at for at in range(MOST)]
    rows = sum(drafted) + MOST
    sampled = torch.tensor([random.randrange(1000) for _ in range(rows)])
    token_ids = numbers(rows, 5000)
    for row, count in zip(first, agreed, strict=True):
        token_ids[row + 1 : row + 1 + count] = sampled[row : row + count]
    positions = torch.arange(rows) * 3
    asked = torch.arange(MOST) % WIDTH
    questions = torch.stack([torch.tensor(first)] * 2 + [torch.tensor(drafted), asked, asked])
    left, accepted, last, at, wanted = numbers(MOST * WIDTH, -1), *(numbers(MOST) for _ in range(4))
    judge_rows(
        questions,
        sampled,
        token_ids,
        positions,
        left=left,
        accepted=accepted,
        last=last,
        at=at,
        asked=wanted,
        width=WIDTH,
    )
    assert accepted.tolist() == agreed
    ends = torch.tensor(first) + torch.tensor(agreed)
    assert last.equal(ends)
    assert at.equal(positions[ends])
    assert wanted.equal(asked)
    assert left.view(MOST, WIDTH)[:, 0].equal(sampled[ends])
    assert (left.view(MOST, WIDTH)[:, 1:] == -1).all()

    sources = torch.tensor([random.randrange(-1, rows) for _ in range(rows)])
    after = numbers(rows)
    tokens_after(sources, token_ids, sampled, after)
    assert after.equal(torch.where(sources < 0, token_ids, sampled[sources]))


def test_rows_go_on_behind_what_came_true_and_stay_within_their_blocks() -> None:
    left, accepted = torch.arange(MOST * WIDTH) + 1000, torch.arange(MOST) % WIDTH
    tables = torch.arange(MOST * 3, dtype=torch.int32).view(MOST, 3).flip(0)
    sources = torch.tensor([-1 if row % 5 == 0 else row * WIDTH + row % 3 for row in range(MOST)])
    token_ids, before = numbers(MOST, 7), torch.arange(MOST) % (3 * SIZE)
    positions, slots = before.clone(), numbers(MOST, -1)
    context = torch.zeros(MOST, dtype=torch.int32)
    place_rows(
        sources,
        left,
        accepted,
        token_ids,
        positions,
        context,
        slots,
        tables,
        width=WIDTH,
        block_size=SIZE,
    )
    for row in range(MOST):
        if row % 5 == 0:
            assert (token_ids[row], positions[row], context[row]) == (7, before[row], 0)
            assert slots[row] == -1
            continue
        position = min(int(before[row] + accepted[row]), 3 * SIZE - 1)
        assert token_ids[row] == left[sources[row]]
        assert (positions[row], context[row]) == (position, position + 1)
        assert slots[row] == tables[row, position // SIZE] * SIZE + position % SIZE


@pytest.mark.parametrize("step", [1, 2])
def test_another_token_is_proposed_only_where_it_was_asked_for(step: int) -> None:
    tables = torch.arange(MOST * 3, dtype=torch.int32).view(MOST, 3)
    asked, at = torch.arange(MOST) % WIDTH, torch.arange(MOST) % (2 * SIZE)
    positions, slots = numbers(MOST), numbers(MOST)
    context = torch.zeros(MOST, dtype=torch.int32)
    further_rows(
        numbers(1, step),
        asked,
        at,
        tables,
        positions=positions,
        context_len=context,
        slot_mapping=slots,
        block_size=SIZE,
    )
    assert positions.equal(at + step)
    wanted = asked > step
    assert context.equal(torch.where(wanted, at + step + 1, 0).int())
    block = tables[torch.arange(MOST), positions // SIZE]
    assert slots.equal(torch.where(wanted, block * SIZE + positions % SIZE, -1))


@pytest.mark.parametrize("width", [6, 1100])
def test_rows_of_a_cache_are_cleared_but_for_padding(width: int) -> None:
    cache = torch.ones(MOST, width, dtype=torch.bfloat16)
    slots = torch.tensor([5, -1, MOST - 1, 7, -1])
    expected = cache.index_fill(0, slots[slots >= 0], 0)
    clear_rows(slots, cache)
    assert cache.equal(expected)
