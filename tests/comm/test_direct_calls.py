"""Exchanges of a GPU that are one call of C: what is launched, and that every misuse is the error
that it is where each kernel is launched by itself, with nothing launched.

Kernels are prepared for a driver that launches none; what they compute is in tests/gpu.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from support.cuda_local import FEW, INTERPRETED
from support.fake_launches import FakeLaunches
from support.nixl_ep_local import Ranks, Setup

from flexpert.comm import BufferSpec, CommError, ExpertTable, Interrupted, RankLost
from flexpert.comm.capture_guard import CAPTURE_GUARD
from flexpert.comm.cuda.cuda_buffer import CudaBuffer
from flexpert.comm.cuda.cuda_layout import DISPATCH, Page
from flexpert.comm.cuda.cuda_received import CudaReceived
from flexpert.comm.errors import StaleEpoch
from flexpert.compat.nixl_ep import Buffer
from flexpert.compat.nixl_ep.device_exchange import VARIABLE

if not INTERPRETED:
    pytest.skip("the tensors of these tests lie in the host's memory", allow_module_level=True)

BF16 = torch.bfloat16
SPEC = BufferSpec(2, 8, 64, 4, BF16)
TOKENS, K = 3, 2
DISPATCH_KERNELS, COMBINE_KERNELS = ["send_dispatch", "index_rows"], ["send_combine", "reduce"]


@dataclass
class Call:
    """A buffer, and arguments that fit."""

    buffer: CudaBuffer
    fake: FakeLaunches
    x: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    table: ExpertTable
    y: torch.Tensor
    out: torch.Tensor

    def dispatch(self, **other: Any) -> CudaReceived:
        taken = {"x": self.x, "expert_ids": self.ids, "weights": self.weights, "table": self.table}
        return self.buffer.dispatch(**taken | other)

    def combine(self, received: CudaReceived, **other: Any) -> torch.Tensor:
        return self.buffer.combine(**{"y": self.y, "received": received, "out": self.out} | other)

    def pair(self) -> None:
        """One of each, which must be two calls of C."""
        self.fake.taken()
        before = self.fake.by_driver
        self.combine(self.dispatch())
        assert self.fake.taken() == DISPATCH_KERNELS + COMBINE_KERNELS
        assert self.fake.by_driver == before + 4


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


@pytest.fixture(params=[False, True], ids=["one by one", "as graphs"])
def call(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Call]:
    """After some exchanges: the last was launched by calls of C."""
    with usual(monkeypatch, with_graphs=request.param) as made:
        yield made


@contextmanager
def usual(monkeypatch: pytest.MonkeyPatch, *, with_graphs: bool) -> Iterator[Call]:
    fake = FakeLaunches(monkeypatch, with_graphs=with_graphs)
    buffer = CudaBuffer(0, SPEC, device=torch.device("cpu"), tuning=FEW)
    monkeypatch.setattr(buffer, "_cuda", True)
    experts = torch.arange(6, dtype=torch.int32)
    made = Call(
        buffer,
        fake,
        numbers(TOKENS, 64, dtype=BF16),
        numbers(TOKENS, K, dtype=torch.int64),
        numbers(TOKENS, K),
        ExpertTable(experts // 3, experts % 3, 3),
        numbers(buffer.most_rows, 64, dtype=BF16),
        numbers(TOKENS, 64, dtype=BF16),
    )
    for _ in range(2):
        made.combine(made.dispatch())
    made.pair()
    yield made
    buffer.close()


NOTHING = {"expert_ids": numbers(0, K, dtype=torch.int64), "weights": numbers(0, K)}
MOST = SPEC.max_tokens
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "x of another dtype": ({"x": numbers(TOKENS, 64)}, "x must be"),
    "x of another width": ({"x": numbers(TOKENS, 48, dtype=BF16)}, r"x must be \[tokens, 64\]"),
    "x of one dimension": ({"x": numbers(64, dtype=BF16)}, "x must be"),
    "x with gaps": ({"x": numbers(TOKENS, 128, dtype=BF16)[:, ::2]}, "x must be contiguous"),
    "x elsewhere": ({"x": numbers(TOKENS, 64, dtype=BF16).to("meta")}, "x must be on cpu"),
    "too many tokens": (
        {
            "x": numbers(MOST + 1, 64, dtype=BF16),
            "expert_ids": numbers(MOST + 1, K, dtype=torch.int64),
            "weights": numbers(MOST + 1, K),
        },
        "9 tokens in one dispatch; the buffer holds 8",
    ),
    "experts of another dtype": ({"expert_ids": numbers(TOKENS, K)}, "must be int32 or int64"),
    "experts of other tokens": (
        {"expert_ids": numbers(TOKENS + 1, K, dtype=torch.int64)},
        "expert_ids must be",
    ),
    "more choices": (
        {"expert_ids": numbers(TOKENS, 5, dtype=torch.int64), "weights": numbers(TOKENS, 5)},
        "expert_ids must be",
    ),
    "weights of another dtype": ({"weights": numbers(TOKENS, K, dtype=BF16)}, "weights must be"),
    "weights of other tokens": ({"weights": numbers(TOKENS - 1, K)}, "weights must be"),
    "scales that rows cannot have": ({"fp8": "float32"}, "hidden"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_a_dispatch_that_does_not_fit_is_refused_as_ever(call: Call, why: str) -> None:
    other, message = REFUSED[why]
    with pytest.raises(ValueError, match=message):
        call.dispatch(**other)
    assert call.fake.taken() == []
    call.pair()


COMBINE_REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "y of another dtype": ({"y": numbers(64, 64)}, "y must be"),
    "y of another width": ({"y": numbers(64, 48, dtype=BF16)}, "y must be"),
    "y with gaps": ({"y": numbers(64, 128, dtype=BF16)[:, ::2]}, "y must be"),
    "y of other rows": ({"y": numbers(5, 64, dtype=BF16)}, r"y must be \[0, 64\]"),
    "y elsewhere": ({"y": numbers(64, 64, dtype=BF16).to("meta")}, "y must be"),
    "out of another dtype": ({"out": numbers(TOKENS, 64)}, "out must be"),
    "out of other tokens": ({"out": numbers(TOKENS + 1, 64, dtype=BF16)}, r"out must be \[3, 64\]"),
    "weights alone": ({"weights": numbers(TOKENS, K)}, "weights at combine need reduce='home'"),
    "another reduce": ({"reduce": "both"}, "must be 'home' or 'rank'"),
}


@pytest.mark.parametrize("why", COMBINE_REFUSED)
def test_a_combine_that_does_not_fit_is_refused_as_ever(call: Call, why: str) -> None:
    received = call.dispatch()
    call.fake.taken()
    other, message = COMBINE_REFUSED[why]
    assert call.buffer.most_rows == 64
    with pytest.raises(ValueError, match=message):
        call.combine(received, **other)
    assert call.fake.taken() == []
    call.combine(received)
    assert call.fake.taken() == COMBINE_KERNELS


def test_calls_out_of_turn_are_refused_as_ever(call: Call) -> None:
    received = call.dispatch()
    call.fake.taken()
    with pytest.raises(CommError, match="dispatch before combine of the last"):
        call.dispatch()
    call.combine(received)
    with pytest.raises(StaleEpoch, match="combined already"):
        call.combine(received)
    assert call.fake.taken() == COMBINE_KERNELS
    call.pair()


def test_an_interrupted_or_closed_buffer_launches_nothing(call: Call) -> None:
    received = call.dispatch()
    call.buffer.interrupt()
    call.fake.taken()
    with pytest.raises(Interrupted):
        call.combine(received)
    with pytest.raises(Interrupted):
        call.dispatch()
    call.buffer.set_active([0], 1)
    call.buffer.barrier(timeout_s=10.0)
    call.pair()
    call.buffer.close()
    with pytest.raises(CommError, match="is closed"):
        call.dispatch()
    assert call.fake.taken() == []


@pytest.mark.parametrize("phase", ["dispatch", "combine"])
def test_what_a_kernel_has_reported_is_raised_by_the_next_call(call: Call, phase: str) -> None:
    received = call.dispatch() if phase == "combine" else None
    call.fake.taken()
    call.buffer._page[Page.REPORT + 1] = DISPATCH
    with pytest.raises(RankLost, match="rank 1"):
        call.dispatch() if received is None else call.combine(received)
    with pytest.raises(StaleEpoch):
        call.dispatch()
    assert call.fake.taken() == []


def test_other_tokens_tables_and_limits_are_taken(call: Call) -> None:
    for tokens in (0, 1, MOST):
        received = call.dispatch(
            x=numbers(tokens, 64, dtype=BF16),
            expert_ids=numbers(tokens, K, dtype=torch.int64),
            weights=numbers(tokens, K),
        )
        assert received.tokens_sent == tokens
        assert call.combine(received, out=None).shape == (tokens, 64)
    assert call.fake.taken() == 3 * (DISPATCH_KERNELS + COMBINE_KERNELS)
    copied = call.dispatch(expert_ids=numbers(TOKENS, 2 * K, dtype=torch.int64)[:, ::2])
    assert copied.sent.expert_ids.is_contiguous()
    call.combine(copied)
    call.combine(call.dispatch(timeout_s=3.0), timeout_s=2.0)
    assert call.buffer._limit_s == 2.0
    call.combine(call.dispatch())
    assert call.buffer._limit_s == call.buffer.timeout_s
    call.fake.taken()
    table = ExpertTable(call.table.rank.clone(), call.table.slot.clone(), 3)
    call.combine(call.dispatch(table=table))
    call.combine(call.dispatch(expert_ids=call.ids.int()))
    call.pair()


def test_a_refusal_of_the_driver_is_an_error_and_ends_the_epoch(call: Call) -> None:
    call.fake.answer = 719
    with pytest.raises(RuntimeError, match=r"does not launch send_dispatch .* error 719"):
        call.dispatch()
    call.fake.answer = 0
    with pytest.raises(StaleEpoch):
        call.dispatch()


def test_halves_are_calls_too(call: Call) -> None:
    """Sent, and received later; what does not fit is refused as ever."""
    kernels = ["send_dispatch", "wait_dispatch", "index_rows"]
    kernels += ["send_combine", "wait_combine", "reduce"]
    for turn in range(5):
        call.fake.taken()
        before = call.fake.by_driver
        pending = call.buffer.begin_dispatch(call.x, call.ids, call.weights, call.table)
        assert call.fake.taken() == kernels[:1]
        with pytest.raises(CommError, match="dispatch before combine of the last"):
            call.buffer.begin_dispatch(call.x, call.ids, call.weights, call.table)
        received = pending()
        with pytest.raises(ValueError, match="y must be"):
            call.buffer.begin_combine(call.y[:5], received, out=call.out)
        assert call.fake.taken() == kernels[1:3]
        back = call.buffer.begin_combine(call.y, received, out=call.out)
        assert call.fake.taken() == kernels[3:4]
        assert back() is call.out
        assert call.fake.taken() == kernels[4:]
        assert turn < 3 or call.fake.by_driver == before + len(kernels)
    with pytest.raises(ValueError, match="x must be contiguous"):
        call.buffer.begin_dispatch(
            numbers(TOKENS, 128, dtype=BF16)[:, ::2], call.ids, call.weights, call.table
        )
    call.pair()


def test_a_phase_is_one_graph_whose_nodes_get_what_has_changed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with usual(monkeypatch, with_graphs=True) as call:
        fake = call.fake
        assert len(fake.alive) == 2
        fake.updated.clear()
        before = fake.graphs
        call.pair()
        assert (fake.graphs, fake.updated) == (before + 2, [])
        received = call.dispatch(x=call.x.clone())
        assert fake.updated == ["send_dispatch"]
        call.combine(received, out=call.out.clone())
        assert fake.updated == ["send_dispatch", *COMBINE_KERNELS]
        fake.captured = 1  # a graph cannot be launched into one that is captured
        call.pair()
        assert fake.graphs == before + 4
        fake.captured = 0
        call.dispatch(x=numbers(0, 64, dtype=BF16), **NOTHING)
        assert fake.updated[-1] == "send_dispatch"  # other numbers of programs, too
        call.buffer.close()
    del received
    gc.collect()
    assert CAPTURE_GUARD.settle(10.0)
    assert fake.alive == {}


def test_kinds_in_turns_are_not_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    with usual(monkeypatch, with_graphs=True) as call:
        for turn in range(10):
            call.combine(call.dispatch(expert_ids=call.ids.int() if turn % 2 else call.ids))
        assert len(call.fake.alive) == 4
        for rows in range(50):  # places for ever other rows
            y = numbers(rows + 64, 64, dtype=BF16)
            places = torch.zeros_like(call.buffer.exchange.position)
            call.combine(call.dispatch(), y=y, places=places)
        assert len(call.fake.alive) < 40
        call.pair()


def test_a_signal_during_the_call_ends_the_epoch(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    def struck(*arguments: Any) -> int:
        raise KeyboardInterrupt

    calls = call.buffer._calls[id(call.table), None, False]
    calls.dispatch = struck
    with pytest.raises(KeyboardInterrupt):
        call.dispatch()
    with pytest.raises(StaleEpoch):
        call.dispatch()


# ---- nixl_ep's interface ------------------------------------------------------------------------

SETUP = Setup(capacity=2, max_tokens=8, hidden=512)
PACKED = [*DISPATCH_KERNELS, "pack_rows"]
WEIGHED = ["share_weights", *COMBINE_KERNELS]


@dataclass
class NixlCall:
    """A buffer, and arguments that fit."""

    buffer: Buffer
    fake: FakeLaunches
    x: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    y: torch.Tensor
    out: torch.Tensor

    def dispatch(self, **other: Any) -> Any:
        taken = {"x": self.x, "topk_idx": self.ids, "use_fp8": False, "num_experts": 6}
        return self.buffer.dispatch(
            **{"num_max_dispatch_tokens_per_rank": SETUP.max_tokens} | taken | other
        )

    def combine(self, handle: Any, **other: Any) -> Any:
        taken = {"x": self.y, "topk_idx": self.ids, "topk_weights": self.weights, "out": self.out}
        return self.buffer.combine(**{"handle": handle} | taken | other)

    def pair(self, **other: Any) -> Any:
        self.fake.taken()
        before = self.fake.by_driver
        _, _, handle, _, _ = self.dispatch(**other)
        self.combine(handle)
        assert self.fake.taken() == PACKED + WEIGHED
        assert self.fake.by_driver == before + 6
        return handle


@pytest.fixture
def nixl(monkeypatch: pytest.MonkeyPatch) -> Iterator[NixlCall]:
    fake = FakeLaunches(monkeypatch, with_graphs=True)
    monkeypatch.setenv(VARIABLE, "cuda")
    with Ranks(SETUP) as ranks:
        buffer = ranks.add(0)
        monkeypatch.setattr(buffer.runtime, "_cuda", True)
        made = NixlCall(
            buffer,
            fake,
            numbers(TOKENS, 512, dtype=BF16),
            numbers(TOKENS, K, dtype=torch.int64),
            numbers(TOKENS, K),
            numbers(3, 16, 512, dtype=BF16),
            numbers(TOKENS, 512, dtype=BF16),
        )
        for _ in range(3):
            made.combine(made.dispatch()[2])
        made.pair()
        yield made


def test_nixl_ep_s_calls_take_turns_and_go_on_after_anything_else(nixl: NixlCall) -> None:
    handles = [nixl.pair() for _ in range(4)]
    assert len({handle[0].data_ptr() for handle in handles}) == 4  # all are kept here
    del handles[:]
    pointers = [nixl.pair()[0].data_ptr() for _ in range(4)]
    assert pointers[:2] == pointers[2:]
    _, _, handle, _, hook = nixl.dispatch(return_recv_hook=True)
    hook()
    _, _, hook = nixl.combine(handle, return_recv_hook=True)
    hook()
    stats = numbers(3, dtype=torch.int32)
    nixl.combine(nixl.dispatch(cumulative_local_expert_recv_stats=stats)[2])
    for _ in range(2):  # a set of tensors each
        nixl.combine(nixl.dispatch()[2])
    nixl.pair()
    nixl.dispatch()  # is not combined
    nixl.fake.taken()
    with pytest.raises(ValueError, match="9 tokens, but"):
        nixl.dispatch(x=numbers(9, 512, dtype=BF16), topk_idx=numbers(9, K, dtype=torch.int64))
    assert nixl.fake.taken() == []
    nixl.combine(nixl.dispatch()[2])
    nixl.pair()


NIXL_REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "x of another dtype": ({"x": numbers(TOKENS, 512)}, "x must be"),
    "x elsewhere": ({"x": numbers(TOKENS, 512, dtype=BF16).to("meta")}, "x is on meta"),
    "x too wide": ({"x": numbers(TOKENS, 528, dtype=BF16)}, "528 channels"),
    "too many tokens": (
        {"x": numbers(9, 512, dtype=BF16), "topk_idx": numbers(9, K, dtype=torch.int64)},
        "9 tokens, but num_max_dispatch_tokens_per_rank=8",
    ),
    "more tokens than it says": ({"num_max_dispatch_tokens_per_rank": 2}, "3 tokens, but"),
    "experts of another dtype": ({"topk_idx": numbers(TOKENS, K)}, "must be int32 or int64"),
    "experts of other tokens": ({"topk_idx": numbers(2, K, dtype=torch.int64)}, "topk_idx must be"),
    "experts of no rank": ({"num_experts": 7}, "num_experts is 7"),
    "both ways": ({"async_finish": True, "return_recv_hook": True}, "exclude each other"),
}


@pytest.mark.parametrize("why", NIXL_REFUSED)
def test_a_dispatch_of_nixl_ep_that_does_not_fit_is_refused_as_ever(
    nixl: NixlCall, why: str
) -> None:
    other, message = NIXL_REFUSED[why]
    with pytest.raises(ValueError, match=message):
        nixl.dispatch(**other)
    assert nixl.fake.taken() == []
    nixl.pair()


NIXL_COMBINE_REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "x of another dtype": ({"x": numbers(3, 16, 512)}, "x must be"),
    "x of other rows": ({"x": numbers(3, 8, 512, dtype=BF16)}, "x must be"),
    "experts of another dtype": ({"topk_idx": numbers(TOKENS, K)}, "topk_idx must be"),
    "weights of another dtype": ({"topk_weights": numbers(TOKENS, K, dtype=BF16)}, "topk_weights"),
    "weights of other tokens": ({"topk_weights": numbers(2, K)}, "topk_weights"),
    "out of another dtype": ({"out": numbers(TOKENS, 512)}, "out must be"),
    "out elsewhere": ({"out": numbers(TOKENS, 512, dtype=BF16).to("meta")}, "out must be"),
}


@pytest.mark.parametrize("why", NIXL_COMBINE_REFUSED)
def test_a_combine_of_nixl_ep_that_does_not_fit_is_refused_as_ever(
    nixl: NixlCall, why: str
) -> None:
    handle = nixl.dispatch()[2]
    nixl.fake.taken()
    other, message = NIXL_COMBINE_REFUSED[why]
    with pytest.raises(ValueError, match=message):
        nixl.combine(handle, **other)
    assert nixl.fake.taken() == []
    nixl.combine(handle)
    assert nixl.fake.taken() == WEIGHED


def test_a_handle_that_is_too_old_is_refused_and_a_destroyed_buffer_too(nixl: NixlCall) -> None:
    old = nixl.pair()
    for _ in range(2):
        nixl.pair()
    with pytest.raises(StaleEpoch, match="not of one of the last 2 dispatches"):
        nixl.combine(old)
    nixl.buffer.destroy()
    with pytest.raises(CommError, match="is destroyed"):
        nixl.dispatch()


def test_calls_follow_what_ranks_are_unmasked(nixl: NixlCall) -> None:
    run: Callable[..., Any] = nixl.dispatch
    recv_x = run(num_experts=None)[0]
    assert recv_x.shape[1] == SETUP.max_tokens
    recv_x = nixl.dispatch(num_experts=None)[0]
    assert recv_x.shape[1] == SETUP.max_tokens
    assert nixl.dispatch()[0].shape[1] == 2 * SETUP.max_tokens
