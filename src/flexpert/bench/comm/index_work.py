"""The index work that a baseline does in torch, as fast as torch does it (pure).

Experts are dealt out in order, `slots` to a rank, so the owner of expert e is e // slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import embedding_bag


@dataclass(frozen=True, slots=True)
class Outgoing:
    """Deduplicated rows of one rank's tokens, by destination, then token.

    token: [rows] int64; counts: rows for each rank.
    bags, starts: for `sum_rows`: the rows of each token.
    """

    token: torch.Tensor
    counts: list[int]
    bags: torch.Tensor
    starts: torch.Tensor


def outgoing(expert_ids: torch.Tensor, slots: int, ranks: int) -> Outgoing:
    """expert_ids: [tokens, k] int64."""
    owner = torch.div(expert_ids, slots, rounding_mode="floor")
    desired = torch.zeros((expert_ids.shape[0], ranks), dtype=torch.bool).scatter_(1, owner, True)
    by_rank = desired.t().contiguous()
    token = by_rank.nonzero()[:, 1]
    place = (by_rank.flatten().cumsum(0) - 1).view(by_rank.shape).t()
    return Outgoing(token, by_rank.sum(1).tolist(), place[desired], starts_of(desired.sum(1)))


@dataclass(frozen=True, slots=True)
class Local:
    """The (token, local expert) pairs among tokens that came, by slot, then token.

    token: [pairs] int64, index of the pair's token among those that came.
    bags: [pairs] int64, weights: [pairs] float32, starts: [tokens]: for `sum_rows`, the pairs of
        each token.
    counts: [tokens] pairs of each token.
    """

    token: torch.Tensor
    bags: torch.Tensor
    weights: torch.Tensor
    starts: torch.Tensor
    counts: torch.Tensor


def local_pairs(expert_ids: torch.Tensor, weights: torch.Tensor, slots: int, rank: int) -> Local:
    """expert_ids: [tokens, k] int32 or int64; weights: [tokens, k] float32."""
    mine = (expert_ids >= rank * slots) & (expert_ids < (rank + 1) * slots)
    pair = mine.flatten().nonzero().squeeze(1)
    order = torch.argsort(expert_ids.flatten()[pair], stable=True)
    token = torch.div(pair, expert_ids.shape[1], rounding_mode="floor")[order]
    counts = mine.sum(1)
    return Local(token, inverse(order), weights.flatten()[pair], starts_of(counts), counts)


def inverse(order: torch.Tensor) -> torch.Tensor:
    """[n] int64 → where each element went."""
    back = torch.empty_like(order)
    back[order] = torch.arange(order.shape[0])
    return back


def starts_of(counts: torch.Tensor) -> torch.Tensor:
    """Where each of several runs of these lengths begins."""
    return counts.cumsum(0) - counts


def sum_rows(
    rows: torch.Tensor,
    bags: torch.Tensor,
    starts: torch.Tensor,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """[len(starts), hidden]: Σ weight · rows[bag], summed in float32 by torch's fastest kernel for
    it, which wants the weights in the dtype of the rows."""
    scale = None if weights is None else weights.to(rows.dtype)
    return embedding_bag(bags, rows, starts, mode="sum", per_sample_weights=scale)


def pack_routing(out: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor) -> None:
    """out: [tokens, 2 k] int32 ← ids, then the bits of float32 weights."""
    k = expert_ids.shape[1]
    out[:, :k] = expert_ids
    out[:, k:] = weights.view(torch.int32)


def unpack_routing(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[tokens, 2 k] int32 → ids [tokens, k] int32, weights [tokens, k] float32."""
    k = packed.shape[1] // 2
    return packed[:, :k], packed[:, k:].contiguous().view(torch.float32)
