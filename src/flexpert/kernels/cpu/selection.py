"""The k largest of a row by selection.c, and whether torch orders equal values in the same way."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Final

import numpy as np
import torch
from torch import Tensor

from flexpert.kernels.cpu.program import DTYPES, OPERATIONS, WIDTH, StepWords, Word, run

MOST_CHOICES: Final = 1024
_SORTED_BY_INSERTION: Final = 17
_ROWS: Final = 96


def topk_operation(
    dtype: torch.dtype,
    sizes: Sequence[Word],
    addresses: Sequence[Word],
    strides: Sequence[Word],
    *,
    in_order: bool,
) -> list[Word]:
    """An operation of program.c.

    sizes: rows, n, k. addresses: of values, source and indices. strides: of the source; values and
    indices are contiguous.
    """
    op: list[Word] = [0] * WIDTH
    op[0], op[1] = OPERATIONS["topk"], DTYPES[dtype] << 8
    op[3:6] = sizes
    op[8], op[14], op[20] = addresses
    op[15:17] = strides
    op[27] = int(in_order)
    return op


@functools.cache
def orders_as_torch(n: int, k: int, dtype: torch.dtype, *, in_order: bool) -> bool:
    """Whether the k largest of n come out as torch.topk gives them, equal values too; tried here
    with rows of many and of few different values, in several orders."""
    if not 1 <= k <= n <= MOST_CHOICES:
        return False
    if in_order and k > _SORTED_BY_INSERTION and k * 64 > n:
        return False
    x = _trials(n).to(dtype)
    values, indices = topk(x, k, in_order=in_order)
    expected = x.topk(k, dim=-1, sorted=in_order)
    return torch.equal(indices, expected.indices) and torch.equal(
        values.nan_to_num(nan=1e9), expected.values.nan_to_num(nan=1e9)
    )


def topk(x: Tensor, k: int, *, in_order: bool = True) -> tuple[Tensor, Tensor]:
    """x: [rows, n] float32 or bfloat16 on the host → values and indices (int64), [rows, k]."""
    x = x.contiguous()
    values = x.new_empty((x.shape[0], k))
    indices = torch.empty((x.shape[0], k), dtype=torch.int64, device="cpu")
    addresses = [one.data_ptr() for one in (values, x, indices)]
    words = topk_operation(x.dtype, (*x.shape, k), addresses, (x.shape[1], 1), in_order=in_order)
    run(np.array(words, dtype=np.int64), 0, 1, StepWords(), 0)
    return values, indices


def _trials(n: int) -> Tensor:
    """[_ROWS, n] float32."""
    dice = torch.Generator(device="cpu").manual_seed(n)
    place = torch.arange(n, device="cpu", dtype=torch.float32)
    rows = [place, -place, (place - n / 2).abs(), -(place - n / 2).abs(), place % 2, place * 0]
    while len(rows) < _ROWS:
        different = (2, 3, 5, max(n // 2, 1), 10 * n)[len(rows) % 5]
        row = torch.randint(0, different, (n,), generator=dice, dtype=torch.float32, device="cpu")
        if len(rows) % 12 == 0:
            at = torch.randint(0, n, (2,), generator=dice, dtype=torch.int64, device="cpu")
            row[at] = float("nan")
        rows.append(row)
    return torch.stack(rows)
