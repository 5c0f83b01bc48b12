"""Exchanges between GPU ranks in processes of their own, each held against the oracle there.

Without a GPU in Triton's interpreter.
"""

from __future__ import annotations

import torch

from flexpert.comm import Buffer, ExpertTable
from flexpert.comm.buffer import Reduce, Scales
from flexpert.comm.quant import quantise
from flexpert.comm.routing import Sent, expected_rows, expected_sums
from support.comm_local import same_bits
from support.comm_ranks import apply_experts, random_sent
from support.cuda_local import DEVICE


def placed(s: Sent) -> Sent:
    """The same where the exchange is."""
    table = ExpertTable(s.table.rank.to(DEVICE), s.table.slot.to(DEVICE), s.table.slots)
    return Sent(s.x.to(DEVICE), s.expert_ids.to(DEVICE), s.weights.to(DEVICE), table)


def results(sent: dict[int, Sent], ids: tuple[int, ...]) -> dict[int, torch.Tensor]:
    """What the experts of every rank make of the rows."""
    return {rank: apply_experts(*expected_rows(sent, rank)[:2]) for rank in ids}


def exchanges(
    buffer: Buffer, ids: tuple[int, ...], seeds: range, reduce: Reduce, fp8: Scales | None = None
) -> int:
    """Some exchanges; every rank knows what all send, and checks its part bit for bit."""
    for seed in seeds:
        idle = ids[:1] if seed % 4 == 1 else ids[1:] if seed % 4 == 2 else ()
        sent = random_sent(buffer.spec, ids, seed, idle=idle, wide=seed % 2 == 0)
        s = placed(sent[buffer.rank])
        got = buffer.dispatch(s.x, s.expert_ids, s.weights, s.table, fp8=fp8)
        x, offsets, weights = expected_rows(sent, buffer.rank)
        assert torch.equal(got.offsets.cpu(), offsets)
        assert same_bits(got.weights.cpu(), weights)
        if fp8 is None:
            assert same_bits(got.x.cpu(), x)
        elif len(x):
            q, scales = quantise(x, fp8)
            assert got.scales is not None
            assert torch.equal(got.scales.cpu(), scales)
            assert torch.equal(got.x.cpu().view(torch.uint8), q.view(torch.uint8))
        y = results(sent, ids)
        out = buffer.combine(y[buffer.rank].to(DEVICE), got, reduce=reduce)
        assert same_bits(out.cpu(), expected_sums(sent, y, buffer.rank, reduce)), seed
    return len(seeds)
