"""nixl_ep's interface in a CUDA graph: captured once, replayed with other tokens. Needs a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from support.nixl_ep_local import (
    Input,
    Ranks,
    Setup,
    check_combined,
    check_dispatched,
    factor,
    make_input,
)

from flexpert.comm import CommError
from flexpert.compat.nixl_ep.device_exchange import VARIABLE

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="needs a GPU; make test-gpu runs it on one"
    ),
]

SETUP = Setup(capacity=2, max_tokens=16, hidden=512)


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ranks]:
    monkeypatch.setenv(VARIABLE, "cuda")
    with Ranks(SETUP) as started:
        yield started


def whole(mine: Input) -> Input:
    """With as many tokens as there can be: those that are not there choose no expert."""
    missing = SETUP.max_tokens - len(mine.x)
    x = torch.cat([mine.x, torch.zeros(missing, SETUP.hidden).bfloat16()])
    experts = torch.cat([mine.experts, torch.full((missing, 3), -1)])
    return Input(x, experts, torch.cat([mine.weights, torch.zeros(missing, 3)]))


def test_a_captured_graph_is_right_with_every_input(ranks: Ranks) -> None:
    buffer = ranks.add(0)
    first = whole(make_input(SETUP, 0, 2))
    x, experts, weights = first.x.cuda(), first.experts.cuda(), first.weights.cuda()
    factors = torch.tensor([factor(e) for e in range(3)], device="cuda")[:, None, None]

    def run() -> tuple[torch.Tensor, ...]:
        recv_x, count, handle, _, hook = buffer.dispatch(
            x, experts, SETUP.max_tokens, num_experts=6, use_fp8=False, return_recv_hook=True
        )
        assert hook is not None
        hook()
        y = (recv_x.float() * factors).bfloat16()
        out, _, _ = buffer.combine(y, experts, weights, handle)
        again, _, _ = buffer.combine(y, experts, weights, handle)
        return recv_x, count, *handle[:2], out, again

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recv_x, count, token, ranges, out, again = run()
    for seed in range(20, 30):
        mine = whole(make_input(SETUP, 0, seed))
        x.copy_(mine.x)
        experts.copy_(mine.experts)
        weights.copy_(mine.weights)
        graph.replay()
        torch.cuda.synchronize()
        handle = token.cpu(), ranges.cpu(), SETUP.max_tokens, SETUP.hidden
        check_dispatched(SETUP, {0: mine}, 0, recv_x.cpu(), count.cpu(), handle)
        check_combined(SETUP, mine, out.cpu(), up={0})
        check_combined(SETUP, mine, again.cpu(), up={0})


def test_a_dispatch_before_the_graph_cannot_be_settled_in_it(ranks: Ranks) -> None:
    buffer = ranks.add(0)
    mine = whole(make_input(SETUP, 0, 2))
    x, experts = mine.x.cuda(), mine.experts.cuda()
    buffer.dispatch(x, experts, SETUP.max_tokens, use_fp8=False)
    graph = torch.cuda.CUDAGraph()
    with (
        pytest.raises(CommError, match="before the graph that is captured"),
        torch.cuda.graph(graph),
    ):
        buffer.dispatch(x, experts, SETUP.max_tokens, use_fp8=False)
    buffer.barrier()
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        buffer.dispatch(x, experts, SETUP.max_tokens, use_fp8=False)


@pytest.mark.parametrize("begun", ["on the default stream", "on one of its own"])
def test_work_of_an_event_is_waited_for_by_the_stream_that_asks(ranks: Ranks, begun: str) -> None:
    buffer = ranks.add(0)
    mine = whole(make_input(SETUP, 0, 2))
    x, experts = mine.x.cuda(), mine.experts.cuda()
    torch.cuda.synchronize()
    first = torch.cuda.default_stream() if "default" in begun else torch.cuda.Stream()
    with torch.cuda.stream(first):
        recv_x, count, handle, event, _ = buffer.dispatch(
            x, experts, SETUP.max_tokens, num_experts=6, use_fp8=False, async_finish=True
        )
    other = torch.cuda.Stream()
    with torch.cuda.stream(other):
        event.current_stream_wait()
        rows, counts = recv_x.clone(), count.clone()
        token, ranges = handle[0].clone(), handle[1].clone()
    other.synchronize()
    told = token.cpu(), ranges.cpu(), SETUP.max_tokens, SETUP.hidden
    check_dispatched(SETUP, {0: mine}, 0, rows.cpu(), counts.cpu(), told)
