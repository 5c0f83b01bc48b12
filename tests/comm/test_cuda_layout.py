"""The layout of a GPU window and of its flags; needs neither Triton nor a GPU."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from support.comm_ranks import spec_of

from flexpert.comm import BufferSpec, CommError, cuda, make_buffer
from flexpert.comm.cuda.cuda_layout import (
    LANES,
    MAX_EPOCH,
    MAX_LINK,
    PAGE_WORDS,
    SECTION,
    SLOTS_AT,
    Missing,
    Page,
    Word,
    check,
    layout,
    read_report,
    tag,
)


def test_parts_of_a_window_begin_at_sections_and_do_not_overlap() -> None:
    for spec in (spec_of(1), spec_of(7, hidden=4), BufferSpec(8, 128, 7168, 8, torch.bfloat16)):
        where = layout(spec)
        tokens = spec.capacity * spec.max_tokens
        row = spec.hidden * spec.dtype.itemsize
        begins = [SLOTS_AT, where.weights_at, where.scales_at, where.rows_at, where.results_at]
        sizes = [
            tokens * spec.topk * 4,
            tokens * spec.topk * 4,
            tokens * (spec.hidden // 128) * 4,
            tokens * row,
            tokens * spec.topk * row,
        ]
        for begin, size, end in zip(begins, sizes, [*begins[1:], where.size], strict=True):
            assert begin % SECTION == 0
            assert begin + size <= end


def test_a_window_does_not_grow_with_experts_and_home_rows_can_be_left_out() -> None:
    spec = BufferSpec(2, 128, 7168, 8, torch.bfloat16)
    rows = 2 * 128 * 7168 * 2
    assert layout(spec, choices=1).size < 2.1 * rows
    assert layout(spec).size < 9.1 * rows


def test_flags_of_other_epochs_and_links_differ() -> None:
    seen = {tag(epoch, link) for epoch in (0, 1, 2, MAX_EPOCH) for link in (0, 1, MAX_LINK)}
    assert len(seen) == 12
    assert all(0 <= value < 2**62 and value & 0xFFFFFFF == 0 for value in seen)
    for epoch, link in ((MAX_EPOCH + 1, 0), (0, MAX_LINK + 1), (-1, 0)):
        with pytest.raises(ValueError, match="does not fit"):
            tag(epoch, link)


def test_a_report_names_rank_and_phase() -> None:
    page = torch.zeros(PAGE_WORDS, dtype=torch.int64)
    assert read_report(page) == []
    page[Page.REPORT + 3] = tag(7, 1) | 5 << 16 | 2
    page[Page.GONE + 4] = 1
    assert read_report(page) == [Missing(3, "combine")]


def test_the_table_has_room_for_every_id() -> None:
    begins = sorted(Word)
    assert all(b - a == LANES for a, b in pairwise(begins))


@pytest.mark.parametrize(
    ("spec", "named"),
    [
        (spec_of(33), "at most 32 ranks"),
        (spec_of(2, max_tokens=70000), "max_tokens"),
        (spec_of(2, hidden=7), "whole 4 bytes"),
    ],
)
def test_what_cannot_be_is_refused(spec: BufferSpec, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        check(spec)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_backend_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "INTERPRETED", False)
    with pytest.raises(CommError, match=r"Triton|GPU"):
        make_buffer(0, spec_of(2), backend="cuda")
