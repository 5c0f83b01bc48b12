"""Which token goes to which rank, and which row to which expert. Pure.

`check_dispatch` guards the way in of every backend. The rest says in a few plain lines what the
kernels do; tests hold each backend against it, and it is the place to read what is promised.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from flexpert.comm.buffer import BufferSpec, ExpertTable, Reduce


def check_dispatch(
    spec: BufferSpec, x: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor
) -> None:
    """Raises: ValueError: a shape, dtype or device that `Buffer.dispatch` does not take."""
    if x.ndim != 2 or x.dtype not in (spec.dtype, torch.uint8):
        raise ValueError(
            f"x must be [tokens, {spec.hidden}] {spec.dtype}, or uint8 [tokens, bytes]; "
            f"is {list(x.shape)} {x.dtype}"
        )
    if x.dtype is torch.uint8:
        if not 1 <= x.shape[1] <= spec.hidden * spec.dtype.itemsize:
            raise ValueError(
                f"a row holds 1 to {spec.hidden * spec.dtype.itemsize} bytes, not {x.shape[1]}"
            )
    elif x.shape[1] != spec.hidden:
        raise ValueError(f"x must be [tokens, {spec.hidden}], is {list(x.shape)}")
    tokens = x.shape[0]
    if tokens > spec.max_tokens:
        raise ValueError(f"{tokens} tokens in one dispatch; the buffer holds {spec.max_tokens}")
    ids_shape = expert_ids.shape
    if len(ids_shape) != 2 or ids_shape[0] != tokens or ids_shape[1] > spec.topk:
        raise ValueError(
            f"expert_ids must be [{tokens}, k <= {spec.topk}], is {list(expert_ids.shape)}"
        )
    if expert_ids.dtype is not torch.int64 and expert_ids.dtype is not torch.int32:
        raise ValueError(f"expert_ids must be int32 or int64, is {expert_ids.dtype}")
    if weights.dtype is not torch.float32 or weights.shape != ids_shape:
        raise ValueError(
            f"weights must be {list(ids_shape)} float32, is {list(weights.shape)} {weights.dtype}"
        )
    if not x.is_contiguous():
        raise ValueError("x must be contiguous")


def check_table(table: ExpertTable) -> None:
    """Raises: ValueError: not two int32 vectors of one length."""
    for name, tensor in (("rank", table.rank), ("slot", table.slot)):
        if tensor.dtype is not torch.int32 or tensor.ndim != 1 or not tensor.is_contiguous():
            raise ValueError(f"ExpertTable.{name} must be a contiguous int32 vector")
    if table.rank.shape != table.slot.shape:
        raise ValueError("ExpertTable.rank and .slot differ in length")
    if table.slots < 0:
        raise ValueError(f"ExpertTable.slots is {table.slots}")


@dataclass(frozen=True, slots=True)
class Sent:
    """The arguments of one rank's dispatch."""

    x: torch.Tensor  # [tokens, hidden]
    expert_ids: torch.Tensor  # [tokens, k]
    weights: torch.Tensor  # [tokens, k] float32
    table: ExpertTable


@dataclass(frozen=True, slots=True)
class Pair:
    """One (token, expert) on its way: from the k-th choice of a token at home to a slot."""

    home: int
    token: int
    choice: int
    rank: int
    slot: int


def pairs(sent: Mapping[int, Sent]) -> list[Pair]:
    """Every (token, expert) of a dispatch in the order of (home, token, choice)."""
    return [
        Pair(home, token, choice, int(s.table.rank[expert]), int(s.table.slot[expert]))
        for home, s in sorted(sent.items())
        for token, experts in enumerate(s.expert_ids.tolist())
        for choice, expert in enumerate(experts)
        if expert >= 0
    ]


def arrivals(sent: Mapping[int, Sent], rank: int) -> list[Pair]:
    """The rows of `Received.x` on `rank`: by slot, then (home, token), then choice."""
    return sorted((p for p in pairs(sent) if p.rank == rank), key=lambda p: p.slot)


def expected_rows(
    sent: Mapping[int, Sent], rank: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What a dispatch brings to `rank`: x [rows, hidden], offsets [slots + 1], weights [rows]."""
    here = arrivals(sent, rank)
    own = sent[rank]
    x = torch.stack([sent[p.home].x[p.token] for p in here]) if here else own.x[:0]
    offsets = torch.zeros(own.table.slots + 1, dtype=torch.int32, device="cpu")
    for p in here:
        offsets[p.slot + 1 :] += 1
    weights = torch.tensor(
        [float(sent[p.home].weights[p.token, p.choice]) for p in here],
        dtype=torch.float32,
        device="cpu",
    )
    return x, offsets, weights


def expected_sums(
    sent: Mapping[int, Sent], y: Mapping[int, torch.Tensor], home: int, reduce: Reduce
) -> torch.Tensor:
    """What `combine` returns on `home`, bit for bit.

    y: rank → [rows, hidden], in the order of `arrivals`.
    """
    own = sent[home]
    row = {p: y[rank][at] for rank in sent for at, p in enumerate(arrivals(sent, rank))}
    out = torch.zeros(own.x.shape, dtype=torch.float32, device="cpu")
    mine = [p for p in pairs(sent) if p.home == home]

    def weighted(p: Pair) -> torch.Tensor:
        return own.weights[p.token, p.choice] * row[p].float()

    if reduce == "home":
        for p in mine:
            out[p.token] += weighted(p)
    else:
        for token, rank in sorted({(p.token, p.rank) for p in mine}):
            partial = torch.zeros(own.x.shape[1], dtype=torch.float32, device="cpu")
            for p in mine:
                if (p.token, p.rank) == (token, rank):
                    partial += weighted(p)
            out[token] += partial.to(own.x.dtype).float()
    return out.to(own.x.dtype)
