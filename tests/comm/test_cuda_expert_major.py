"""Rows are packed by expert where the oracle says, and their results are read from there."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from support.comm_local import same_bits
from support.comm_ranks import apply_experts, random_sent, spec_of
from support.cuda_local import DEVICE, CudaLocal, gathered

from flexpert.comm import BufferSpec
from flexpert.comm.buffer import Reduce, Scales
from flexpert.comm.cuda.cuda_exchange import FEW, CudaDispatched, CudaExchange, Tuning
from flexpert.comm.cuda.expert_major import NO_ROOM, NOWHERE, ExpertMajor, pack
from flexpert.comm.routing import arrivals, expected_rows, expected_sums

LOW = (1 << 32) - 1


def room(exchange: CudaExchange, sent: CudaDispatched, limit: int, sources: int) -> ExpertMajor:
    """Tensors filled with what nobody sends."""
    into = ExpertMajor.empty(exchange, sent, limit, sources)
    into.x.view(torch.uint8).fill_(0x7F)
    for tensor in (into.count, into.token, into.ranges, into.places):
        tensor.fill_(99)
    return into


def check_pack(
    local: CudaLocal, seed: int, limit: int, sources: int, *, fp8: Scales | None = None
) -> int:
    """One exchange of all ranks against routing.py; returns how many rows had no room."""
    ids = tuple(local.ranks)
    sent = random_sent(local.spec, ids, seed)
    if local.same_k:
        k = min(s.expert_ids.shape[1] for s in sent.values())
        sent = {
            rank: replace(s, expert_ids=s.expert_ids[:, :k], weights=s.weights[:, :k].contiguous())
            for rank, s in sent.items()
        }
    done = local.dispatch(sent, fp8)
    lost = 0
    for rank, handle in done.items():
        exchange = local.ranks[rank]
        into = room(exchange, handle, limit, sources)
        before = into.x.view(torch.uint8).clone()
        pack(exchange, handle, into)
        rows = gathered(handle.indexed).view(torch.uint8)
        scales = handle.indexed.scales
        of_slot: dict[int, list[tuple[int, int, int]]] = {s: [] for s in range(len(into.count))}
        for at, p in enumerate(arrivals(sent, rank)):
            if len(of_slot[p.slot]) < limit and p.home < sources:
                of_slot[p.slot].append((at, p.home, p.token))
            else:
                lost += 1
        kept = sum(len(found) for found in of_slot.values())
        for slot, found in of_slot.items():
            assert int(into.count[slot]) == len(found)
            begin = 0
            for source in range(sources):
                number = sum(1 for _, s, _ in found if s == source)
                entry = int(into.ranges[slot, source])
                assert (entry >> 32, entry & LOW) == (begin, number)
                begin += number
            for row, (at, _, token) in enumerate(found):
                assert torch.equal(into.x[slot, row].view(torch.uint8).cpu(), rows[at])
                assert int(into.token[slot, row]) == token
                if scales is not None and into.scales is not None:
                    desired = scales[handle.indexed.rows[at].long()]
                    assert torch.equal(into.scales[slot, row], desired)
            rest = into.x[slot, len(found) :].view(torch.uint8)
            assert torch.equal(rest, before[slot, len(found) :])
        used = handle.stride * local.spec.capacity * local.spec.max_tokens
        places = into.places[:used]
        assert int((places >= 0).sum()) == kept
        assert int((places == NO_ROOM).sum()) == len(rows) - kept
        assert int((places == NOWHERE).sum()) == used - len(rows)
    return lost


@pytest.mark.slow
@pytest.mark.parametrize("same_k", [False, True])
def test_rows_lie_by_expert_and_nothing_else_is_touched(same_k: bool) -> None:
    spec = spec_of(3, dtype=torch.float32, max_tokens=4, hidden=20)
    local = CudaLocal(spec, (0, 2), same_k=same_k)
    local.activate((0, 2))
    for seed in range(3):
        assert check_pack(local, seed, limit=12, sources=3) == 0


def test_rows_beyond_the_limit_and_of_other_sources_are_left_out() -> None:
    spec = spec_of(3, dtype=torch.float32, max_tokens=4, hidden=20)
    local = CudaLocal(spec, (0, 2))
    local.activate((0, 2))
    assert check_pack(local, 1, limit=1, sources=3) > 0
    assert check_pack(local, 2, limit=12, sources=1) > 0


@pytest.mark.parametrize("fp8", ["float32", "power2", "ue8m0"])
def test_fp8_rows_come_with_column_major_scales(fp8: Scales) -> None:
    spec = spec_of(2, dtype=torch.float32, max_tokens=3, hidden=1024)
    local = CudaLocal(spec, range(2), tuning=replace(FEW, pack_width=64))
    local.activate(range(2))
    assert check_pack(local, 1, limit=6, sources=2, fp8=fp8) == 0


@pytest.mark.slow
@pytest.mark.parametrize("reduce", ["rank", "home"])
def test_results_are_read_from_their_places(reduce: Any) -> None:
    spec = spec_of(3, dtype=torch.float32, max_tokens=4, hidden=20)
    local = CudaLocal(spec, range(3), tuning=Tuning(width=16, workers=3, reducers=2, packers=2))
    local.activate(range(3))
    sent = random_sent(spec, (0, 1, 2), 4)
    done = local.dispatch(sent)
    y, spread, places = {}, {}, {}
    for rank, handle in done.items():
        into = room(local.ranks[rank], handle, 12, 3)
        pack(local.ranks[rank], handle, into)
        x, offsets, _ = expected_rows(sent, rank)
        y[rank] = apply_experts(x, offsets)
        spread[rank], places[rank] = into.x.fill_(float("nan")), into.places
        for slot, begin in enumerate(offsets[:-1].tolist()):
            end = int(offsets[slot + 1])
            spread[rank][slot, : end - begin] = y[rank][begin:end]
        spread[rank] = spread[rank].view(-1, spec.hidden)
    out = {rank: torch.empty((h.tokens, spec.hidden), device=DEVICE) for rank, h in done.items()}
    for rank, h in done.items():
        local.ranks[rank].send_combine(
            out[rank], spread[rank], h, reduce=reduce, wait=False, places=places[rank]
        )
    for rank, h in done.items():
        local.ranks[rank].wait_combine()
        sums = local.ranks[rank].reduce(
            out[rank], spread[rank], h, reduce=reduce, places=places[rank]
        )
        assert same_bits(sums.cpu(), expected_sums(sent, y, rank, reduce))


def test_tensors_that_do_not_fit_are_refused() -> None:
    spec = spec_of(1, dtype=torch.float32, max_tokens=2, hidden=256)
    local = CudaLocal(spec, [0])
    local.activate([0])
    done = local.dispatch(random_sent(spec, (0,), 1), "float32")[0]
    good = room(local.ranks[0], done, 2, 1)
    assert good.scales is not None
    for wrong, what in (
        (replace(good, x=good.x[:, :, :250]), "rows of whole 4 bytes"),
        (replace(good, x=good.x.view(torch.uint8)), "x must be"),
        (replace(good, x=good.x.transpose(0, 1).contiguous().transpose(0, 1)), "contiguous"),
        (replace(good, token=good.token[:, :1]), "token must be"),
        (replace(good, ranges=good.ranges.int()), "ranges must be"),
        (replace(good, places=good.places[1:]), "places must be"),
        (replace(good, scales=None), "exactly where"),
        (replace(good, scales=good.scales.contiguous()), "column-major"),
    ):
        with pytest.raises(ValueError, match=what):
            pack(local.ranks[0], done, cast(ExpertMajor, wrong))


def test_narrower_rows_than_were_sent() -> None:
    spec = BufferSpec(1, 2, 256, 4, torch.float32)
    local = CudaLocal(spec, [0])
    local.activate([0])
    done = local.dispatch(random_sent(spec, (0,), 1), "float32")[0]
    whole, half = room(local.ranks[0], done, 2, 1), room(local.ranks[0], done, 2, 1)
    one_column = torch.zeros(len(half.count), 1, 2, device=DEVICE).transpose(1, 2)
    half = replace(half, x=half.x[:, :, :128].contiguous(), scales=one_column)
    for into in (whole, half):
        pack(local.ranks[0], done, into)
    assert int(whole.count.sum()) > 0
    for slot, rows in enumerate(whole.count.tolist()):
        part = whole.x[slot, :rows, :128].view(torch.uint8)
        assert torch.equal(half.x[slot, :rows].view(torch.uint8), part)
        assert whole.scales is not None
        assert half.scales is not None
        assert torch.equal(half.scales[slot, :rows], whole.scales[slot, :rows, :1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("split", "choices"),
    [((), None), ((), 1), ((0,), None), ((0, 1, 2), None)],
    ids=["no rank", "no room for rows", "rank 0", "all ranks"],
)
def test_weights_of_the_combine_wherever_they_are_applied(
    split: tuple[int, ...], choices: int | None
) -> None:
    """Each rank sends sums, or the rows for its peers to sum; they need not do the same."""
    spec = spec_of(3, dtype=torch.float32, max_tokens=4, hidden=20)
    ids = (0, 1, 2)
    tuning = Tuning(width=16, workers=3, reducers=2, packers=2)
    local = CudaLocal(spec, ids, choices=choices, tuning=tuning)
    local.activate(ids)
    for seed in (4, 8, 9):
        torch.manual_seed(seed)
        sent = random_sent(spec, ids, seed)
        done = local.dispatch(sent)
        spread, places, given, handles = {}, {}, {}, {}
        for rank, handle in done.items():
            into = room(local.ranks[rank], handle, 12, 3)
            pack(local.ranks[rank], handle, into)
            x, offsets, _ = expected_rows(sent, rank)
            y = apply_experts(x, offsets)
            rows, places[rank] = into.x.fill_(float("nan")), into.places
            for slot, begin in enumerate(offsets[:-1].tolist()):
                end = int(offsets[slot + 1])
                rows[slot, : end - begin] = y[begin:end]
            spread[rank] = rows.view(-1, spec.hidden)
            off = torch.rand(handle.expert_ids.shape, device=DEVICE) < 0.2
            given[rank] = torch.rand(handle.weights.shape, device=DEVICE)
            handles[rank] = replace(handle, expert_ids=handle.expert_ids.masked_fill(off, -1))
        sums = combine_with(local, spread, places, given, handles, split)
        rows_of = {rank: expected_rows(sent, rank) for rank in ids}
        y_of = {rank: apply_experts(*rows_of[rank][:2]).double() for rank in ids}
        for rank, h in handles.items():
            weights = (given[rank] * (h.expert_ids >= 0)).cpu()
            desired = torch.zeros(h.tokens, spec.hidden, dtype=torch.float64)
            for owner in ids:
                for at, p in enumerate(arrivals(sent, owner)):
                    if p.home == rank:
                        desired[p.token] += weights[p.token, p.choice].double() * y_of[owner][at]
            torch.testing.assert_close(sums[rank].cpu().double(), desired, rtol=1e-5, atol=1e-5)


def combine_with(
    local: CudaLocal,
    y: dict[int, torch.Tensor],
    places: dict[int, torch.Tensor],
    weights: dict[int, torch.Tensor],
    handles: dict[int, CudaDispatched],
    split: tuple[int, ...],
) -> dict[int, torch.Tensor]:
    """Sums by rank; `split`: who does not wait for the weights of its peers."""
    out = {
        rank: torch.full((h.tokens, local.spec.hidden), float("nan"), device=DEVICE)
        for rank, h in handles.items()
    }
    reduce: dict[int, Reduce] = {rank: "home" if rank in split else "rank" for rank in handles}
    for rank, h in handles.items():
        local.ranks[rank].share_weights(weights[rank], h, wait=False)
    for rank, h in handles.items():
        exchange = local.ranks[rank]
        if rank not in split:
            exchange.share_weights(weights[rank], h, send=False)
        exchange.send_combine(
            out[rank], y[rank], h, reduce=reduce[rank], wait=False, places=places[rank], shared=True
        )
    for rank, h in handles.items():
        local.ranks[rank].wait_combine()
        local.ranks[rank].reduce(
            out[rank],
            y[rank],
            h,
            reduce=reduce[rank],
            weights=weights[rank],
            places=places[rank],
            shared=True,
        )
    return out
