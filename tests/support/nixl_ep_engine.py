"""A rank of an engine over nixl_ep: bfloat16 by default, one captured graph, ranks come and go.

Knows nixl_ep and torch only. The layer's dispatch, experts and combine are captured once, while the
rank is alone, with `num_experts` for the capacity; every step is a replay (on a CPU, the same calls
again). A newcomer is connected beside the steps of the others; then all unmask it, each when it
gets there, and the next replay has it. There is no barrier and no call outside of the graph.

In a plan a new id joins, a missing one leaves, a negative one dies when the others unmask it.

    python nixl_ep_engine.py --rank R --port P --plan '[[0, 1], [0, 1, 2]]' --start-phase 0
"""

import argparse
import json
import os
import random
import signal
import threading
import time
from datetime import timedelta

import nixl_ep
import torch
import torch.distributed as dist

STEPS = 3  # between two changes


def inputs(args, rank, seed, members):
    """Tokens, experts of members only, and weights; as many tokens as there can be."""
    with torch.device("cpu"):
        generator = torch.Generator().manual_seed(100 * seed + rank)
        x = torch.randn(args.num_tokens, args.hidden, generator=generator, dtype=torch.float32)
        owned = [
            member * args.experts_per_rank + local
            for member in members
            for local in range(args.experts_per_rank)
        ]
        owned = torch.tensor(owned)
        scores = torch.rand(args.num_tokens, len(owned), generator=generator, dtype=torch.float32)
        topk_idx = owned[scores.topk(args.topk, dim=1).indices]
        used = int(torch.randint(1, args.num_tokens + 1, (1,), generator=generator))
        topk_idx[used:] = -1
        weights = torch.rand(args.num_tokens, args.topk, generator=generator, dtype=torch.float32)
        return x.to(torch.bfloat16), topk_idx.to(nixl_ep.topk_idx_t), weights


def factor(expert):
    return 1.0 + 0.5 * (expert % 4)


class Step:
    """A model of two MoE layers; inputs and outputs stay where they are."""

    def __init__(self, args, buffer):
        self.args, self.buffer = args, buffer
        self.x = torch.zeros(args.num_tokens, args.hidden, device=args.device)
        self.topk_idx = torch.full(
            (args.num_tokens, args.topk), -1, dtype=nixl_ep.topk_idx_t, device=args.device
        )
        self.weights = torch.zeros(
            args.num_tokens, args.topk, dtype=torch.float32, device=args.device
        )
        first = args.rank * args.experts_per_rank
        factors = [factor(first + local) for local in range(args.experts_per_rank)]
        self.factors = torch.tensor(factors, device=args.device)[:, None, None]
        self.graph = None
        if args.device == "cuda":
            self.capture()

    def capture(self):
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            self.forward()
        torch.cuda.current_stream().wait_stream(aside)
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.forward()

    def layer(self, x, split):
        """split: sending and receiving apart, as for micro-batches that overlap."""
        args = self.args
        recv_x, recv_count, handle, _, hook = self.buffer.low_latency_dispatch(
            x,
            self.topk_idx,
            args.num_tokens,
            args.capacity * args.experts_per_rank,
            use_fp8=False,
            return_recv_hook=split,
        )
        if split:
            hook()
        out, _, hook = self.buffer.low_latency_combine(
            recv_x * self.factors, self.topk_idx, self.weights, handle, return_recv_hook=split
        )
        if split:
            hook()
        return out, recv_count

    def forward(self):
        self.outs, self.counts = [], []
        for split in (False, True):
            out, count = self.layer(self.x, split)
            self.outs.append(out)
            self.counts.append(count)

    def run(self, x, topk_idx, weights):
        self.x.copy_(x)
        self.topk_idx.copy_(topk_idx)
        self.weights.copy_(weights)
        if self.graph is None:
            self.forward()
        else:
            self.graph.replay()
            torch.cuda.synchronize()


def check(args, step, sent, up):
    """Counts exactly, sums against a plain computation. up: ranks that take part."""
    with torch.device("cpu"):
        x, topk_idx, weights = sent[args.rank]
        expert = topk_idx.long()
        counts = (expert >= 0) & torch.isin(expert // args.experts_per_rank, torch.tensor(up))
        scale = torch.tensor([factor(e) for e in range(4)], dtype=torch.float64)
        weight = (weights.double() * counts * scale[expert % 4]).sum(dim=1, keepdim=True)
        desired = weight * x.double()
        allowed = 2**-6 * weight * x.double().abs()
        first = args.rank * args.experts_per_rank
        rows = [
            sum(int((sent[source][1] == first + local).sum()) for source in up)
            for local in range(args.experts_per_rank)
        ]
        for out, count in zip(step.outs, step.counts, strict=True):
            assert count.cpu().tolist() == rows, (args.rank, count, rows)
            error = (out.cpu().double() - desired).abs()
            assert (error <= allowed).all(), (args.rank, up, error.max())


class Rank:
    def __init__(self, args):
        self.args = args
        self.store = dist.TCPStore("127.0.0.1", args.port, timeout=timedelta(seconds=60))
        self.buffer = nixl_ep.Buffer(
            rank=args.rank,
            explicitly_destroy=True,
            tcp_store_group=self.store,
            timeout_ms=args.timeout_ms,
        )
        size = nixl_ep.Buffer.get_rdma_size_hint(
            args.num_tokens, args.hidden, args.capacity, args.capacity * args.experts_per_rank
        )
        self.buffer.update_memory_buffers(args.capacity, args.experts_per_rank, size)
        self.step = Step(args, self.buffer)
        self.dice = random.Random(args.rank)

    def steps(self, members, seed, up=None):
        for number in range(seed, seed + STEPS):
            sent = {rank: inputs(self.args, rank, number, members) for rank in members}
            self.step.run(*sent[self.args.rank])
            check(self.args, self.step, sent, up or members)

    def meet(self, name, members):
        """All hosts are here; says nothing of what they do next."""
        if self.store.add(name, 1) == len(members):
            self.store.set(name + "/all", "here")
        self.store.wait([name + "/all"])

    def change(self, old, new, dying, number):
        """From `old` (none for a newcomer) to `new`."""
        rank, name = self.args.rank, f"change/{number}"
        arriving = sorted(set(new) - set(old))
        if not old:
            others = [peer for peer in new if peer != rank]
            self.buffer.connect_ranks(others, activate=False)
        else:
            others = arriving
            gone = sorted(set(old) - set(new))
            self.buffer.disconnect_ranks(gone)
            beside = threading.Thread(
                target=self.buffer.connect_ranks, args=(arriving,), kwargs={"activate": False}
            )
            beside.start()
            staying = [peer for peer in old if peer not in gone]
            self.steps(staying, 1000 * number)
            beside.join()
        self.meet(name, new)
        if rank in dying:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(self.dice.uniform(0, 0.03))
        self.dice.shuffle(others)
        for peer in others:
            self.buffer.update_mask_buffer(peer, False)
        self.steps(new, 1000 * number + 500, up=[peer for peer in new if peer not in dying])
        masked = torch.full((self.args.capacity,), 9, dtype=torch.int32, device=self.args.device)
        self.buffer.query_mask_buffer(masked)
        up = [peer for peer, status in enumerate(masked.tolist()) if status == 0]
        assert up == [peer for peer in new if peer not in dying], (rank, number, up)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--plan", type=json.loads, required=True)
    parser.add_argument("--start-phase", type=int, default=0)
    parser.add_argument("--num-tokens", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--topk", type=int, default=3)
    parser.add_argument("--experts-per-rank", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--timeout-ms", type=int, default=20000)
    args = parser.parse_args()
    args.capacity = max(abs(rank) for phase in args.plan for rank in phase) + 1
    torch.set_default_dtype(torch.bfloat16)
    if args.device == "cuda":
        torch.cuda.set_device(args.rank % torch.cuda.device_count())
        torch.set_default_device("cuda")

    rank = Rank(args)
    old = []
    for number in range(args.start_phase, len(args.plan)):
        members = sorted(abs(peer) for peer in args.plan[number])
        dying = [-peer for peer in args.plan[number] if peer < 0]
        if args.rank not in members:
            break
        rank.change(old, members, dying, number)
        print(f"rank {args.rank}: phase {number} with ranks {members} passed", flush=True)
        rank.buffer.disconnect_ranks(dying)
        old = [peer for peer in members if peer not in dying]
    rank.buffer.destroy()


if __name__ == "__main__":
    main()
