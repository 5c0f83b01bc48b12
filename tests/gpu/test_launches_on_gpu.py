"""Prepared launches on a GPU: they are used, and compute what Triton's own launches do."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from support.comm_local import same_bits
from support.comm_ranks import apply_experts, random_sent
from support.gpu_exchanges import placed
from support.nixl_ep_local import Ranks, Setup, check_combined, check_dispatched, factor, make_input

from flexpert.comm import BufferSpec
from flexpert.comm.buffer import Scales
from flexpert.comm.cuda.cuda_buffer import CudaBuffer
from flexpert.comm.cuda.cuda_exchange import CudaExchange, Tuning
from flexpert.comm.cuda.kernel_launch import KernelLaunch
from flexpert.comm.routing import Sent, expected_rows, expected_sums
from flexpert.compat.nixl_ep.device_exchange import VARIABLE

SPEC = BufferSpec(2, 32, 512, 4, torch.bfloat16)
SETUP = Setup(capacity=2, max_tokens=16, hidden=512)


@pytest.fixture
def buffers() -> Iterator[list[CudaBuffer]]:
    """Each alone: one with prepared launches, one without."""
    made = [CudaBuffer(0, SPEC, tuning=Tuning(prepared=prepared)) for prepared in (True, False)]
    for buffer in made:
        buffer.set_active([0], 1)
        buffer.barrier(timeout_s=10.0)
    yield made
    for buffer in made:
        buffer.close()


def launches(exchange: CudaExchange) -> list[KernelLaunch]:
    kinds = exchange._kinds.values()
    steps = [*exchange._steps.values(), *(kind.send for kind in kinds)]
    return [step.launch for step in steps]


def exchange(buffer: CudaBuffer, s: Sent, fp8: Scales | None = None) -> torch.Tensor:
    """Experts double what they get; out has a row for each token."""
    received = buffer.dispatch(s.x, s.expert_ids, s.weights, s.table, fp8=fp8)
    at = received.indexed
    rows = at.payload.view(torch.uint8)[at.rows.long()].view(at.payload.dtype)
    y = rows.to(SPEC.dtype) * 2
    return buffer.combine(y, received)


def halved(buffer: CudaBuffer, s: Sent, fp8: Scales | None = None) -> torch.Tensor:
    """The same in halves."""
    received = buffer.begin_dispatch(s.x, s.expert_ids, s.weights, s.table, fp8=fp8)()
    at = received.indexed
    rows = at.payload.view(torch.uint8)[at.rows.long()].view(at.payload.dtype)
    return buffer.begin_combine(rows.to(SPEC.dtype) * 2, received)()


def sent(seed: int) -> Sent:
    return placed(random_sent(SPEC, (0,), seed)[0])


@pytest.mark.parametrize("fp8", [None, "float32"])
def test_all_are_prepared_and_compute_what_triton_s_do(
    buffers: list[CudaBuffer], fp8: Scales | None
) -> None:
    for seed in range(12):  # other numbers of tokens
        s = sent(seed)
        ours, tritons = (exchange(buffer, s, fp8) for buffer in buffers)
        assert same_bits(ours.cpu(), tritons.cpu()), seed
        assert same_bits(halved(buffers[0], s, fp8).cpu(), tritons.cpu()), seed
    for buffer, prepared in zip(buffers, (True, False), strict=True):
        made = launches(buffer.exchange)
        assert len(made) >= 3
        assert {launch.prepared is not None for launch in made} == {prepared}


def test_they_agree_with_the_oracle_in_any_thread_stream_and_graph(
    buffers: list[CudaBuffer],
) -> None:
    buffer = buffers[0]
    everyone = {0: random_sent(SPEC, (0,), 4)[0]}
    s = placed(everyone[0])
    x, offsets, _ = expected_rows(everyone, 0)
    y = torch.zeros(buffer.most_rows, SPEC.hidden, dtype=SPEC.dtype, device="cuda")
    y[: len(x)] = apply_experts(x, offsets).cuda()
    desired = expected_sums(everyone, {0: y[: len(x)].cpu()}, 0, "rank")
    out = torch.empty_like(s.x)

    def run() -> None:
        buffer.combine(y, buffer.dispatch(s.x, s.expert_ids, s.weights, s.table), out=out)

    def here() -> None:
        out.zero_()
        run()
        torch.cuda.synchronize()
        assert same_bits(out.cpu(), desired)

    for _ in range(3):
        here()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(run).result()  # in a thread that has no CUDA context yet
        pool.submit(here).result()
    with torch.cuda.stream(torch.cuda.Stream()):
        here()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for _ in range(3):
        out.zero_()
        graph.replay()
        assert buffer.check() == ()
        assert same_bits(out.cpu(), desired)
    if torch.cuda.device_count() > 1:
        with torch.cuda.device(1):
            run()
            assert torch.cuda.current_device() == 1
            torch.cuda.synchronize(0)
            assert same_bits(out.cpu(), desired)


def test_tensors_that_are_not_aligned_are_taken_too(buffers: list[CudaBuffer]) -> None:
    s = sent(4)
    exchange(buffers[0], s)
    ids = torch.empty(s.expert_ids.numel() + 1, dtype=s.expert_ids.dtype, device="cuda")
    weights = torch.empty(s.weights.numel() + 1, device="cuda")
    ids[1:], weights[1:] = s.expert_ids.flatten(), s.weights.flatten()
    moved = Sent(s.x, ids[1:].view(s.expert_ids.shape), weights[1:].view(s.weights.shape), s.table)
    assert moved.expert_ids.data_ptr() % 16
    ours, tritons = exchange(buffers[0], moved), exchange(buffers[1], s)
    assert same_bits(ours.cpu(), tritons.cpu())


@pytest.mark.parametrize("fp8", [False, True])
def test_nixl_ep_s_interface_is_prepared_too(monkeypatch: pytest.MonkeyPatch, fp8: bool) -> None:
    monkeypatch.setenv(VARIABLE, "cuda")
    factors = torch.tensor([factor(e) for e in range(3)], device="cuda")[:, None, None]
    with Ranks(SETUP) as ranks:
        buffer = ranks.add(0)
        for seed in range(6):
            mine = make_input(SETUP, 0, seed)
            x, experts, weights = mine.x.cuda(), mine.experts.cuda(), mine.weights.cuda()
            got, count, handle, _, _ = buffer.dispatch(
                x, experts, SETUP.max_tokens, num_experts=6, use_fp8=fp8
            )
            if fp8:
                continue
            y = (got.float() * factors).bfloat16()
            out, _, _ = buffer.combine(y, experts, weights, handle)
            named = handle[0].cpu(), handle[1].cpu(), *handle[2:]
            check_dispatched(SETUP, {0: mine}, 0, got.cpu(), count.cpu(), named)
            check_combined(SETUP, mine, out.cpu(), up={0})
        core, device = buffer.runtime, buffer._exchange.device
        assert isinstance(core, CudaBuffer)
        turns: Any = device._turns
        packings = [returned.into.packing.step.launch for returned in turns]
        made = list(itertools.chain(launches(core.exchange), packings))
        assert all(launch.prepared is not None for launch in made)
