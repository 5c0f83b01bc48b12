"""Dispatch and combine give what routing.py says, bit for bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.comm_local import Local, check_received, dispatch, placed, same_bits
from support.comm_ranks import Ranks, apply_experts, random_sent, random_table, spec_of, vote

from flexpert.comm import Buffer, ExpertTable
from flexpert.comm.buffer import Reduce
from flexpert.comm.errors import StaleEpoch
from flexpert.comm.host.host_buffer import HostBuffer
from flexpert.comm.routing import Sent, arrivals, expected_sums, pairs

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def exchanges(buffer: Buffer, ids: tuple[int, ...], seeds: range, reduce: Reduce) -> int:
    """Some exchanges in a rank process. Every rank knows what all send, and checks its part."""
    vote(buffer)
    for seed in seeds:
        idle = ids[:1] if seed % 4 == 1 else ids[1:] if seed % 4 == 2 else ()
        sent = random_sent(buffer.spec, ids, seed, idle=idle, wide=seed % 2 == 0)
        received = dispatch(buffer, sent[buffer.rank])
        check_received(received, sent, buffer.rank)
        y = {}
        for rank in ids:
            here = arrivals(sent, rank)
            x = [sent[p.home].x[p.token] for p in here]
            slots = torch.tensor([p.slot for p in here], dtype=torch.int64)
            offsets = torch.zeros(sent[rank].table.slots + 1, dtype=torch.int64)
            offsets[1:] = torch.bincount(slots, minlength=sent[rank].table.slots).cumsum(0)
            y[rank] = apply_experts(torch.stack(x) if x else sent[rank].x[:0], offsets)
        assert same_bits(y[buffer.rank], apply_experts(received.x, received.offsets))
        mine = placed(buffer, received, y[buffer.rank])
        out = buffer.combine(mine, received, reduce=reduce)
        assert same_bits(out, expected_sums(sent, y, buffer.rank, reduce)), seed
    return len(seeds)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_processes_exchange_what_the_oracle_says(dtype: torch.dtype) -> None:
    with Ranks(spec_of(4, dtype=dtype), range(4)) as ranks:
        epoch = 0
        for count in (1, 2, 3, 4):
            for reduce in ("rank", "home"):
                epoch += 1
                ids = tuple(range(4 - count, 4))
                ranks.activate(ids, epoch)
                seeds = range(epoch * 100, epoch * 100 + 6)
                done = ranks.some(ids, exchanges, ids, seeds, reduce)
                assert done == dict.fromkeys(ids, 6)


@pytest.mark.parametrize(
    ("capacity", "ids"),
    [
        (1, (0,)),
        (3, (0, 2)),
        (7, (0, 5, 6)),
        (7, (6,)),
        (32, (3, 17, 31)),
        (256, (0, 128, 255)),
    ],
)
@pytest.mark.parametrize("reduce", ["rank", "home"])
def test_sparse_ids_in_any_capacity(
    local: Local, capacity: int, ids: tuple[int, ...], reduce: Reduce
) -> None:
    spec = spec_of(capacity)
    local.start(spec, ids)
    local.activate(ids)
    for seed in range(4):
        local.exchange(random_sent(spec, ids, seed), reduce)


def test_holes_from_the_start(local: Local) -> None:
    spec = spec_of(4)
    local.start(spec, [0, 2])
    local.activate([0, 2])
    local.exchange(random_sent(spec, (0, 2), 1), "rank")
    local.exchange(random_sent(spec, (0, 2), 2), "home")


def test_24_ranks_scattered_over_256_ids(local: Local) -> None:
    spec = spec_of(256, max_tokens=4, hidden=16)
    ids = tuple(range(3, 256, 11))
    local.start(spec, ids)
    local.activate(ids)
    local.exchange(random_sent(spec, ids, 1, experts=100), "rank")
    local.exchange(random_sent(spec, ids, 2, experts=100), "home")


def results_by_token(
    local: Local, ids: tuple[int, ...], seed: int, dtype: torch.dtype
) -> dict[int, torch.Tensor]:
    """48 fixed tokens, dealt out to the ranks; expert e multiplies by a number of its own."""
    tokens, experts, k, hidden = 48, 12, 5, 40
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(tokens, hidden, generator=generator).to(dtype)
    chosen = torch.randint(-1, experts, (tokens, k), generator=generator)
    weights = torch.rand(tokens, k, generator=generator)
    factor = torch.randn(experts, generator=generator)
    home = torch.randint(0, len(ids), (tokens,), generator=torch.Generator().manual_seed(seed))

    mine = {rank: [t for t in range(tokens) if home[t] == at] for at, rank in enumerate(ids)}
    sent = {
        rank: Sent(x[at], chosen[at], weights[at], random_table(ids, experts, seed, rank))
        for rank, at in mine.items()
    }
    received = local.each(ids, lambda b: dispatch(b, sent[b.rank]))
    y = {}
    for rank in ids:
        table = sent[rank].table
        expert_of = {(int(table.rank[e]), int(table.slot[e])): e for e in range(experts)}
        scale = [float(factor[expert_of[p.rank, p.slot]]) for p in arrivals(sent, rank)]
        y[rank] = (received[rank].x.float() * torch.tensor(scale).reshape(-1, 1)).to(dtype)

    def combined(b: HostBuffer) -> torch.Tensor:
        mine = placed(b, received[b.rank], y[b.rank])
        return b.combine(mine, received[b.rank], reduce="home")

    sums = local.each(ids, combined)
    return {t: sums[rank][at] for rank in ids for at, t in enumerate(mine[rank])}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_home_sums_do_not_depend_on_placement_or_number_of_ranks(
    local: Local, dtype: torch.dtype
) -> None:
    local.start(spec_of(4, max_tokens=48, hidden=40, topk=5, dtype=dtype), range(4))
    seen = []
    for seed, ids in enumerate([(0,), (0, 1), (3, 1), (0, 2, 3), (0, 1, 2, 3), (0, 1, 2, 3)]):
        local.activate(ids)
        seen.append(results_by_token(local, ids, seed, dtype))
    for results in seen[1:]:
        assert all(same_bits(results[t], seen[0][t]) for t in seen[0])


def test_an_expert_chosen_twice_by_a_token_counts_twice(local: Local) -> None:
    spec = spec_of(2, hidden=8)
    local.start(spec, [0, 1])
    local.activate([0, 1])
    sent = random_sent(spec, (0, 1), 3, experts=2)
    sent = {rank: replace(s, expert_ids=torch.ones_like(s.expert_ids)) for rank, s in sent.items()}
    assert any(p.rank == q.rank for p, q in zip(pairs(sent), pairs(sent)[1:], strict=False))
    local.exchange(sent, "home")
    local.exchange(sent, "rank")


def one_rank_sum(local: Local, x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """y of each token's experts is x itself: out = sum of weights * x, through the kernels."""
    k = weights.shape[1]
    ids = torch.arange(k).expand(x.shape[0], k).contiguous()
    table = ExpertTable(torch.zeros(k, dtype=torch.int32), torch.arange(k, dtype=torch.int32), k)
    received = local.buffers[0].dispatch(x, ids, weights, table)
    return local.buffers[0].combine(received.x, received, reduce="home")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sums_round_as_torch_does_for_every_value_there_is(
    local: Local, dtype: torch.dtype
) -> None:
    """All 65536 bit patterns, infinities, subnormals and NaN among them."""
    x = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(dtype)
    x = x.reshape(256, 256)
    local.start(spec_of(1, max_tokens=256, hidden=256, topk=1, dtype=dtype), [0])
    for weight in (1.0, 1.0 / 3.0, -0.7, 1.7e-3, 5.3e4):
        weights = torch.full((256, 1), weight)
        got = one_rank_sum(local, x, weights)
        want = (0.0 + weights * x.float()).to(dtype)
        assert torch.equal(torch.isnan(got), torch.isnan(want))
        assert same_bits(torch.nan_to_num(got, nan=7.0), torch.nan_to_num(want, nan=7.0))


@pytest.mark.parametrize("hidden", [1, 7, 511, 512, 513, 1100])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_any_length(local: Local, hidden: int, dtype: torch.dtype) -> None:
    spec = spec_of(2, max_tokens=5, hidden=hidden, dtype=dtype)
    local.start(spec, [0, 1])
    local.activate([0, 1])
    local.exchange(random_sent(spec, (0, 1), 5), "rank")
    local.exchange(random_sent(spec, (0, 1), 6), "home")


def test_bad_arguments_are_refused_before_anything_is_sent(local: Local) -> None:
    spec = spec_of(2)
    local.start(spec, [0, 1])
    local.activate([0, 1])
    sent = random_sent(spec, (0, 1), 1)
    s = replace(
        sent[0],
        x=torch.zeros(3, spec.hidden, dtype=spec.dtype),
        expert_ids=torch.zeros(3, 2, dtype=torch.int64),
        weights=torch.ones(3, 2),
    )
    orphan = s.table.rank.clone()
    orphan[0] = -1
    masked = s.table.rank.clone()
    masked[0] = 9
    wrong = {
        "x must be": replace(s, x=s.x.float()),
        "x must be contiguous": replace(
            s, x=torch.zeros(3, 2 * spec.hidden, dtype=spec.dtype)[:, ::2]
        ),
        "tokens in one dispatch": replace(
            s, x=torch.zeros(spec.max_tokens + 1, spec.hidden, dtype=spec.dtype)
        ),
        "expert_ids must be int32": replace(s, expert_ids=s.expert_ids.to(torch.int16)),
        "expert_ids must be .*k <=": replace(
            s, expert_ids=torch.zeros(3, spec.topk + 1, dtype=torch.int64)
        ),
        "weights must be": replace(s, weights=s.weights.double()),
        "does not exist": replace(s, expert_ids=s.expert_ids + 99),
        "expert -2 does not exist": replace(s, expert_ids=s.expert_ids - 2),
        "owned by nobody": replace(s, table=replace(s.table, rank=orphan)),
        "not active": replace(s, table=replace(s.table, rank=masked)),
        "int32 vector": replace(s, table=replace(s.table, slot=s.table.slot.long())),
    }
    for message, bad in wrong.items():
        with pytest.raises(ValueError, match=message):
            dispatch(local.buffers[0], bad)
    local.exchange(sent, "rank")  # both still agree on the number of the exchange


def test_combine_takes_only_the_handle_of_the_last_dispatch(local: Local) -> None:
    spec = spec_of(1)
    (buffer,) = local.start(spec, [0]).values()
    local.activate([0])
    s = random_sent(spec, (0,), 1)[0]
    first = dispatch(buffer, s)
    y = first.x.clone()
    buffer.combine(y, first)
    with pytest.raises(StaleEpoch, match="combined already"):
        buffer.combine(y, first)
    second = dispatch(buffer, s)
    with pytest.raises(StaleEpoch):
        buffer.combine(y, first)
    buffer.combine(y, second)
    third = dispatch(buffer, s)
    local.activate([0])
    with pytest.raises(StaleEpoch, match="of epoch 2"):
        buffer.combine(y, third)


def test_combine_fills_the_tensor_it_is_given(local: Local) -> None:
    spec = spec_of(1)
    (buffer,) = local.start(spec, [0]).values()
    s = random_sent(spec, (0,), 4)[0]
    received = dispatch(buffer, s)
    out = torch.full_like(s.x, 9.0)
    with pytest.raises(ValueError, match="out must be"):
        buffer.combine(received.x, received, out=out[:, :1])
    with pytest.raises(ValueError, match="y must be"):
        buffer.combine(received.x[1:], received)
    assert buffer.combine(received.x, received, out=out) is out
    assert same_bits(out, expected_sums({0: s}, {0: received.x}, 0, "rank"))
