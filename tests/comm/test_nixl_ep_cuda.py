"""nixl_ep's interface on a GPU, in Triton's interpreter: what callers on a CPU get, they get too.

Several ranks live in one process and one thread, so each phase of all comes before the next of any:
all send, then all call their hooks. What waits in the middle of a call is tested with one rank
here, and between processes in test_nixl_ep_cuda_processes.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from support.cuda_local import INTERPRETED
from support.nixl_ep_local import (
    Input,
    Ranks,
    Setup,
    apply_experts,
    check_combined,
    check_dispatched,
    make_input,
    routed,
)

from flexpert.comm.cuda.cuda_buffer import CudaBuffer
from flexpert.comm.errors import StaleEpoch
from flexpert.comm.quant import quantise
from flexpert.compat.nixl_ep import Buffer
from flexpert.compat.nixl_ep.device_exchange import VARIABLE

if not INTERPRETED:
    pytest.skip("ranks of one process wait for each other on a GPU", allow_module_level=True)

SMALL = Setup(max_tokens=4, hidden=64)
FP8 = {
    "float32": {"use_fp8": True},
    "power2": {"use_fp8": True, "round_scale": True},
    "ue8m0": {"use_fp8": True, "round_scale": True, "use_ue8m0": True},
}


class Phases(Ranks):
    """Ranks whose exchanges are called phase by phase."""

    def start(self, ids: Iterable[int], *, timeout_ms: int = 60_000) -> None:
        chosen = list(ids)
        for rank in chosen:
            self.add(rank, timeout_ms=timeout_ms)
        self.each(chosen, lambda b: b.connect_ranks(chosen))
        self.agree(chosen)

    def agree(self, ids: Iterable[int]) -> None:
        """Ranks that were unmasked are taken in."""
        self.each(ids, lambda b: b.barrier())

    def dispatch(self, sent: dict[int, Input], **options: Any) -> dict[int, Any]:
        options = {"use_fp8": False, **options}
        got = {
            rank: self.buffers[rank].dispatch(
                mine.x, mine.experts, self.setup.max_tokens, return_recv_hook=True, **options
            )
            for rank, mine in sent.items()
        }
        for *_, hook in got.values():
            hook()
        return got

    def combine(
        self, sent: dict[int, Input], y: dict[int, torch.Tensor], got: dict[int, Any]
    ) -> dict[int, torch.Tensor]:
        outs = {
            rank: self.buffers[rank].combine(
                y[rank], mine.experts, mine.weights, got[rank][2], return_recv_hook=True
            )
            for rank, mine in sent.items()
        }
        for _, _, hook in outs.values():
            assert hook is not None
            hook()
        return {rank: out for rank, (out, _, _) in outs.items()}

    def results(self, got: dict[int, Any]) -> dict[int, torch.Tensor]:
        return {rank: apply_experts(self.setup, rank, g[0]) for rank, g in got.items()}

    def check(self, sent: dict[int, Input]) -> None:
        """One exchange against the oracle."""
        got = self.dispatch(sent)
        for rank, (recv_x, count, handle, _, _) in got.items():
            check_dispatched(self.setup, sent, rank, recv_x, count, handle)
        for rank, out in self.combine(sent, self.results(got), got).items():
            check_combined(self.setup, sent[rank], out, up=set(sent))


@pytest.fixture(autouse=True)
def _on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "cuda")


@pytest.fixture
def ranks() -> Iterator[Phases]:
    with Phases(SMALL) as started:
        yield started


def dispatch(buffer: Buffer, mine: Input, **options: Any) -> Any:
    options = {"use_fp8": False, **options}
    return buffer.dispatch(mine.x, mine.experts, 4, **options)


def masks(buffer: Buffer) -> list[int]:
    status = torch.full((buffer.group_size,), 9, dtype=torch.int32)
    buffer.query_mask_buffer(status)
    return status.tolist()


# ---- what dispatch and combine return -----------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("ids", [(0,), (3,), (0, 2), (1, 2, 3)])
def test_rows_counts_sources_and_sums(ranks: Phases, ids: tuple[int, ...]) -> None:
    ranks.start(ids)
    assert isinstance(ranks.buffers[ids[0]].runtime, CudaBuffer)
    for seed in (1, 2, 18):
        ranks.check(ranks.inputs(ids, seed))


@pytest.mark.slow
def test_ranks_without_tokens_and_tokens_without_experts(ranks: Phases) -> None:
    ranks.start([0, 1])
    sent = ranks.inputs([0, 1], 18)
    idle = replace(
        sent[0], x=sent[0].x[:0], experts=sent[0].experts[:0], weights=sent[0].weights[:0]
    )
    nowhere = replace(sent[1], experts=torch.full_like(sent[1].experts, -1))
    ranks.check({0: idle, 1: sent[1]})
    ranks.check({0: sent[0], 1: nowhere})
    ranks.check({0: idle, 1: nowhere})
    ranks.check({0: replace(sent[0], experts=sent[0].experts.int()), 1: sent[1]})


@pytest.mark.slow
def test_num_experts_decides_how_many_ranks_the_tensors_are_for(ranks: Phases) -> None:
    ranks.start([0, 1])
    sent = ranks.inputs([0, 1], 1)
    for given, limit in ((None, 2), (9, 3), (12, 4)):
        got = ranks.dispatch(sent, num_experts=given)
        for rank, (recv_x, count, handle, _, _) in got.items():
            assert recv_x.shape == (3, limit * 4, 64)
            check_dispatched(ranks.setup, sent, rank, recv_x, count, handle)
        ranks.combine(sent, ranks.results(got), got)


@pytest.mark.parametrize("kind", ["float32", "power2", "ue8m0"])
def test_fp8_rows_and_their_column_major_scales(kind: str) -> None:
    with Phases(Setup(max_tokens=4, hidden=1024)) as ranks:
        ranks.start([0, 1])
        sent = ranks.inputs([0, 1], 18)
        got = ranks.dispatch(sent, **FP8[kind])
        seen = 0
        for rank, ((values, scales), _, _, _, _) in got.items():
            columns = 2 if kind == "ue8m0" else 8
            assert values.dtype is torch.float8_e4m3fn
            assert values.shape == (3, 2 * 4, 1024)
            assert scales.dtype is (torch.int32 if kind == "ue8m0" else torch.float32)
            assert scales.shape == (3, 8, columns)
            assert scales.stride() == (8 * columns, 1, 8)
            for expert, rows in enumerate(routed(ranks.setup, sent, rank)):
                for row, (source, token) in enumerate(rows):
                    q, desired = quantise(sent[source].x[token : token + 1], cast(Any, kind))
                    assert torch.equal(scales[expert, row], desired[0])
                    assert torch.equal(
                        values[expert, row].view(torch.uint8), q[0].view(torch.uint8)
                    )
                    seen += 1
        assert seen > 4


def test_narrower_rows_than_the_hint_was_for() -> None:
    with Phases(Setup(max_tokens=4, hidden=256)) as ranks:
        ranks.start([0, 1])
        ranks.setup = replace(ranks.setup, hidden=128)
        sent = ranks.inputs([0, 1], 9)
        ranks.check(sent)
        (values, scales), _, _, _, _ = ranks.dispatch(sent, use_fp8=True)[0]
        assert values.shape == (3, 8, 128)
        assert scales.shape == (3, 8, 1)


def test_what_dispatch_returned_is_valid_until_the_dispatch_after_the_next(ranks: Phases) -> None:
    ranks.start([1])
    sent = {seed: ranks.inputs([1], seed) for seed in (1, 18)}
    got = {seed: ranks.dispatch(sent[seed])[1] for seed in (1, 18)}
    for seed, (recv_x, count, handle, _, _) in got.items():
        check_dispatched(ranks.setup, sent[seed], 1, recv_x, count, handle)


# ---- in any order -------------------------------------------------------------------------------


def test_dispatches_alone_and_handles_combined_again_and_out_of_order(ranks: Phases) -> None:
    ranks.start([0])
    buffer = ranks.buffers[0]
    mine = {seed: ranks.inputs([0], seed)[0] for seed in (1, 27, 18)}
    kept = {}
    for seed, sent in mine.items():
        kept[seed] = dispatch(buffer, sent)
    for seed in (18, 27, 27, 18):
        recv_x, _, handle, _, _ = kept[seed]
        y = apply_experts(ranks.setup, 0, recv_x)
        out, _, _ = buffer.combine(y, mine[seed].experts, mine[seed].weights, handle)
        check_combined(ranks.setup, mine[seed], out, up={0})
    with pytest.raises(StaleEpoch, match="last 2 dispatches"):
        buffer.combine(kept[1][0], mine[1].experts, mine[1].weights, kept[1][2])


def test_hooks_and_events_receive_and_an_outstanding_one_is_called_by_what_comes_next(
    ranks: Phases,
) -> None:
    ranks.start([0])
    buffer, sent = ranks.buffers[0], ranks.inputs([0], 18)
    mine = sent[0]
    x, experts = mine.x.clone(), mine.experts.clone()
    recv_x, count, handle, _, hook = buffer.dispatch(
        x, experts, 4, use_fp8=False, return_recv_hook=True
    )
    x.zero_()
    experts.fill_(-1)
    _, _, _, event, none = dispatch(buffer, mine, async_finish=True)
    assert none is None
    check_dispatched(ranks.setup, sent, 0, recv_x, count, handle)
    event.current_stream_wait()
    assert hook is not None
    hook()
    y = apply_experts(ranks.setup, 0, recv_x)
    out, event, _ = buffer.combine(y, mine.experts, mine.weights, handle, async_finish=True)
    with event:
        pass
    check_combined(ranks.setup, mine, out, up={0})


def test_results_may_be_overwritten_while_the_hook_of_a_combine_is_outstanding(
    ranks: Phases,
) -> None:
    ranks.start([0, 1])
    sent = ranks.inputs([0, 1], 18)
    got = ranks.dispatch(sent)
    y = ranks.results(got)
    outs = {
        rank: ranks.buffers[rank].combine(
            y[rank], mine.experts, mine.weights, got[rank][2], return_recv_hook=True
        )
        for rank, mine in sent.items()
    }
    for rows in y.values():
        rows.fill_(float("nan"))
    for rank, (out, _, hook) in outs.items():
        assert hook is not None
        hook()
        check_combined(ranks.setup, sent[rank], out, up={0, 1})


def test_zero_copy_strided_out_and_rows_that_do_not_count(ranks: Phases) -> None:
    ranks.start([0])
    buffer, sent = ranks.buffers[0], ranks.inputs([0], 35)
    mine = sent[0]
    recv_x, count, handle, _, _ = dispatch(buffer, mine)
    with pytest.raises(ValueError, match="get_next_combine_buffer"):
        buffer.combine(recv_x, mine.experts, mine.weights, handle, zero_copy=True)
    staged = buffer.get_next_combine_buffer(handle)
    staged[:] = apply_experts(ranks.setup, 0, recv_x)
    for expert, rows in enumerate(count.tolist()):
        staged[expert, rows:] = float("nan")
    into = torch.empty(mine.x.shape[0], 2 * 64).bfloat16()[:, ::2]
    garbage = torch.full_like(recv_x, float("nan"))
    out, _, _ = buffer.combine(
        garbage, mine.experts, mine.weights, handle, zero_copy=True, out=into
    )
    assert out is into
    check_combined(ranks.setup, mine, out, up={0})


def test_experts_may_be_turned_off_between_dispatch_and_combine(ranks: Phases) -> None:
    ranks.start([0, 1])
    sent = ranks.inputs([0, 1], 24)
    got = ranks.dispatch(sent)
    fewer = {
        rank: replace(mine, experts=mine.experts.masked_fill(mine.experts % 3 == 1, -1))
        for rank, mine in sent.items()
    }
    for rank, out in ranks.combine(fewer, ranks.results(got), got).items():
        check_combined(ranks.setup, fewer[rank], out, up={0, 1})


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize(("hidden", "k"), [(3584, 11), (64, 22)])
def test_shapes_of_models_that_have_more_choices_or_another_width(
    hidden: int, k: int, split: bool
) -> None:
    with Phases(Setup(capacity=1, max_tokens=4, hidden=hidden, experts_per_rank=24)) as ranks:
        buffer = ranks.add(0)
        sent = {0: make_input(ranks.setup, 0, 18, k=k)}
        mine = replace(sent[0], experts=sent[0].experts.int())
        for _ in range(2):
            recv_x, count, handle, _, hook = dispatch(buffer, mine, return_recv_hook=split)
            if hook is not None:
                hook()
            check_dispatched(ranks.setup, sent, 0, recv_x, count, handle)
            y = apply_experts(ranks.setup, 0, recv_x)
            out, _, hook = buffer.combine(
                y, mine.experts, mine.weights, handle, return_recv_hook=split
            )
            if hook is not None:
                hook()
            check_combined(ranks.setup, mine, out, up={0})
            dispatch(buffer, mine)  # and never combined


# ---- ranks that come and go ---------------------------------------------------------------------


@pytest.mark.slow
def test_a_masked_rank_is_left_out_and_taken_in_again(ranks: Phases) -> None:
    ranks.start([0, 1, 2])
    ranks.check(ranks.inputs([0, 1, 2], 1))
    for rank, peers in ((0, [2]), (1, [2]), (2, [0, 1])):
        for peer in peers:
            ranks.buffers[rank].update_mask_buffer(peer, mask=True)
    assert masks(ranks.buffers[0]) == [0, 0, 1, 1]
    assert masks(ranks.buffers[2]) == [1, 1, 0, 1]
    sent = ranks.inputs([0, 1], 18)
    ranks.check(sent)
    for buffer in ranks.buffers.values():
        buffer.clean_mask_buffer()
    ranks.agree([0, 1, 2])
    ranks.check(ranks.inputs([0, 1, 2], 35))


@pytest.mark.parametrize("phase", ["dispatch", "combine"])
def test_who_sends_nothing_is_masked_and_its_experts_are_left_out(
    ranks: Phases, phase: str
) -> None:
    ranks.start([0, 1])
    ranks.check(ranks.inputs([0, 1], 18))
    sent = ranks.inputs([0, 1], 35)
    up = {0} if phase == "dispatch" else {0, 1}
    got = ranks.dispatch({rank: sent[rank] for rank in up})
    if phase == "dispatch":
        assert masks(ranks.buffers[0]) == [0, 1, 1, 1]
    recv_x, count, handle, _, _ = got[0]
    check_dispatched(ranks.setup, {r: sent[r] for r in up}, 0, recv_x, count, handle)
    out = ranks.combine({0: sent[0]}, ranks.results(got), got)[0]
    check_combined(ranks.setup, sent[0], out, up={0})
    assert masks(ranks.buffers[0]) == [0, 1, 1, 1]
    ranks.check({0: make_input(ranks.setup, 0, 33)})


# ---- statistics, wrong calls --------------------------------------------------------------------


def test_received_rows_and_waits_are_added_up(ranks: Phases) -> None:
    ranks.start([0, 1])
    sent = ranks.inputs([0, 1], 11)
    stats = torch.full((3,), 5, dtype=torch.int32)
    buffer, mine = ranks.buffers[0], sent[0]
    with pytest.raises(ValueError, match=r"wait_recv_cost_stats must be \[2\] torch.int64"):
        dispatch(buffer, mine, dispatch_wait_recv_cost_stats=torch.zeros(3, dtype=torch.int64))
    hooks = []
    for rank, statistics in ((0, stats), (1, None)):
        _, count, _, _, hook = dispatch(
            ranks.buffers[rank],
            sent[rank],
            return_recv_hook=True,
            cumulative_local_expert_recv_stats=statistics,
        )
        hooks.append((hook, count))
    for hook, _ in hooks:
        assert hook is not None
        hook()
    assert stats.tolist() == [5 + rows for rows in hooks[0][1].tolist()]
    assert int(hooks[0][1].sum()) > 0


def test_how_long_each_rank_was_waited_for(ranks: Phases) -> None:
    ranks.start([0, 1])
    sent = ranks.inputs([0, 1], 18)
    waits = torch.full((2,), 7, dtype=torch.int64)
    got = ranks.dispatch({0: sent[0]}, dispatch_wait_recv_cost_stats=waits)
    assert waits[0] == 7
    assert waits[1] > 7  # rank 1 never came
    back = torch.zeros(2, dtype=torch.int64)
    mine = sent[0]
    ranks.buffers[0].combine(
        got[0][0], mine.experts, mine.weights, got[0][2], combine_wait_recv_cost_stats=back
    )
    assert back.tolist() == [0, 0]  # and is not waited for again


def test_rows_without_room_are_left_out_of_tensors_and_sums(ranks: Phases) -> None:
    """A token may not choose an expert twice; if it does, nothing is written beyond the tensors."""
    ranks.start([0])
    buffer = ranks.buffers[0]
    x = torch.randn(2, 64).bfloat16()
    experts = torch.tensor([[1, 1, 1], [1, 2, -1]])
    weights = torch.tensor([[0.5, 0.25, 1.0], [1.0, 0.5, 9.0]])
    recv_x, count, handle, _, _ = buffer.dispatch(x, experts, 2, use_fp8=False)
    assert recv_x.shape == (3, 2, 64)
    assert count.tolist() == [0, 2, 1]
    assert handle[1].flatten().tolist() == [0, 2, 1]
    y = torch.full_like(recv_x, float("nan"))
    y[1], y[2, 0] = x[0], x[1]
    out, _, _ = buffer.combine(y, experts, weights, handle)
    torch.testing.assert_close(out, torch.stack([x[0] * 0.75, x[1] * 0.5]), rtol=2**-7, atol=0)


def test_a_peer_s_row_without_room_counts_as_zero_not_as_what_lay_there(ranks: Phases) -> None:
    ranks.start([0, 1])
    x, idle = torch.randn(1, 64).bfloat16(), torch.zeros(0, 64).bfloat16()
    weights = torch.tensor([[0.5, 0.25, 1.0]])
    none = torch.zeros(0, 3, dtype=torch.int64), torch.zeros(0, 3)
    for experts, total in (([[3, 4, 5]], 1.75), ([[4, 4, 4]], 0.75)):
        sent = {0: Input(x, torch.tensor(experts), weights), 1: Input(idle, *none)}
        hooks = {r: dispatch_of_one(ranks.buffers[r], mine) for r, mine in sent.items()}
        for *_, hook in hooks.values():
            hook()
        y = {rank: got[0] for rank, got in hooks.items()}
        out = ranks.combine(sent, y, hooks)[0]
        torch.testing.assert_close(out, x * total, rtol=2**-7, atol=0)


def dispatch_of_one(buffer: Buffer, mine: Input) -> Any:
    """With room for two rows an expert."""
    return buffer.dispatch(mine.x, mine.experts, 1, use_fp8=False, return_recv_hook=True)


def test_wrong_arguments_say_what_to_do_and_send_nothing(ranks: Phases) -> None:
    ranks.start([0])
    buffer = ranks.buffers[0]
    x, experts = torch.zeros(2, 64).bfloat16(), torch.zeros(2, 2, dtype=torch.int64)
    wide = torch.zeros(2, 128).bfloat16()
    calls: list[tuple[Callable[[], object], str]] = [
        (lambda: buffer.dispatch(wide, experts, 4, use_fp8=False), r"get_rdma_size_hint\(4, 128"),
        (lambda: buffer.dispatch(x, experts, 1, use_fp8=False), "2 tokens"),
        (lambda: buffer.dispatch(x.float(), experts, 4), "bfloat16"),
        (lambda: buffer.dispatch(x, experts, 4), "multiple of 128"),
        (lambda: buffer.dispatch(x, experts[:1], 4, use_fp8=False), r"topk_idx must be \[2, k\]"),
        (lambda: buffer.dispatch(x, experts.float(), 4, use_fp8=False), "expert_ids must be int"),
        (
            lambda: buffer.dispatch(
                torch.zeros(4, 64).bfloat16(), torch.zeros(4, 33).long(), 4, use_fp8=False
            ),
            "k <= 32",
        ),
        (lambda: buffer.dispatch(x.to("meta"), experts, 4, use_fp8=False), f"meta.*{VARIABLE}"),
    ]
    for call, what in calls:
        with pytest.raises(ValueError, match=what):
            call()
    sent = ranks.inputs([0], 1)
    ranks.check(sent)
    recv_x, _, handle, _, _ = buffer.dispatch(x, experts, 4, use_fp8=False)
    weights = torch.zeros(2, 2)
    for combine, what in (
        ((recv_x[:, 1:], experts, weights, handle), "x must be"),
        ((recv_x, experts, weights.double(), handle), "topk_weights must be"),
        ((recv_x, experts[:, :1], weights, handle), "topk_idx must be"),
    ):
        with pytest.raises(ValueError, match=what):
            buffer.combine(*combine)
    buffer.combine(recv_x, experts, weights, handle)
    with pytest.raises(ValueError, match="start with the largest capacity"):
        buffer.update_memory_buffers(6, 3, replace(SMALL, capacity=6).hint())


def test_an_unknown_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "gpu")
    with pytest.raises(ValueError, match="must be 'cpu' or 'cuda'"):
        Phases(SMALL).add(0)
