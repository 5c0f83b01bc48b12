"""Packed rows and expert-major tensors say the same."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flexpert.compat.nixl_ep.expert_major_tensors import Arrival, collect, column_major, spread
from flexpert.compat.nixl_ep.returned_memory import ReturnedMemory

LOW = (1 << 32) - 1


@st.composite
def counts_of(draw: st.DrawFn) -> torch.Tensor:
    """[experts, ranks]: rows of each expert from each rank."""
    experts, ranks = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    rows = draw(st.lists(st.integers(0, 4), min_size=experts * ranks, max_size=experts * ranks))
    return torch.tensor(rows).view(experts, ranks)


def packed(counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """offsets and sources as `Received` has them."""
    offsets, source = [0], []
    for row in counts.tolist():
        for rank, count in enumerate(row):
            source += [rank] * count
        offsets.append(len(source))
    return torch.tensor(offsets, dtype=torch.int32), torch.tensor(source, dtype=torch.int32)


@given(counts_of())
def test_layout_range_is_where_each_rank_begins_and_how_many_it_sent(counts: torch.Tensor) -> None:
    experts, ranks = counts.shape
    arrival = Arrival.of(*packed(counts), ranks, 4 * ranks)
    assert torch.equal(arrival.counts, counts)
    assert arrival.per_expert.tolist() == counts.sum(1).tolist()
    layout = arrival.layout_range()
    assert layout.dtype is torch.int64
    for expert in range(experts):
        begin = 0
        for rank in range(ranks):
            entry = int(layout[expert, rank])
            assert (entry >> 32, entry & LOW) == (begin, int(counts[expert, rank]))
            begin += int(counts[expert, rank])


@given(counts_of())
def test_places_fill_each_expert_from_its_begin(counts: torch.Tensor) -> None:
    limit = max(1, int(counts.sum(1).max()))
    places = Arrival.of(*packed(counts), counts.shape[1], limit).places
    want = [
        expert * limit + row for expert, rows in enumerate(counts.sum(1)) for row in range(rows)
    ]
    assert places.tolist() == want


def test_rows_for_which_there_is_no_room_are_refused() -> None:
    offsets, source = packed(torch.tensor([[1, 1], [2, 1]]))
    with pytest.raises(ValueError, match=r"3 rows for one expert.*room for 2"):
        Arrival.of(offsets, source, 2, 2)
    with pytest.raises(ValueError, match="rows of rank 1 arrived"):
        Arrival.of(offsets, source, 1, 3)


@given(counts_of(), st.integers(0, 63))
def test_places_of_the_rows_of_some_ranks(counts: torch.Tensor, chosen: int) -> None:
    offsets, source = packed(counts)
    ranks = torch.tensor([bool(chosen >> rank & 1) for rank in range(counts.shape[1])])
    arrival = Arrival.of(offsets, source, counts.shape[1], 4 * counts.shape[1])
    want = [
        place
        for place, rank in zip(arrival.places.tolist(), source.tolist(), strict=True)
        if ranks[rank]
    ]
    assert arrival.places_from(ranks).tolist() == want


@given(counts_of(), st.booleans())
def test_spread_and_collect_are_inverse_and_touch_nothing_else(
    counts: torch.Tensor, by_column: bool
) -> None:
    experts, ranks = counts.shape
    limit, width = int(counts.sum(1).max()) + 2, 3
    places = Arrival.of(*packed(counts), ranks, limit).places
    rows = torch.arange(places.shape[0] * width, dtype=torch.float32).view(-1, width) + 1
    if by_column:
        out = column_major(torch.zeros(experts, width, limit))
        assert out.stride() == (width * limit, 1, limit)
    else:
        out = torch.zeros(experts, limit, width)
    spread(rows, places, out)

    row = 0
    for expert in range(experts):
        for at in range(limit):
            if at < int(counts[expert].sum()):
                assert torch.equal(out[expert, at], rows[row])
                row += 1
            else:
                assert not out[expert, at].any()

    back = torch.empty_like(rows)
    collect(out, places, back)
    assert torch.equal(back, rows)


def test_collect_into_wider_rows_leaves_the_rest() -> None:
    out = torch.full((2, 4), 9.0)
    collect(torch.arange(6.0).view(1, 3, 2), torch.tensor([2, 0]), out)
    assert out.tolist() == [[4, 5, 9, 9], [0, 1, 9, 9]]


def test_what_a_dispatch_returned_survives_the_next_one() -> None:
    memory = ReturnedMemory()
    args = ((2, 4, 8), torch.bfloat16, 3, torch.float32)
    (first, first_scales), (second, _), (third, third_scales) = (
        memory.next_dispatch(*args) for _ in range(3)
    )
    assert first.shape == (2, 4, 8)
    assert first_scales is not None
    assert first_scales.shape == (2, 4, 3)
    assert first_scales.stride() == (12, 1, 4)
    assert first.data_ptr() != second.data_ptr()
    assert first.data_ptr() == third.data_ptr()
    assert third_scales is not None
    assert third_scales.data_ptr() == first_scales.data_ptr()
