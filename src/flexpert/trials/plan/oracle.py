"""What every exchange must give, from seeds alone, in float64, without a line of flexpert.comm."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

FP8_ERROR = 1 / 14  # of a value: half a step of e4m3 is 1 / 16, and it is rounded once more


def rounding(sizes: Sizes) -> float:
    """Largest relative error of a combined result.

    Three roundings to the dtype, of half an eps each: the expert's row, a rank's partial sum, the
    result; and float32 sums in between. All that is added has the sign of x.
    """
    eps = float(torch.finfo(sizes.dtype).eps)
    return 1.5 * eps + (sizes.topk + 4) * 2.0**-23


@dataclass(frozen=True, slots=True)
class Sizes:
    tokens: int
    hidden: int
    topk: int
    experts_per_rank: int
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Inputs:
    """What one rank sends: x [tokens, hidden], experts [tokens, topk], weights [tokens, topk]."""

    x: torch.Tensor
    experts: NDArray[np.int64]
    weights: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Rows:
    """What a dispatch brought: offsets [slots + 1]; source, token, weights [rows].

    x: [rows, hidden], perhaps after fp8.
    """

    offsets: torch.Tensor
    source: torch.Tensor
    token: torch.Tensor
    weights: torch.Tensor
    x: torch.Tensor


def inputs(sizes: Sizes, ranks: Collection[int], key: tuple[int, ...]) -> Inputs:
    """`key`: seed, phase, exchange, rank. Experts are those of `ranks`; some choices are -1, and
    some ranks have few tokens or none."""
    draw = np.random.default_rng(key)
    tokens = sizes.tokens if draw.random() < 0.5 else int(draw.integers(0, sizes.tokens + 1))
    first = np.array(sorted(ranks), np.int64) * sizes.experts_per_rank
    owned: NDArray[np.int64] = (first[:, None] + np.arange(sizes.experts_per_rank)).ravel()
    experts = owned[draw.integers(0, len(owned), (tokens, sizes.topk))]
    experts[draw.random(experts.shape) < 0.1] = -1
    values = draw.standard_normal((tokens, sizes.hidden), dtype=np.float32)
    x = torch.from_numpy(values).to(sizes.dtype)
    # none so small that its loss would hide in the rounding of the others
    weights = np.float32(0.25) + np.float32(0.75) * draw.random(experts.shape, dtype=np.float32)
    return Inputs(x, experts, weights)


def factor(expert: NDArray[np.int64]) -> NDArray[np.float64]:
    """What an expert multiplies its rows with; 101 in a row differ, so that a result of another
    expert, or of another rank, is not taken for the right one."""
    return 1.0 + (expert * 37 % 101) / 64.0


def _apart(
    found: torch.Tensor, expected: torch.Tensor, relative: float, absolute: float = 0.0
) -> torch.Tensor:
    """Where `found` is off by more than `relative` of an element, or is NaN: bool, as `found`.

    An fp8 value near zero is off by a share of its block's largest, at most half of e4m3's
    smallest step, 2 ** -10, times a scale of at most 2 / 448.
    """
    size = expected.abs()
    bound = relative * size + absolute
    if relative >= FP8_ERROR:
        bound += size.amax(-1, keepdim=True) * 2.0**-9 / 448
    return ~((found.double() - expected).abs() <= bound)


def check_received(
    sizes: Sizes,
    rank: int,
    sent: Mapping[int, Inputs],
    rows: Rows,
    tolerance: float,
) -> str:
    """ "" or what is wrong with the rows that the ranks in `sent` brought to `rank`."""
    at, count = 0, len(rows.source)
    for slot in range(sizes.experts_per_rank):
        expert = rank * sizes.experts_per_rank + slot
        for home in sorted(sent):
            for index, choices in enumerate(sent[home].experts):
                for choice in np.flatnonzero(choices == expert):
                    if at >= count or (int(rows.source[at]), int(rows.token[at])) != (home, index):
                        return f"row {at} of expert {expert} should be token {index} of rank {home}"
                    if float(rows.weights[at]) != float(sent[home].weights[index, choice]):
                        return f"row {at} of expert {expert} has another router weight"
                    if _apart(rows.x[at], sent[home].x[index].double(), tolerance).any():
                        return f"token {index} of rank {home} arrived changed at expert {expert}"
                    at += 1
        if int(rows.offsets[slot + 1]) != at:
            return f"{int(rows.offsets[slot + 1])} rows up to expert {expert}, expected {at}"
    return "" if at == count else f"{count} rows, expected {at}"


def check_combined(
    sizes: Sizes,
    own: Inputs,
    up: Collection[int],
    out: torch.Tensor,
    lost: torch.Tensor | None,
    lost_weight: torch.Tensor | None,
    lost_ranks: Collection[int],
    tolerance: float,
) -> str:
    """ "" or what is wrong with the sums of `own`, when only the owners in `up` have answered."""
    owner = own.experts // sizes.experts_per_rank
    there = (own.experts >= 0) & np.isin(owner, sorted(up))
    gone = (own.experts >= 0) & ~there
    told = np.zeros(gone.shape, bool) if lost is None else lost.numpy()
    if not np.array_equal(gone, told):
        return "the loss that was reported is not the loss that happened"
    if set(lost_ranks) != set(owner[gone].tolist()):
        return "the ranks that are said to be missing are not those that are"
    weights = own.weights.astype(np.float64)
    if lost_weight is not None and not np.allclose(lost_weight.numpy(), (weights * gone).sum(1)):
        return "the lost weight is wrong"
    sums = (weights * there * factor(own.experts)).sum(1)
    expected = torch.from_numpy(sums)[:, None] * own.x.double()
    finest = torch.finfo(sizes.dtype)
    subnormal = finest.smallest_normal * finest.eps  # fp16 gets there with ordinary values
    if _apart(out, expected, tolerance, 4 * sizes.topk * subnormal).any():
        return "a combined result is wrong"
    return ""
