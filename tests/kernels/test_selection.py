"""The k largest of a row, equal values included, come out in torch's order."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexpert.kernels.cpu import selection

VALUES = st.sampled_from([0.0, -0.0, 0.25, 0.5, 1.0, -3.0, float("inf"), float("nan")])


@settings(max_examples=300, deadline=None)
@given(
    row=st.lists(VALUES, min_size=1, max_size=140),
    k=st.integers(1, 17),
    in_order=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_equal_values_have_torchs_order(
    row: list[float], k: int, in_order: bool, dtype: torch.dtype
) -> None:
    x = torch.tensor([row, row[::-1]], dtype=dtype)
    k = min(k, len(row))
    values, indices = selection.topk(x, k, in_order=in_order)
    expected = x.topk(k, sorted=in_order)
    assert torch.equal(indices, expected.indices)
    assert torch.equal(values.isnan(), expected.values.isnan())
    assert torch.equal(values.nan_to_num(), expected.values.nan_to_num())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_sizes_of_models_are_known(dtype: torch.dtype) -> None:
    for n, k in ((8, 2), (16, 4), (60, 4), (64, 8), (128, 8), (256, 8), (384, 8), (512, 10)):
        assert selection.orders_as_torch(n, k, dtype, in_order=True)
        assert selection.orders_as_torch(n, k, dtype, in_order=False)


def test_a_selection_that_would_differ_from_torchs_is_left_to_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The trial is one: it finds an order that is not torch's."""
    assert not selection.orders_as_torch(64, 18, torch.float32, in_order=True)

    def by_index(x: torch.Tensor, k: int, *, in_order: bool = True) -> tuple[torch.Tensor, ...]:
        found = x.nan_to_num(nan=float("inf")).sort(dim=-1, descending=True, stable=True)
        return x.gather(1, found.indices[:, :k]), found.indices[:, :k]

    monkeypatch.setattr(selection, "topk", by_index)
    assert not selection.orders_as_torch(16, 5, torch.float32, in_order=True)
