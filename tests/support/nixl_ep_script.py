"""An elastic test as users of nixl_ep write it: one process for each rank, phases of a plan.

Knows nixl_ep and torch only. Each rank makes up the inputs of all ranks from seeds, and checks
counts, sources and payload bit for bit, sums against float64.

    python nixl_ep_script.py --rank R --port P --plan '[[0, 1], [0, -1]]' --start-phase 0
"""

import argparse
import json
import os
import signal
from datetime import timedelta

import nixl_ep
import torch
import torch.distributed as dist
from nixl_ep.buffer import DEFAULT_TIMEOUT_MS

BOTH_WAYS = (False, True)


def inputs(args, rank, seed, num_ranks):
    generator = torch.Generator().manual_seed(100 * seed + rank)
    x = torch.randn(args.num_tokens, args.hidden, generator=generator).to(torch.bfloat16)
    num_experts = num_ranks * args.experts_per_rank
    scores = torch.rand(args.num_tokens, num_experts, generator=generator)
    topk_idx = scores.topk(args.topk, dim=1).indices.to(nixl_ep.topk_idx_t)
    topk_idx[torch.rand(topk_idx.shape, generator=generator) < 0.1] = -1
    return x, topk_idx, torch.rand(args.num_tokens, args.topk, generator=generator)


def dequantise(recv_x):
    values, scales = recv_x
    blocks = values.float().view(*scales.shape, 128)
    return (blocks * scales.unsqueeze(3)).view(values.shape).to(torch.bfloat16)


def exchange(args, buffer, rank, seed, num_ranks, use_fp8, hook_mode, zero_copy, die):
    """One dispatch and combine, checked; `die` is "dispatch", "combine" or None."""
    sent = {r: inputs(args, r, seed, num_ranks) for r in range(num_ranks)}
    x, topk_idx, topk_weights = (t.to(args.device) for t in sent[rank])
    mask = torch.zeros(args.capacity, dtype=torch.int32, device=args.device)
    stats = torch.zeros(args.experts_per_rank, dtype=torch.int32, device=args.device)
    if die == "dispatch":
        os.kill(os.getpid(), signal.SIGKILL)
    recv_x, recv_count, handle, event, hook = buffer.dispatch(
        x,
        topk_idx,
        args.num_tokens,
        num_ranks * args.experts_per_rank,
        use_fp8=use_fp8,
        cumulative_local_expert_recv_stats=stats,
        async_finish=not hook_mode,
        return_recv_hook=hook_mode,
    )
    hook() if hook_mode else event.current_stream_wait()
    buffer.query_mask_buffer(mask)
    rows = dequantise(recv_x) if use_fp8 else recv_x
    src_info, layout_range = handle[:2]
    for local in range(args.experts_per_rank):
        expert = rank * args.experts_per_rank + local
        at = 0
        for source in range(num_ranks):
            tokens = (sent[source][1] == expert).any(dim=1).nonzero().flatten()
            if mask[source] != 0:
                tokens = tokens[:0]
            packed = layout_range[local, source].item()
            assert (packed >> 32, packed & 0xFFFFFFFF) == (at, len(tokens)), (rank, local, source)
            got = slice(at, at + len(tokens))
            assert torch.equal(src_info[local, got].cpu(), tokens.int())
            want = sent[source][0][tokens].to(args.device)
            if use_fp8:
                assert ((rows[local, got] - want).abs() <= 2**-4 * want.abs() + 2e-3).all()
            else:
                assert torch.equal(rows[local, got], want)
            at += len(tokens)
        assert recv_count[local] == stats[local] == at
    if die == "combine":
        os.kill(os.getpid(), signal.SIGKILL)

    y = rows * 2
    if zero_copy:
        buffer.get_next_combine_buffer(handle)[:, :, :] = y
    out = torch.empty_like(x)
    combined, event, hook = buffer.combine(
        y,
        topk_idx,
        topk_weights,
        handle,
        zero_copy=zero_copy,
        async_finish=not hook_mode,
        return_recv_hook=hook_mode,
        out=out,
    )
    hook() if hook_mode else event.current_stream_wait()
    buffer.query_mask_buffer(mask)
    check_sums(args, sent[rank], combined.cpu(), mask.cpu(), use_fp8)
    return mask


def check_sums(args, mine, combined, mask, use_fp8):
    """Of experts that double a row, on ranks that are not masked."""
    x, topk_idx, topk_weights = mine
    owner = topk_idx // args.experts_per_rank
    counts = (topk_idx >= 0) & (mask[owner.clamp(min=0)] == 0)
    weight = (topk_weights.double() * counts).sum(dim=1, keepdim=True)
    error = (combined.double() - 2 * weight * x.double()).abs()
    allowed = (2**-4 if use_fp8 else 2**-7) * 2 * weight * x.double().abs() + 1e-2 * use_fp8
    assert (error <= allowed).all(), error.max()


def unpaired(args, buffer, rank, seed, num_ranks):
    """Two dispatches in a row; the first is combined twice, the second never."""
    mine = inputs(args, rank, seed, num_ranks)
    x, topk_idx, topk_weights = (t.to(args.device) for t in mine)
    mask = torch.zeros(args.capacity, dtype=torch.int32, device=args.device)
    got = [
        buffer.dispatch(
            tokens, topk_idx, args.num_tokens, num_ranks * args.experts_per_rank, use_fp8=False
        )
        for tokens in (x, -x)
    ]
    recv_x, _, handle = got[0][:3]
    for _ in range(2):
        combined, _, _ = buffer.combine(recv_x * 2, topk_idx, topk_weights, handle)
        buffer.query_mask_buffer(mask)
        check_sums(args, mine, combined.cpu(), mask.cpu(), use_fp8=False)


def phase(args, buffer, rank, number, members, dying):
    num_ranks = max(members) + 1
    seed = 100 * number
    for use_fp8 in BOTH_WAYS:
        for hook_mode in BOTH_WAYS:
            for zero_copy in BOTH_WAYS:
                seed += 1
                die = args.die if rank in dying and seed % 100 == 4 else None
                mask = exchange(
                    args, buffer, rank, seed, num_ranks, use_fp8, hook_mode, zero_copy, die
                )
    unpaired(args, buffer, rank, seed + 1, num_ranks)
    buffer.barrier()
    return mask


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--plan", type=json.loads, required=True)
    parser.add_argument("--start-phase", type=int, default=0)
    parser.add_argument("--die", choices=["dispatch", "combine"], default="dispatch")
    parser.add_argument("--num-tokens", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--topk", type=int, default=3)
    parser.add_argument("--experts-per-rank", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--timeout-ms", type=int, default=DEFAULT_TIMEOUT_MS)
    args = parser.parse_args()
    rank = args.rank
    args.capacity = max(abs(r) for members in args.plan for r in members) + 1

    store = dist.TCPStore(
        "127.0.0.1", args.port, is_master=False, timeout=timedelta(seconds=args.timeout_ms / 1000)
    )
    buffer = nixl_ep.Buffer(
        rank=rank,
        explicitly_destroy=True,
        tcp_store_group=store,
        timeout_ms=args.timeout_ms,
    )
    num_rdma_bytes = nixl_ep.Buffer.get_rdma_size_hint(
        args.num_tokens, args.hidden, args.capacity, args.capacity * args.experts_per_rank
    )
    buffer.update_memory_buffers(
        num_ranks=args.capacity,
        num_experts_per_rank=args.experts_per_rank,
        num_rdma_bytes=num_rdma_bytes,
    )
    connected = set()
    for number in range(args.start_phase, len(args.plan)):
        members = [abs(r) for r in args.plan[number]]
        dying = {-r for r in args.plan[number] if r < 0}
        if rank not in members:
            break
        gone = sorted(connected - set(members))
        if gone:
            buffer.disconnect_ranks(gone)
        new = sorted(set(members) - connected - {rank})
        if new:
            buffer.connect_ranks(new)
        connected = set(members) - {rank}
        mask = phase(args, buffer, rank, number, members, dying)
        failed = {r for r in connected if mask[r] != 0}
        assert failed == dying, f"rank {rank}, phase {number}: lost {failed}, not {dying}"
        buffer.disconnect_ranks(sorted(failed))
        connected -= failed
        print(f"rank {rank}: phase {number} passed", flush=True)
    buffer.destroy()


if __name__ == "__main__":
    main()
