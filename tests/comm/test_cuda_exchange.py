"""The GPU exchange gives what routing.py says, bit for bit; in the interpreter without a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.comm_local import same_bits
from support.comm_ranks import apply_experts, random_sent, random_table, spec_of
from support.cuda_local import DEVICE, CudaLocal, gathered, parts

from flexpert.comm import ExpertTable
from flexpert.comm.buffer import Reduce, Scales
from flexpert.comm.cuda.cuda_exchange import Tuning
from flexpert.comm.cuda.cuda_layout import Missing, Word, read_report
from flexpert.comm.quant import quantise
from flexpert.comm.routing import Sent, arrivals, expected_rows, expected_sums


def check_exchange(local: CudaLocal, sent: dict[int, Sent], reduce: Reduce) -> None:
    done = local.dispatch(sent)
    y = {}
    for rank, handle in done.items():
        x, offsets, weights = expected_rows(sent, rank)
        rows = gathered(handle.indexed)
        assert torch.equal(handle.indexed.offsets.cpu(), offsets)
        assert same_bits(rows, x)
        by_row = handle.indexed.weights[handle.indexed.pairs[: len(rows)].long()]
        assert same_bits(by_row.cpu(), weights)
        y[rank] = apply_experts(rows, offsets)
    for rank, out in local.combine(y, done, reduce).items():
        assert same_bits(out, expected_sums(sent, y, rank, reduce))


@pytest.mark.slow
@pytest.mark.parametrize("reduce", ["rank", "home"])
def test_processes_exchange_what_the_oracle_says(reduce: Reduce) -> None:
    spec = spec_of(4, dtype=torch.float32, max_tokens=5)
    local = CudaLocal(spec, range(4))
    for seed, ids in enumerate([(0,), (0, 1), (3, 1), (0, 1, 2, 3)]):
        local.activate(ids)
        for again in range(2):
            check_exchange(local, random_sent(spec, ids, 10 * seed + again), reduce)


@pytest.mark.parametrize(
    ("capacity", "ids"),
    [
        (1, (0,)),
        (3, (0, 2)),
        (7, (0, 5, 6)),
        pytest.param(32, (3, 17, 31), marks=pytest.mark.slow),
    ],
)
def test_sparse_ids_in_any_capacity(capacity: int, ids: tuple[int, ...]) -> None:
    spec = spec_of(capacity, dtype=torch.float32, max_tokens=3, hidden=12)
    local = CudaLocal(spec, ids)
    local.activate(ids)
    check_exchange(local, random_sent(spec, ids, 3), "rank")
    check_exchange(local, random_sent(spec, ids, 4), "home")


@pytest.mark.parametrize("reduce", ["rank", "home"])
def test_where_there_can_be_no_other_rank(reduce: Reduce) -> None:
    spec = spec_of(1, dtype=torch.float32, max_tokens=4, hidden=12)
    local = CudaLocal(spec, [0])
    local.activate([0])
    alone = local.ranks[0]
    for seed in range(3):
        sent = random_sent(spec, (0,), seed)
        sent[0].expert_ids[0] = -1
        done = alone.dispatch(*parts(sent[0]))
        x, offsets, _ = expected_rows(sent, 0)
        assert same_bits(gathered(done.indexed), x)
        y = apply_experts(x, offsets)
        out = torch.full((done.tokens, spec.hidden), float("nan"), device=DEVICE)
        alone.combine(y.to(DEVICE), done, out, reduce=reduce)
        assert same_bits(out.cpu(), expected_sums(sent, {0: y}, 0, reduce))


@pytest.mark.slow
def test_ranks_without_tokens_and_tokens_without_experts() -> None:
    spec = spec_of(3, dtype=torch.float32, max_tokens=4)
    local = CudaLocal(spec, range(3))
    local.activate(range(3))
    for seed, idle in enumerate([(0,), (1, 2), (0, 1, 2)]):
        check_exchange(local, random_sent(spec, (0, 1, 2), seed, idle=idle), "rank")
    nobody = {
        rank: replace(s, expert_ids=torch.full_like(s.expert_ids, -1))
        for rank, s in random_sent(spec, (0, 1, 2), 5).items()
    }
    check_exchange(local, nobody, "rank")
    check_exchange(local, nobody, "home")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("hidden", [2, 130, 390])
def test_rows_of_any_length_and_pieces_of_any_width(dtype: torch.dtype, hidden: int) -> None:
    spec = spec_of(2, dtype=dtype, max_tokens=2, hidden=hidden)
    tuning = Tuning(width=64, send_width=256, workers=3, reducers=2, chunk=4)
    local = CudaLocal(spec, range(2), tuning=tuning)
    local.activate(range(2))
    check_exchange(local, random_sent(spec, (0, 1), 1), "rank")
    check_exchange(local, random_sent(spec, (0, 1), 2), "home")


@pytest.mark.slow
def test_home_sums_do_not_depend_on_placement_or_number_of_ranks() -> None:
    tokens, experts, k = 6, 5, 3
    spec = spec_of(3, dtype=torch.float32, max_tokens=tokens, hidden=20, topk=k)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(tokens, spec.hidden, generator=generator)
    chosen = torch.randint(-1, experts, (tokens, k), generator=generator)
    weights = torch.rand(tokens, k, generator=generator)
    factor = torch.randn(experts, generator=generator)
    seen = []
    local = CudaLocal(spec, range(3))
    for seed, ids in enumerate([(0,), (0, 1), (2, 0), (0, 1, 2)]):
        local.activate(ids)
        sent = {}
        for rank in ids:
            mine = slice(0, tokens if rank == 0 else 0)  # all tokens at home on rank 0
            table = random_table(ids, experts, seed, rank)
            sent[rank] = Sent(x[mine], chosen[mine], weights[mine], table)
        done = local.dispatch(sent)
        y = {}
        for rank, handle in done.items():
            table = sent[rank].table
            of = {
                (int(table.rank[e]), int(table.slot[e])): float(factor[e]) for e in range(experts)
            }
            scale = [of[p.rank, p.slot] for p in arrivals(sent, rank)]
            y[rank] = gathered(handle.indexed) * torch.tensor(scale).reshape(-1, 1)
        seen.append(local.combine(y, done, "home")[0])
    assert all(same_bits(sums, seen[0]) for sums in seen[1:])


@pytest.mark.parametrize("scales", ["float32", "power2", "ue8m0"])
def test_fp8_values_and_scales_are_those_of_the_reference(scales: Scales) -> None:
    spec = spec_of(2, dtype=torch.float32, max_tokens=3, hidden=1024)
    local = CudaLocal(spec, range(2))
    local.activate(range(2))
    sent = random_sent(spec, (0, 1), 1)
    sent[0].x[0, :130] = torch.tensor([float("inf"), float("nan")]).repeat(65)
    sent[0].x[1] *= torch.logspace(-12, 12, 1024)
    for rank, handle in local.dispatch(sent, scales).items():
        rows, _, _ = expected_rows(sent, rank)
        q, desired = quantise(rows, scales)
        assert handle.indexed.scales is not None
        at = handle.indexed.rows[: len(rows)].long()
        values = handle.indexed.payload.view(torch.uint8)[at].cpu().view(q.dtype).float()
        assert torch.equal(values.nan_to_num(999.0), q.float().nan_to_num(999.0))
        assert torch.equal(handle.indexed.scales[at].cpu(), desired)


def missing(local: CudaLocal, rank: int) -> list[Missing]:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return read_report(local.ranks[rank].page)


def test_a_flag_of_an_earlier_epoch_is_not_taken_for_a_new_one() -> None:
    spec = spec_of(2, dtype=torch.float32)
    local = CudaLocal(spec, range(2))
    local.activate(range(2))
    sent = random_sent(spec, (0, 1), 1)
    local.ranks[1].send_dispatch(*parts(sent[1]), wait=False)  # epoch 1, and nobody waits
    local.activate(range(2))
    done = local.dispatch({0: sent[0]})
    assert missing(local, 0) == [Missing(1, "dispatch")]
    assert int(done[0].indexed.offsets[-1]) == len(arrivals({0: sent[0]}, 0))


def test_who_did_not_come_is_left_out_from_then_on() -> None:
    """As in the rest of a captured graph: nobody rewrites the table, and nobody waits again."""
    spec = spec_of(3, dtype=torch.float32, max_tokens=4)
    local = CudaLocal(spec, range(3))
    local.activate(range(3))
    sent = random_sent(spec, (0, 1, 2), 1)
    two = {rank: sent[rank] for rank in (0, 1)}
    for _ in range(2):
        done = local.dispatch(two)
        y = {rank: gathered(h.indexed) for rank, h in done.items()}
        assert all(torch.isfinite(s).all() for s in local.combine(y, done, "rank").values())
    for rank in (0, 1):
        assert missing(local, rank) == [Missing(2, "dispatch")]
        table = local.ranks[rank].table
        assert table[Word.ACTIVE : Word.ACTIVE + 3].tolist() == [1, 1, 0]
        assert table[Word.SEQUENCE : Word.SEQUENCE + 2].tolist() == [2, 2]


def test_a_slot_that_does_not_exist_is_no_row() -> None:
    spec = spec_of(1, dtype=torch.float32, topk=2)
    local = CudaLocal(spec, [0])
    local.activate([0])
    table = ExpertTable(
        torch.tensor([0, 0], dtype=torch.int32), torch.tensor([0, 9], dtype=torch.int32), 1
    )
    x = torch.randn(2, spec.hidden)
    ids, weights = torch.tensor([[1, 0], [1, -1]]), torch.tensor([[0.5, 0.25], [1.0, 1.0]])
    done = local.dispatch({0: Sent(x, ids, weights, table)})
    assert done[0].indexed.offsets.tolist() == [0, 1]
    out = local.combine({0: x[:1].clone()}, done, "rank")[0]
    assert same_bits(out, torch.stack([x[0] * 0.25, torch.zeros(spec.hidden)]))


def test_counters_are_zero_between_launches() -> None:
    spec = spec_of(2, dtype=torch.float32)
    local = CudaLocal(spec, range(2))
    local.activate(range(2))
    check_exchange(local, random_sent(spec, (0, 1), 1), "rank")
    assert not any(e._counters.any() for e in local.ranks.values())
