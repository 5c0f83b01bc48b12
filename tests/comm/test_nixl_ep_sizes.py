"""A number of bytes says for which sizes it was asked."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexpert.comm.window_layout import size_bytes
from flexpert.compat.nixl_ep import Buffer, sizes
from flexpert.compat.nixl_ep.sizes import size_hint, spec_from_bytes, spec_of

shapes = st.tuples(
    st.integers(1, 1024), st.integers(1, 1024).map(lambda n: 16 * n), st.integers(1, 256)
)


@given(st.lists(shapes, min_size=1, max_size=4))
def test_a_hint_is_the_size_of_a_window_and_names_its_sizes(
    asked: list[tuple[int, int, int]],
) -> None:
    for max_tokens, hidden, ranks in asked:
        spec = spec_of(ranks, max_tokens, hidden)
        hint = Buffer.get_rdma_size_hint(max_tokens, hidden, ranks, 8 * ranks)
        assert hint == Buffer.get_low_latency_buffer_size_hint(max_tokens, hidden, ranks, 8 * ranks)
        assert hint == size_bytes(spec)
        assert spec_from_bytes(hint, ranks) == spec


@pytest.fixture
def _no_hints(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizes, "_hints", {})


@pytest.mark.usefixtures("_no_hints")
def test_more_bytes_than_a_hint_are_for_the_last_that_fits() -> None:
    large = size_hint(128, 7168, 8)
    small = size_hint(16, 1024, 8)
    assert spec_from_bytes(2 * small, 8) == spec_of(8, 16, 1024)
    assert spec_from_bytes(2 * large, 8) == spec_of(8, 16, 1024)
    assert spec_from_bytes(large, 8) == spec_of(8, 128, 7168)
    size_hint(128, 7168, 8)
    assert spec_from_bytes(2 * large, 4) == spec_of(4, 128, 7168)
    assert spec_from_bytes(small, 4) == spec_of(4, 16, 1024)


@pytest.mark.usefixtures("_no_hints")
def test_bytes_without_a_hint_are_refused_with_what_to_do() -> None:
    with pytest.raises(ValueError, match="get_rdma_size_hint"):
        spec_from_bytes(10**9, 8)
    hint = size_hint(128, 7168, 8)
    with pytest.raises(ValueError, match=f"num_rdma_bytes={hint - 1}"):
        spec_from_bytes(hint - 1, 8)


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ((0, 64, 2, 8), "max_tokens"),
        ((4, 24, 2, 8), "multiple of 16"),
        ((4, 0, 2, 8), "hidden"),
        ((4, 64, 0, 8), "capacity is 0"),
        ((4, 64, 257, 8), "capacity is 257"),
        ((4, 64, 2, 0), "num_experts is 0"),
    ],
)
def test_sizes_that_cannot_be_are_refused(arguments: tuple[int, ...], what: str) -> None:
    with pytest.raises(ValueError, match=what):
        Buffer.get_low_latency_buffer_size_hint(*arguments)
