"""The small measurements behind docs/performance.md; what users measure is in `flexpert bench`.

python tools/measure.py exchange    dispatch and combine of the host backend, 1 to 4 ranks
python tools/measure.py step        a decode step and a prefill of one rank, no head beside it
python tools/measure.py shapes      what oneDNN's kernel for each number of rows costs
python tools/measure.py experts     reading a checkpoint's experts, converted and by extents
python tools/measure.py dense       dense weights from the page cache to a device
"""

from __future__ import annotations

import argparse
import random
import socket
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import msgspec
import torch
import torch.nn.functional as F
from checkpoint_reads import measure_dense, measure_experts

from flexpert.bench.processes import forks
from flexpert.bench.processes.connection import StreamConnection
from flexpert.comm import BufferSpec, ExpertTable, make_buffer
from flexpert.comm.buffer import Reduce
from flexpert.kernels.cpu.expert_products import LayerExperts
from flexpert.models.batch import ForwardBatch
from flexpert.models.model_runner import ModelRunner
from flexpert.models.padding import padded_size
from flexpert.models.source import ModelSource
from flexpert.moe.moe_layers import LayerState
from flexpert.moe.placement import replan
from flexpert.moe.runtime import MoERuntime, expert_tables

EXPERTS = 32
BLOCK = 16


def exchange() -> None:
    """Medians on rank 0, microseconds."""
    print("tokens hidden top-k ranks reduce  dispatch  combine  µs")
    for tokens, hidden, topk, rounds in ((16, 256, 4, 2000), (128, 7168, 8, 30)):
        for ranks in (1, 2, 4):
            processes = [forks.start("measure:exchange_rank") for _ in range(ranks)]
            try:
                for rank, process in enumerate(processes):
                    begin = (rank, ranks, tokens, hidden, topk, rounds)
                    process.connection.send(msgspec.msgpack.encode(begin))
                addresses = {
                    rank: msgspec.msgpack.decode(process.connection.receive(), type=bytes)
                    for rank, process in enumerate(processes)
                }
                for process in processes:
                    process.connection.send(msgspec.msgpack.encode(addresses))
                results = [msgspec.msgpack.decode(p.connection.receive()) for p in processes]
            finally:
                for process in processes:
                    process.end()
            for reduce, (dispatch, combine) in results[0].items():
                print(
                    f"{tokens:6} {hidden:6} {topk:5} {ranks:5} {reduce:>6} "
                    f"{dispatch:9.1f} {combine:8.1f}"
                )


def exchange_rank(end: socket.socket) -> None:
    torch.set_num_threads(1)
    connection = StreamConnection(end)
    rank, ranks, tokens, hidden, topk, rounds = msgspec.msgpack.decode(
        connection.receive(), type=tuple[int, int, int, int, int, int]
    )
    spec = BufferSpec(ranks, tokens, hidden, topk, torch.bfloat16)
    buffer = make_buffer(rank, spec)
    connection.send(msgspec.msgpack.encode(buffer.address))
    addresses = msgspec.msgpack.decode(connection.receive(), type=dict[int, bytes])
    buffer.connect(addresses)
    draw = torch.Generator().manual_seed(rank)
    x = torch.randn(spec.max_tokens, spec.hidden, generator=draw).to(spec.dtype)
    ids = torch.rand(spec.max_tokens, EXPERTS, generator=draw).topk(spec.topk).indices
    weights = torch.rand(spec.max_tokens, spec.topk, generator=draw)
    placement = replan(None, addresses, experts=EXPERTS, layers=1)
    table: ExpertTable = expert_tables(placement, rank)[0]
    out = torch.empty_like(x)
    results = {}
    modes: tuple[Reduce, ...] = ("rank", "home")
    for epoch, reduce in enumerate(modes, 1):
        buffer.set_active(addresses, epoch)
        buffer.post_vote(b"")
        buffer.collect_votes(30.0)
        times: list[tuple[float, float]] = []
        for _ in range(rounds):
            began = time.perf_counter()
            received = buffer.dispatch(x, ids, weights, table)
            sent = time.perf_counter()
            buffer.combine(received.x, received, reduce=reduce, out=out)
            times.append((sent - began, time.perf_counter() - sent))
        warm = times[rounds // 5 :]
        results[reduce] = tuple(
            statistics.median(pair[side] for pair in warm) * 1e6 for side in (0, 1)
        )
    connection.send(msgspec.msgpack.encode(results))
    buffer.close()


def step(deterministic: bool) -> None:
    """The embedded model in this process, all experts here, through a real buffer."""
    torch.set_num_threads(1)
    source = ModelSource.open("tiny")
    info = source.info
    spec = BufferSpec(1, 512, info.hidden, info.topk, info.dtype)
    runtime = MoERuntime(make_buffer(0, spec), reduce="home" if deterministic else "rank")
    runner = ModelRunner.load(
        source, moe=runtime, kv_blocks=2048, kv_block_size=BLOCK, deterministic=deterministic
    )
    placement = replan(None, [0], experts=info.experts, layers=info.moe_layers)
    layers = []
    for layer, table in enumerate(expert_tables(placement, 0)):
        held = source.load_experts(layer, range(info.experts))
        ordered = [held[expert] for expert in placement.held_by(0)[layer]]
        layers.append(LayerState(table, LayerExperts(ordered, deterministic=deterministic)))
    runtime.install(runtime.stage(layers))
    assert runner.recorded is not None, runner.not_recorded
    print(f"tiny, one thread{', deterministic' if deterministic else ''}; medians of 7 in turn, ms")
    print(f"  {'':36} recorded  modules  ratio")
    recorded = runner.recorded
    for name, batch, repeats in (
        ("decode, 16 sequences at 192 tokens", _batch(16, 191, 1), 50),
        ("decode, 1 sequence at 192 tokens", _batch(1, 191, 1), 50),
        ("decode, 64 sequences at 192 tokens", _batch(64, 191, 1), 20),
        ("prefill, 128 tokens", _batch(1, 0, 128), 20),
        ("prefill, 4 × 128 tokens", _batch(4, 0, 128), 8),
    ):
        times: dict[bool, list[float]] = {True: [], False: []}
        for _ in range(7):
            for which, each in times.items():
                runner.recorded = recorded if which else None
                each.append(_ms(partial(runner.forward, batch), repeats))
        ours, theirs = (statistics.median(each) for each in times.values())
        print(f"  {name:36} {ours:8.2f} {theirs:8.2f} {theirs / ours:6.2f}")


def _batch(sequences: int, past: int, new: int) -> ForwardBatch:
    """`sequences` of them, each with `new` tokens after `past`."""
    total = past + new
    tables = torch.arange(sequences * -(-total // BLOCK)).view(sequences, -1)
    positions = torch.arange(past, total)
    slots = tables[:, positions // BLOCK] * BLOCK + positions % BLOCK
    return ForwardBatch(
        token_ids=torch.randint(10, 4000, (sequences * new,)),
        positions=positions.repeat(sequences),
        query_start=torch.arange(0, sequences * new + 1, new, dtype=torch.int32),
        context_len=torch.full((sequences,), total, dtype=torch.int32),
        block_tables=tables.to(torch.int32),
        slot_mapping=slots.reshape(-1),
        sample_rows=torch.arange(new - 1, sequences * new, new),
    )


def _ms(work: Callable[[], object], repeats: int) -> float:
    work()
    began = time.perf_counter()
    for _ in range(repeats):
        work()
    return (time.perf_counter() - began) / repeats * 1e3


def shapes(padded: bool) -> None:
    """400 batches of 1 to 256 rows through the tiny model's five dense products, by torch."""
    torch.set_num_threads(1)
    weights = [torch.randn(out, 256, dtype=torch.bfloat16) for out in (256, 128, 256, 4096, 16)]
    draw = random.Random(0)
    rows = [draw.randint(1, 256) for _ in range(400)]
    if padded:
        rows = [padded_size(count) for count in rows]
    with torch.inference_mode():
        for weight in weights:
            F.linear(torch.randn(16, 256, dtype=torch.bfloat16), weight)
        before, began = _resident_mib(), time.perf_counter()
        for count in rows:
            x = torch.randn(count, 256, dtype=torch.bfloat16)
            for weight in weights:
                F.linear(x, weight)
    took = (time.perf_counter() - began) / len(rows) * 1e3
    name = "padded sizes" if padded else "any size"
    print(f"{name}: {took:.2f} ms a batch, {_resident_mib() - before:.0f} MiB more resident")


def _resident_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("exchange", "step", "shapes", "experts", "dense"))
    parser.add_argument("--deterministic", action="store_true", help="step: in that mode")
    parser.add_argument("--padded", action="store_true", help="shapes: as flexpert pads them")
    parser.add_argument("--gib", type=float, default=4, help="experts, dense: of the checkpoint")
    parser.add_argument("--threads", type=int, default=8, help="experts: that read")
    parser.add_argument("--directory", default="/tmp", help="experts, dense: of the checkpoint")
    arguments = parser.parse_args()
    match arguments.what:
        case "exchange":
            exchange()
        case "step":
            step(arguments.deterministic)
        case "experts":
            measure_experts(arguments.gib, arguments.threads, arguments.directory)
        case "dense":
            measure_dense(arguments.gib, arguments.directory)
        case _:
            shapes(arguments.padded)


if __name__ == "__main__":
    main()
