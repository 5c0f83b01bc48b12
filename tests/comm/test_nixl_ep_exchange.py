"""Code written for nixl_ep gets the tensors that its contract describes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.nixl_ep_local import (
    Input,
    Ranks,
    Setup,
    apply_experts,
    check_combined,
    check_dispatched,
    routed,
)

from flexpert.comm.errors import StaleEpoch
from flexpert.compat.nixl_ep import Buffer, EventOverlap


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    with Ranks() as started:
        yield started


def dispatch(buffer: Buffer, mine: Input, **options: Any) -> Any:
    options = {"use_fp8": False, **options}
    return buffer.dispatch(mine.x, mine.experts, Setup.max_tokens, **options)


# ---- what dispatch returns ----------------------------------------------------------------------


@pytest.mark.parametrize("ids", [(0,), (3,), (0, 1), (0, 2), (1, 2, 3), (0, 1, 2, 3)])
def test_rows_counts_sources_and_sums(ranks: Ranks, ids: tuple[int, ...]) -> None:
    ranks.start(ids)
    for seed in range(1, 6):
        ranks.exchange(ids, seed)


def test_num_experts_decides_how_many_ranks_the_tensors_are_for(ranks: Ranks) -> None:
    ranks.start([0, 1])
    sent = ranks.inputs([0, 1], 1)
    for given, limit in ((None, 2), (6, 2), (9, 3), (12, 4)):
        got = ranks.each([0, 1], lambda b, n=given: dispatch(b, sent[b.rank], num_experts=n))
        for rank, (recv_x, count, handle, _, _) in got.items():
            assert recv_x.shape == (3, limit * 8, 512)
            check_dispatched(ranks.setup, sent, rank, recv_x, count, handle)
    for wrong in (3, 7, 15):
        with pytest.raises(ValueError, match=f"num_experts is {wrong}"):
            dispatch(ranks.buffers[0], sent[0], num_experts=wrong)


@pytest.mark.parametrize("kind", ["float32", "power2", "ue8m0"])
def test_fp8_rows_and_their_column_major_scales(ranks: Ranks, kind: str) -> None:
    ranks.start([0, 1])
    sent = ranks.inputs([0, 1], 14)
    options = {"use_fp8": True, "round_scale": kind != "float32", "use_ue8m0": kind == "ue8m0"}
    got = ranks.each(sent, lambda b: dispatch(b, sent[b.rank], **options))
    seen = 0
    for rank, ((values, scales), _, _, _, _) in got.items():
        limit, columns = values.shape[1], 1 if kind == "ue8m0" else 4
        assert values.dtype is torch.float8_e4m3fn
        assert values.shape == (3, 2 * 8, 512)
        assert scales.dtype is (torch.int32 if kind == "ue8m0" else torch.float32)
        assert scales.shape == (3, limit, columns)
        assert scales.stride() == (limit * columns, 1, limit)
        for expert, rows in enumerate(routed(ranks.setup, sent, rank)):
            for row, (source, token) in enumerate(rows):
                blocks = sent[source].x[token].float().view(4, 128)
                scale = blocks.abs().amax(1).clamp(min=1e-4) / 448
                if kind != "float32":
                    scale = torch.exp2(torch.ceil(torch.log2(scale)))
                told = scales[expert, row]
                if kind == "ue8m0":
                    bits = [int(told[0]) >> 8 * block & 0xFF for block in range(4)]
                    told = torch.exp2(torch.tensor(bits).float() - 127)
                torch.testing.assert_close(
                    told, scale, rtol=0 if kind != "float32" else 1e-6, atol=0
                )
                back = values[expert, row].float().view(4, 128) * scale[:, None]
                # e4m3 keeps 3 bits after the leading one, and is linear below 2**-6
                bound = torch.maximum(blocks.abs() * 2**-4, scale[:, None] * 2**-10)
                assert bool(((back - blocks).abs() <= bound * 1.001).all())
                seen += 1
    assert seen > 8


def test_fp8_rows_can_be_combined(ranks: Ranks) -> None:
    ranks.start([0, 1])
    sent = ranks.inputs([0, 1], 5)

    def run(buffer: Buffer) -> None:
        mine = sent[buffer.rank]
        (values, scales), _, handle, _, _ = dispatch(buffer, mine, use_fp8=True)
        blocks = values.float().view(*values.shape[:2], 4, 128)
        x = (blocks * scales.unsqueeze(3)).view(values.shape).bfloat16()
        y = apply_experts(ranks.setup, buffer.rank, x)
        out, _, _ = buffer.combine(y, mine.experts, mine.weights, handle)
        check_combined(ranks.setup, mine, out, up={0, 1}, error=2**-4)

    ranks.each(sent, run)


def test_narrower_rows_than_the_hint_was_for(ranks: Ranks) -> None:
    ranks.start([0, 1])
    narrow = replace(ranks.setup, hidden=256)
    sent = {
        rank: replace(mine, x=mine.x[:, :256].contiguous())
        for rank, mine in ranks.inputs([0, 1], 9).items()
    }

    def run(buffer: Buffer) -> None:
        mine = sent[buffer.rank]
        recv_x, count, handle, _, _ = dispatch(buffer, mine)
        check_dispatched(narrow, sent, buffer.rank, recv_x, count, handle)
        out, _, _ = buffer.combine(
            apply_experts(narrow, buffer.rank, recv_x), mine.experts, mine.weights, handle
        )
        check_combined(narrow, mine, out, up={0, 1})
        (values, scales), _, handle, _, _ = dispatch(buffer, mine, use_fp8=True)
        assert values.shape[2] == 256
        assert scales.shape[2] == 2
        buffer.combine(recv_x, mine.experts, mine.weights, handle)

    ranks.each(sent, run)


def test_what_dispatch_returned_is_valid_until_the_dispatch_after_the_next(ranks: Ranks) -> None:
    ranks.start([0, 1])
    sent = {seed: ranks.inputs([0, 1], seed) for seed in (1, 14)}

    def run(buffer: Buffer) -> None:
        got = [dispatch(buffer, sent[seed][buffer.rank]) for seed in (1, 14)]
        for seed, (recv_x, count, handle, _, _) in zip((1, 14), got, strict=True):
            check_dispatched(ranks.setup, sent[seed], buffer.rank, recv_x, count, handle)

    ranks.each([0, 1], run)


# ---- hooks and events ---------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["hook", "event", "with"])
def test_nothing_is_waited_for_until_the_hook_or_the_event(ranks: Ranks, way: str) -> None:
    ranks.start([0, 1])
    sent = ranks.inputs([0, 1], 15)
    later = {"return_recv_hook": True} if way == "hook" else {"async_finish": True}

    def finish(event: EventOverlap, hook: Any) -> None:
        if way == "hook":
            hook()
            hook()
        elif way == "event":
            assert hook is None
            event.current_stream_wait()
        else:
            with event:
                pass

    # one thread for both ranks: a call that waited for the other would never return
    got = {rank: dispatch(ranks.buffers[rank], sent[rank], **later) for rank in (0, 1)}
    for _, _, _, event, hook in got.values():
        finish(event, hook)
    sums = {}
    for rank, (recv_x, count, handle, _, _) in got.items():
        check_dispatched(ranks.setup, sent, rank, recv_x, count, handle)
        y = apply_experts(ranks.setup, rank, recv_x)
        mine = sent[rank]
        sums[rank] = ranks.buffers[rank].combine(y, mine.experts, mine.weights, handle, **later)
    for _, event, hook in sums.values():
        finish(event, hook)
    for rank, (out, _, _) in sums.items():
        check_combined(ranks.setup, sent[rank], out, up={0, 1})


def test_arguments_may_be_overwritten_while_a_hook_is_outstanding(ranks: Ranks) -> None:
    ranks.start([0, 1])
    sent = ranks.inputs([0, 1], 3)
    got = {}
    for rank, mine in sent.items():
        x, experts = mine.x.clone(), mine.experts.clone()
        got[rank] = ranks.buffers[rank].dispatch(
            x, experts, 8, use_fp8=False, return_recv_hook=True
        )
        x.zero_()
        experts.fill_(-1)
    for rank, (recv_x, count, handle, _, hook) in got.items():
        hook()
        check_dispatched(ranks.setup, sent, rank, recv_x, count, handle)

    def combine(buffer: Buffer) -> None:
        recv_x, _, handle, _, _ = got[buffer.rank]
        mine, y = sent[buffer.rank], apply_experts(ranks.setup, buffer.rank, recv_x)
        out, _, _ = buffer.combine(y, mine.experts, mine.weights, handle)
        check_combined(ranks.setup, mine, out, up={0, 1})

    ranks.each([0, 1], combine)


def test_a_hook_that_was_not_called_is_called_by_what_comes_next(ranks: Ranks) -> None:
    ranks.start([0, 1])
    sent = {seed: ranks.inputs([0, 1], seed) for seed in (1, 14)}

    def run(buffer: Buffer) -> None:
        first = dispatch(buffer, sent[1][buffer.rank], return_recv_hook=True)
        second = dispatch(buffer, sent[14][buffer.rank], return_recv_hook=True)
        mine = sent[14][buffer.rank]
        y = torch.zeros_like(second[0])
        buffer.combine(y, mine.experts, mine.weights, second[2], return_recv_hook=True)
        for seed, (recv_x, count, handle, _, _) in ((1, first), (14, second)):
            check_dispatched(ranks.setup, sent[seed], buffer.rank, recv_x, count, handle)
        buffer.barrier()
        first[4]()

    ranks.each([0, 1], run)


def test_hook_and_event_exclude_each_other(ranks: Ranks) -> None:
    ranks.start([0])
    mine = ranks.inputs([0], 1)[0]
    with pytest.raises(ValueError, match="exclude each other"):
        dispatch(ranks.buffers[0], mine, async_finish=True, return_recv_hook=True)
    _, _, handle, event, hook = dispatch(ranks.buffers[0], mine)
    assert hook is None
    event.current_stream_wait()
    with pytest.raises(ValueError, match="exclude each other"):
        ranks.buffers[0].combine(
            torch.zeros(3, 8, 512).bfloat16(),
            mine.experts,
            mine.weights,
            handle,
            async_finish=True,
            return_recv_hook=True,
        )


# ---- dispatches and combines in any order -------------------------------------------------------


def test_two_micro_batches_overlap(ranks: Ranks) -> None:
    ranks.start([0, 1, 2])
    sent = [ranks.inputs([0, 1, 2], seed) for seed in (1, 14)]

    def run(buffer: Buffer) -> None:
        rank = buffer.rank
        for _ in range(3):
            got = [dispatch(buffer, batch[rank], return_recv_hook=True) for batch in sent]
            outs = []
            for batch, (recv_x, count, handle, _, hook) in zip(sent, got, strict=True):
                hook()
                check_dispatched(ranks.setup, batch, rank, recv_x, count, handle)
                y = apply_experts(ranks.setup, rank, recv_x)
                mine = batch[rank]
                outs.append(
                    buffer.combine(y, mine.experts, mine.weights, handle, return_recv_hook=True)
                )
            for batch, (out, _, hook) in zip(sent, outs, strict=True):
                hook()
                check_combined(ranks.setup, batch[rank], out, up={0, 1, 2})

    ranks.each([0, 1, 2], run)


def test_dispatches_alone_and_a_handle_combined_again_and_again(ranks: Ranks) -> None:
    ranks.start([0, 2])
    sent = ranks.inputs([0, 2], 7)

    def run(buffer: Buffer) -> None:
        mine = sent[buffer.rank]
        for _ in range(3):
            recv_x, _, handle, _, _ = dispatch(buffer, mine)
        buffer.barrier()
        y = apply_experts(ranks.setup, buffer.rank, recv_x)
        for _ in range(3):
            out, _, _ = buffer.combine(y, mine.experts, mine.weights, handle)
            check_combined(ranks.setup, mine, out, up={0, 2})

    ranks.each([0, 2], run)


def test_a_handle_of_three_dispatches_ago_is_refused(ranks: Ranks) -> None:
    ranks.start([0])
    buffer, mine = ranks.buffers[0], ranks.inputs([0], 1)[0]
    recv_x, _, handle, _, _ = dispatch(buffer, mine)
    dispatch(buffer, mine)
    buffer.combine(recv_x, mine.experts, mine.weights, handle)
    dispatch(buffer, mine)
    with pytest.raises(StaleEpoch, match="last 2 dispatches"):
        buffer.combine(recv_x, mine.experts, mine.weights, handle)
    with pytest.raises(StaleEpoch, match="last 2 dispatches"):
        buffer.get_next_combine_buffer(handle)


def test_memory_taken_in_inference_mode_serves_outside_of_it(ranks: Ranks) -> None:
    ranks.add(0)

    def run(seed: int) -> None:
        mine = ranks.inputs([0], seed)[0]
        recv_x, count, handle, _, _ = dispatch(ranks.buffers[0], mine)
        check_dispatched(ranks.setup, {0: mine}, 0, recv_x, count, handle)
        staged = ranks.buffers[0].get_next_combine_buffer(handle)
        staged[:] = apply_experts(ranks.setup, 0, recv_x)
        out, _, _ = ranks.buffers[0].combine(
            staged, mine.experts, mine.weights, handle, zero_copy=True
        )
        check_combined(ranks.setup, mine, out, up={0})

    with torch.inference_mode():
        run(1)
        run(14)
    run(1)
    run(14)


# ---- combine ------------------------------------------------------------------------------------


def test_zero_copy_takes_the_rows_from_the_next_combine_buffer(ranks: Ranks) -> None:
    ranks.start([0, 1])
    sent = ranks.inputs([0, 1], 16)

    def run(buffer: Buffer) -> None:
        mine = sent[buffer.rank]
        recv_x, _, handle, _, _ = dispatch(buffer, mine)
        with pytest.raises(ValueError, match="get_next_combine_buffer"):
            buffer.combine(recv_x, mine.experts, mine.weights, handle, zero_copy=True)
        staged = buffer.get_next_combine_buffer(handle)
        assert staged.shape == recv_x.shape
        assert staged.dtype is torch.bfloat16
        staged[:] = apply_experts(ranks.setup, buffer.rank, recv_x)
        garbage = torch.full_like(recv_x, float("nan"))
        into = torch.empty_like(mine.x)
        out, _, _ = buffer.combine(
            garbage, mine.experts, mine.weights, handle, zero_copy=True, out=into
        )
        assert out is into
        check_combined(ranks.setup, mine, out, up={0, 1})

    ranks.each(sent, run)


def test_what_lies_beyond_the_counted_rows_does_not_matter(ranks: Ranks) -> None:
    ranks.start([0, 1])
    sent = ranks.inputs([0, 1], 9)

    def run(buffer: Buffer) -> None:
        mine = sent[buffer.rank]
        recv_x, count, handle, _, _ = dispatch(buffer, mine)
        y = apply_experts(ranks.setup, buffer.rank, recv_x)
        for expert, rows in enumerate(count.tolist()):
            y[expert, rows:] = float("nan")
        strided = torch.empty(mine.x.shape[0], 2 * 512).bfloat16()[:, ::2]
        out, _, _ = buffer.combine(
            y, mine.experts, mine.weights, handle, use_logfmt=True, out=strided
        )
        check_combined(ranks.setup, mine, out, up={0, 1})

    ranks.each(sent, run)


def test_experts_may_be_turned_off_between_dispatch_and_combine(ranks: Ranks) -> None:
    ranks.start([0, 1])
    sent = ranks.inputs([0, 1], 10)

    def run(buffer: Buffer) -> None:
        mine = sent[buffer.rank]
        recv_x, _, handle, _, _ = dispatch(buffer, mine)
        y = apply_experts(ranks.setup, buffer.rank, recv_x)
        fewer = replace(mine, experts=mine.experts.masked_fill(mine.experts % 3 == 1, -1))
        out, _, _ = buffer.combine(y, fewer.experts, fewer.weights, handle)
        check_combined(ranks.setup, fewer, out, up={0, 1})
        with pytest.raises(ValueError, match="other experts than in dispatch"):
            buffer.combine(y, mine.experts + 1, mine.weights, handle)

    ranks.each(sent, run)


# ---- statistics ---------------------------------------------------------------------------------


def test_statistics_are_added_to(ranks: Ranks) -> None:
    ranks.start([0, 2])
    sent = ranks.inputs([0, 2], 11)

    def run(buffer: Buffer) -> None:
        mine = sent[buffer.rank]
        received = torch.full((3,), 5, dtype=torch.int32)
        there, back = (torch.full((3,), 7, dtype=torch.int64) for _ in range(2))
        for _ in range(2):
            recv_x, count, handle, _, _ = dispatch(
                buffer,
                mine,
                cumulative_local_expert_recv_stats=received,
                dispatch_wait_recv_cost_stats=there,
            )
            buffer.combine(
                recv_x, mine.experts, mine.weights, handle, combine_wait_recv_cost_stats=back
            )
        assert received.tolist() == [5 + 2 * rows for rows in count.tolist()]
        peer = 2 - buffer.rank
        for waited in (there, back):
            assert waited[1] == 7
            assert waited[peer] > 7

    ranks.each(sent, run)


# ---- wrong calls --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hidden", "k", "dtype"), [(3584, 11, torch.int32), (512, 22, torch.int64)]
)
def test_shapes_of_models_that_have_more_choices_or_another_width(
    hidden: int, k: int, dtype: torch.dtype
) -> None:
    setup = Setup(capacity=2, max_tokens=8, hidden=hidden, experts_per_rank=16)
    with Ranks(setup) as ranks:
        ranks.start([0, 1])
        sent = {
            rank: replace(mine, experts=mine.experts.to(dtype))
            for rank, mine in ranks.inputs([0, 1], 18, k=k).items()
        }

        def run(buffer: Buffer) -> None:
            mine = sent[buffer.rank]
            recv_x, count, handle, _, _ = buffer.dispatch(mine.x, mine.experts, 8, use_fp8=False)
            check_dispatched(setup, sent, buffer.rank, recv_x, count, handle)
            y = apply_experts(setup, buffer.rank, recv_x)
            assert buffer.get_next_combine_buffer(handle).shape == recv_x.shape
            other = torch.int32 if dtype is torch.int64 else torch.int64
            out, _, _ = buffer.combine(y, mine.experts.to(other), mine.weights, handle)
            check_combined(setup, mine, out, up={0, 1})

        ranks.each([0, 1], run)


def test_a_handle_from_before_a_growth_is_refused(ranks: Ranks) -> None:
    """It has no room for the new rank's rows; one that was made for the capacity has."""
    ranks.start([0])
    buffer, mine = ranks.buffers[0], ranks.inputs([0], 1)[0]
    recv_x, _, old, _, _ = buffer.dispatch(mine.x, mine.experts, 8, use_fp8=False)
    _, _, roomy, _, _ = buffer.dispatch(mine.x, mine.experts, 8, num_experts=12, use_fp8=False)
    ranks.add(1)
    ranks.each([0, 1], lambda b: b.connect_ranks([0, 1], activate=False))
    y = apply_experts(ranks.setup, 0, recv_x)
    buffer.combine(y, mine.experts, mine.weights, old)
    buffer.update_mask_buffer(1)
    with pytest.raises(ValueError, match="for 1 ranks, but rank 1 was unmasked since: dispatch"):
        buffer.combine(y, mine.experts, mine.weights, old)
    assert buffer.get_next_combine_buffer(roomy).shape == (3, 4 * 8, 512)
    buffer.update_mask_buffer(1, True)
    buffer.combine(y, mine.experts, mine.weights, old)


def test_wrong_arguments_say_what_to_do_and_send_nothing(ranks: Ranks) -> None:
    ranks.start([0, 1])
    buffer = ranks.buffers[0]
    x, experts = torch.zeros(2, 512).bfloat16(), torch.zeros(2, 2, dtype=torch.int64)
    wide = torch.zeros(2, 1024).bfloat16()
    for call, what in (
        (lambda: buffer.dispatch(wide, experts, 8, use_fp8=False), r"get_rdma_size_hint\(8, 1024"),
        (lambda: buffer.dispatch(x, experts, 16, use_fp8=False), r"get_rdma_size_hint\(16, 512"),
        (lambda: buffer.dispatch(x, experts, 1, use_fp8=False), "2 tokens"),
        (lambda: buffer.dispatch(x.float(), experts, 8), "bfloat16"),
        (lambda: buffer.dispatch(x[:, :136], experts, 8), "multiple of 128"),
        (lambda: buffer.dispatch(x[:, :128], experts, 8, round_scale=True, use_ue8m0=True), "512"),
        (lambda: buffer.dispatch(x, experts, 8, use_ue8m0=True), "needs round_scale"),
        (lambda: buffer.dispatch(x, experts[:1], 8), r"topk_idx must be \[2, k\]"),
        (lambda: buffer.dispatch(x, experts.float(), 8), "expert_ids must be int"),
        (lambda: buffer.dispatch(x, experts + 12, 8), "expert 12 does not exist"),
        (
            lambda: buffer.dispatch(torch.zeros(8, 512).bfloat16(), torch.zeros(8, 33).long(), 8),
            "k <= 32",
        ),
        (
            lambda: buffer.dispatch(
                x, experts, 8, cumulative_local_expert_recv_stats=torch.zeros(2, dtype=torch.int32)
            ),
            r"recv_stats must be \[3\]",
        ),
    ):
        with pytest.raises(ValueError, match=what):
            call()
    ranks.exchange([0, 1], 1)


def test_wrong_arguments_of_combine(ranks: Ranks) -> None:
    ranks.start([0])
    buffer, mine = ranks.buffers[0], ranks.inputs([0], 1)[0]
    recv_x, _, handle, _, _ = dispatch(buffer, mine)
    for arguments, what in (
        ((recv_x[:, 1:], mine.experts, mine.weights, handle), "x must be"),
        ((recv_x.float(), mine.experts, mine.weights, handle), "x must be"),
        ((recv_x, mine.experts, mine.weights.double(), handle), "topk_weights must be"),
        ((recv_x, mine.experts[:, :2], mine.weights, handle), "other experts"),
    ):
        with pytest.raises(ValueError, match=what):
            buffer.combine(*arguments)
    with pytest.raises(ValueError, match="out must be"):
        buffer.combine(recv_x, mine.experts, mine.weights, handle, out=mine.x[:, :16])
    out, _, _ = buffer.combine(
        apply_experts(ranks.setup, 0, recv_x), mine.experts, mine.weights, handle
    )
    check_combined(ranks.setup, mine, out, up={0})
