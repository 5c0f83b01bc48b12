"""layout.py: everything has its own place, and a spec out of range is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.comm_ranks import spec_of

from flexpert.comm import BufferSpec, make_buffer
from flexpert.comm.window_layout import (
    COMBINE_FLAG_AT,
    CONTROL_BYTES,
    DISPATCH_FLAG_AT,
    DTYPES,
    HELLO_AT,
    LEASE_BYTES,
    LEASES_AT,
    LINE,
    LINK_MEMORY_AT,
    MAX_CAPACITY,
    PAGE,
    RELAYED_FLAGS_AT,
    ROWS_AT,
    SHARED_VERSION_AT,
    VOTE_LINES,
    VOTES_AT,
    layout,
    size_bytes,
    spec_hash,
)

specs = st.builds(
    BufferSpec,
    capacity=st.integers(1, 256),
    max_tokens=st.integers(1, 4096),
    hidden=st.integers(1, 8192),
    topk=st.integers(1, 16),
    dtype=st.sampled_from(list(DTYPES)),
)


@given(specs)
def test_parts_of_a_window_do_not_overlap_and_rows_start_on_cache_lines(spec: BufferSpec) -> None:
    where = layout(spec)
    assert LEASES_AT + MAX_CAPACITY * LEASE_BYTES <= CONTROL_BYTES
    assert HELLO_AT + LINE <= VOTES_AT
    assert VOTES_AT + VOTE_LINES * LINE <= DISPATCH_FLAG_AT
    assert DISPATCH_FLAG_AT + LINE <= COMBINE_FLAG_AT <= RELAYED_FLAGS_AT - LINE
    assert RELAYED_FLAGS_AT + MAX_CAPACITY * LINE <= ROWS_AT
    assert LEASES_AT + MAX_CAPACITY * LEASE_BYTES <= LINK_MEMORY_AT
    assert LINK_MEMORY_AT + MAX_CAPACITY * LINE <= SHARED_VERSION_AT <= CONTROL_BYTES - LINE
    assert 8 + spec.topk * (4 + 2 + 1) <= where.meta_bytes
    assert where.row_bytes <= where.result_stride < where.row_bytes + LINE
    rows = spec.max_tokens * (where.meta_bytes + where.result_stride)
    assert ROWS_AT + rows <= where.results_at
    results = spec.max_tokens * spec.topk * where.result_stride
    assert where.results_at + results <= where.place_bytes
    assert where.results_at + spec.max_tokens * where.result_stride == where.partials_at
    assert spec.hidden * 4 <= where.partial_stride < spec.hidden * 4 + LINE
    partials = spec.max_tokens * where.partial_stride if spec.topk > 1 else 0
    assert where.partials_at + partials <= where.place_bytes
    assert ROWS_AT % LINE == where.meta_bytes % LINE == where.result_stride % LINE == 0
    assert CONTROL_BYTES % PAGE == where.results_at % PAGE == where.place_bytes % PAGE == 0
    assert where.shared_results_at % PAGE == where.shared_bytes % PAGE == 0
    assert spec.max_tokens * where.result_stride <= where.shared_results_at
    shared = where.shared_results * where.row_bytes
    assert where.shared_results_at + shared <= where.shared_bytes
    assert where.place_at(0) == CONTROL_BYTES + where.shared_bytes
    assert where.place_at(spec.capacity) == size_bytes(spec)


def test_every_field_of_a_spec_but_the_capacity_changes_its_hash() -> None:
    spec = spec_of(4)
    assert spec_hash(replace(spec, capacity=5)) == spec_hash(spec)
    others = [
        replace(spec, max_tokens=17),
        replace(spec, hidden=73),
        replace(spec, topk=5),
        replace(spec, dtype=torch.float16),
    ]
    assert len({spec_hash(s) for s in (spec, *others)}) == 5


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("capacity", 0),
        ("capacity", 257),
        ("max_tokens", 0),
        ("hidden", 0),
        ("topk", 0),
        ("topk", 65),
        ("dtype", torch.float64),
    ],
)
def test_a_spec_out_of_range_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field):
        make_buffer(0, replace(spec_of(4), **{field: value}))  # type: ignore[arg-type]


@pytest.mark.parametrize("rank", [-1, 4])
def test_a_rank_outside_of_the_capacity_is_refused(rank: int) -> None:
    with pytest.raises(ValueError, match="rank"):
        make_buffer(rank, spec_of(4))


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="smoke"):
        make_buffer(0, spec_of(4), backend="smoke")
