"""Programs that set torch's default dtype or device exchange as others do."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
import torch
from support.comm_local import same_bits
from support.comm_ranks import apply_experts, random_sent, spec_of
from support.cuda_local import FEW, INTERPRETED
from support.nixl_ep_local import (
    Ranks,
    Setup,
    check_combined,
    check_dispatched,
    factor,
    make_input,
)

import flexpert
from flexpert.comm import Buffer as CommBuffer
from flexpert.comm.buffer import Reduce, Scales
from flexpert.comm.cuda.cuda_buffer import CudaBuffer
from flexpert.comm.host.host_buffer import HostBuffer
from flexpert.comm.quant import dequantise, quantise
from flexpert.comm.routing import expected_rows, expected_sums
from flexpert.compat.nixl_ep.device_exchange import VARIABLE

Defaults = Callable[[], AbstractContextManager[None]]
SPEC = spec_of(2, dtype=torch.float32, max_tokens=4, hidden=512)
SETUP = Setup(capacity=2, max_tokens=4, hidden=512)


@pytest.fixture(params=["bfloat16", "float64", "meta"])
def defaults(request: pytest.FixtureRequest) -> Defaults:
    """A program's settings; what a test compares with is made without them."""

    @contextmanager
    def set_() -> Iterator[None]:
        dtype = torch.get_default_dtype()
        try:
            if request.param == "meta":
                torch.set_default_device("meta")
            else:
                torch.set_default_dtype(getattr(torch, request.param))
            yield
        finally:
            torch.set_default_device(None)
            torch.set_default_dtype(dtype)

    return set_


def host(rank: int) -> CommBuffer:
    return HostBuffer(rank, SPEC, timeout_s=20.0, on_timeout="mask")


def cuda(rank: int) -> CommBuffer:
    return CudaBuffer(
        rank, SPEC, timeout_s=20.0, on_timeout="mask", device=torch.device("cpu"), tuning=FEW
    )


@contextmanager
def connected(make: Callable[[int], CommBuffer]) -> Iterator[dict[int, CommBuffer]]:
    buffers = {rank: make(rank) for rank in (0, 1)}
    try:
        addresses = {rank: buffer.address for rank, buffer in buffers.items()}
        for buffer in buffers.values():
            buffer.connect(addresses)
            buffer.set_active(buffers, 1)
        yield buffers
    finally:
        for buffer in buffers.values():
            buffer.close()


KINDS = [pytest.param(host, id="host")]
if INTERPRETED:
    KINDS.append(pytest.param(cuda, id="cuda"))


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize(
    ("reduce", "fp8"), [("rank", None), ("home", None), ("home", "float32"), ("rank", "ue8m0")]
)
def test_rows_and_sums_of_a_buffer(
    defaults: Defaults, make: Callable[[int], CommBuffer], reduce: Reduce, fp8: Scales | None
) -> None:
    sent = random_sent(SPEC, (0, 1), 4)
    y = {rank: apply_experts(*expected_rows(sent, rank)[:2]) for rank in sent}
    with defaults(), connected(make) as buffers:
        dispatches = {
            r: buffers[r].begin_dispatch(s.x, s.expert_ids, s.weights, s.table, fp8=fp8)
            for r, s in sent.items()
        }
        got = {rank: hook() for rank, hook in dispatches.items()}
        told = {r: (g.x, g.scales, g.offsets, g.weights, g.token) for r, g in got.items()}
        for rank, received in got.items():
            buffers[rank].combine_input(received).copy_(y[rank])
        combines = {
            r: buffers[r].begin_combine(buffers[r].combine_input(g), g, reduce=reduce)
            for r, g in got.items()
        }
        sums = {rank: hook() for rank, hook in combines.items()}
        missing = {rank: buffers[rank].missing_results(received) for rank, received in got.items()}
    assert missing == {0: None, 1: None}
    for rank in sent:
        x, offsets, weights = expected_rows(sent, rank)
        payload, scales, *_ = told[rank]
        assert torch.equal(told[rank][2], offsets)
        assert same_bits(told[rank][3], weights)
        assert told[rank][4].device == offsets.device
        if fp8 is None:
            assert same_bits(payload, x)
        else:
            q, desired = quantise(x, fp8)
            assert scales is not None
            assert torch.equal(payload.view(torch.uint8), q.view(torch.uint8))
            assert torch.equal(scales, desired)
        assert same_bits(sums[rank], expected_sums(sent, y, rank, reduce))


@pytest.mark.parametrize("make", KINDS)
def test_what_is_missing_when_a_rank_is_gone(
    defaults: Defaults, make: Callable[[int], CommBuffer]
) -> None:
    s = random_sent(SPEC, (0, 1), 4)[0]
    away = (s.table.rank.long()[s.expert_ids.long().clamp(min=0)] == 1) & (s.expert_ids >= 0)
    assert bool(away.any())
    with defaults(), connected(make) as buffers:
        buffers[0].mask([1])
        got = buffers[0].dispatch(s.x, s.expert_ids, s.weights, s.table)
        buffers[0].combine(buffers[0].combine_input(got), got)
        missing = buffers[0].missing_results(got)
    assert missing is not None
    assert torch.equal(missing.choices, away)
    torch.testing.assert_close(missing.weight, (s.weights * away).sum(1))


@pytest.mark.parametrize("fp8", ["float32", "power2", "ue8m0"])
def test_fp8_on_the_host(defaults: Defaults, fp8: Scales) -> None:
    x = torch.randn(5, 1024, dtype=torch.bfloat16)
    desired = quantise(x, fp8)
    with defaults():
        found = quantise(x, fp8)
        back = dequantise(*found, torch.float32)
    for a, b in zip(found, desired, strict=True):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))
    assert torch.equal(back, dequantise(*desired, torch.float32))


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("device", ["cpu", *(["cuda"] if INTERPRETED else [])])
def test_nixl_ep_s_interface(
    defaults: Defaults, monkeypatch: pytest.MonkeyPatch, device: str, fp8: bool
) -> None:
    monkeypatch.setenv(VARIABLE, device)
    sent = {rank: make_input(SETUP, rank, 18) for rank in (0, 1)}
    factors = {
        rank: torch.tensor([factor(3 * rank + e) for e in range(3)]).bfloat16()[:, None, None]
        for rank in sent
    }
    stats = {rank: torch.zeros(3, dtype=torch.int32) for rank in sent}
    status = torch.zeros(2, dtype=torch.int32)
    with defaults(), Ranks(SETUP) as ranks:
        for rank in sent:
            ranks.add(rank)
        ranks.each(sent, lambda b: b.connect_ranks([0, 1]))
        ranks.each(sent, lambda b: b.barrier())  # on a CPU, links come up in both threads
        got = {
            rank: ranks.buffers[rank].dispatch(
                mine.x,
                mine.experts,
                SETUP.max_tokens,
                use_fp8=fp8,
                cumulative_local_expert_recv_stats=stats[rank],
                return_recv_hook=True,
            )
            for rank, mine in sent.items()
        }
        for *_, hook in got.values():
            hook()
        rows = {r: restored(g[0]) if fp8 else g[0] for r, g in got.items()}
        combined = {
            rank: ranks.buffers[rank].combine(
                rows[rank] * factors[rank],
                mine.experts,
                mine.weights,
                got[rank][2],
                return_recv_hook=True,
            )
            for rank, mine in sent.items()
        }
        for _, _, hook in combined.values():
            assert hook is not None
            hook()
        ranks.buffers[0].query_mask_buffer(status)
    assert status.tolist() == [0, 0]
    for rank, mine in sent.items():
        _, count, handle, _, _ = got[rank]
        if not fp8:
            check_dispatched(SETUP, sent, rank, rows[rank], count, handle)
        assert stats[rank].tolist() == count.tolist()
        check_combined(SETUP, mine, combined[rank][0], up={0, 1}, error=2**-4 if fp8 else 2**-8)


def restored(recv_x: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """[experts, rows, hidden] bfloat16 from e4m3 and float32 scales."""
    values, scales = recv_x
    blocks = values.float().unflatten(2, (-1, 128)) * scales.unsqueeze(3)
    return blocks.flatten(2).to(torch.bfloat16)


# ---- the source ---------------------------------------------------------------------------------

PACKAGES = ("comm", "compat", "kernels", "moe")
# that make a tensor where torch's defaults say; as_tensor and asarray keep a dtype that there is
WITH_DTYPE = {
    "arange", "empty", "empty_permuted", "empty_strided", "eye", "full", "linspace", "logspace",
    "ones", "rand", "randn", "randint", "randperm", "range", "scalar_tensor", "tensor",
    "tril_indices", "triu_indices", "zeros",
}  # fmt: skip
WITH_DEVICE = WITH_DTYPE | {"as_tensor", "asarray", "Generator"}
LEGACY = {"Tensor", "FloatTensor", "DoubleTensor", "HalfTensor", "IntTensor", "LongTensor"}


def unsaid(source: str) -> list[tuple[int, str]]:
    """Calls that leave dtype or device to torch's defaults: (line, what is missing)."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        base, name = node.func.value, node.func.attr
        if not isinstance(base, ast.Name) or base.id != "torch":
            continue
        said = {keyword.arg for keyword in node.keywords}
        needed = {"dtype": WITH_DTYPE, "device": WITH_DEVICE}
        missing = {what for what, names in needed.items() if name in names}
        found += [(node.lineno, f"torch.{name} without {what}=") for what in missing - said]
        if name in LEGACY:
            found.append((node.lineno, f"torch.{name} takes the default device"))
    return sorted(found)


def test_calls_that_leave_something_unsaid_are_found() -> None:
    assert unsaid("torch.zeros(3)\ntorch.full((2,), 1, dtype=torch.int32)") == [
        (1, "torch.zeros without device="),
        (1, "torch.zeros without dtype="),
        (2, "torch.full without device="),
    ]
    assert unsaid("torch.as_tensor(x, device=d)\ntorch.zeros_like(x)\nx.new_zeros(3)") == []
    assert unsaid("torch.Tensor([1.0])") == [(1, "torch.Tensor takes the default device")]


def test_no_tensor_is_made_where_torch_s_defaults_say() -> None:
    root = Path(flexpert.__file__).parent
    files = [path for package in PACKAGES for path in sorted((root / package).rglob("*.py"))]
    assert len(files) > 50
    found = [
        f"{path.relative_to(root)}:{line}: {what}"
        for path in files
        for line, what in unsaid(path.read_text(encoding="utf-8"))
    ]
    assert not found, "\n".join(found)
