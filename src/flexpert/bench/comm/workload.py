"""What is exchanged: sizes, random routing and data, and what must come out of it (pure)."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
import torch

from flexpert.comm import ExpertTable
from flexpert.comm.routing import Sent, expected_rows

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

_POOL = 16  # inputs a rank goes through in turn, so that none is still in its L2 cache
_POOL_BYTES = 512 << 20  # of a rank; fewer inputs when they are larger than that


class Workload(msgspec.Struct, frozen=True, kw_only=True):
    """tokens: of each rank in one exchange. Experts are dealt out in order."""

    ranks: int
    tokens: int
    hidden: int
    topk: int
    experts: int
    dtype: str
    seed: int

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def row_bytes(self) -> int:
        return self.hidden * self.torch_dtype.itemsize

    @property
    def pool(self) -> int:
        """Different inputs of a rank."""
        return max(2, min(_POOL, _POOL_BYTES // (self.tokens * self.row_bytes)))

    @property
    def slots(self) -> int:
        """Experts of a rank; the last rank may own fewer."""
        return -(-self.experts // self.ranks)


@dataclass(frozen=True, slots=True)
class Input:
    """One exchange of one rank.

    x: [tokens, hidden] workload dtype; expert_ids: [tokens, topk] int64, all different;
    weights: [tokens, topk] float32, their sum is 1.
    """

    x: torch.Tensor
    expert_ids: torch.Tensor
    weights: torch.Tensor


def expert_table(work: Workload) -> ExpertTable:
    """The same on every rank."""
    experts = torch.arange(work.experts, dtype=torch.int32)
    return ExpertTable(
        torch.div(experts, work.slots, rounding_mode="floor"), experts % work.slots, work.slots
    )


def make_input(work: Workload, rank: int, turn: int) -> Input:
    """What `rank` sends in its turn-th exchange; any process can make that of any rank."""
    generator = torch.Generator().manual_seed((work.seed * 1009 + rank) * 1009 + turn % work.pool)
    scores = torch.rand(work.tokens, work.experts, generator=generator)
    chosen, ids = scores.topk(work.topk)
    x = torch.randn(work.tokens, work.hidden, generator=generator).to(work.torch_dtype)
    return Input(x, ids.contiguous(), (chosen / chosen.sum(1, keepdim=True)).contiguous())


def expected_arrivals(work: Workload, rank: int, turn: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What must lie on `rank` after dispatch: rows [pairs, hidden], one for each (token, local
    expert), and their slots [pairs]; by slot, then source rank, then token."""
    table = expert_table(work)
    sent = {
        home: Sent(i.x, i.expert_ids, i.weights, table)
        for home in range(work.ranks)
        for i in [make_input(work, home, turn)]
    }
    rows, offsets, _ = expected_rows(sent, rank)
    counts = torch.diff(offsets.long())
    return rows, torch.repeat_interleave(torch.arange(work.slots), counts)


def expert_results(rows: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """y [pairs, hidden] for the check: each slot multiplies by a factor of its own."""
    return (rows.float() * (1.0 + 0.25 * slots.float())[:, None]).to(rows.dtype)


def expected_result(work: Workload, i: Input) -> tuple[torch.Tensor, torch.Tensor]:
    """float64 [tokens, hidden]: Σ weight·y of each token, and Σ |weight·y|."""
    slots = expert_table(work).slot[i.expert_ids]
    total = torch.zeros(i.x.shape, dtype=torch.float64)
    size = torch.zeros_like(total)
    for choice in range(work.topk):
        y = expert_results(i.x, slots[:, choice]).double()
        part = i.weights[:, choice, None].double() * y
        total += part
        size += part.abs()
    return total, size


def deduplicated_rows(work: Workload, rank: int, turn: int) -> torch.Tensor:
    """[ranks] int64: rows that `rank` must send each rank, a token once; 0 to itself."""
    owners = expert_table(work).rank[make_input(work, rank, turn).expert_ids].long()
    desired = torch.zeros(work.tokens, work.ranks, dtype=torch.bool).scatter_(1, owners, True)
    desired[:, rank] = False
    return desired.sum(0)
