"""Each backend can do what its capabilities say, and refuses the rest: one rank, alone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from support.cuda_local import FEW, INTERPRETED
from support.nixl_backend_local import PACKAGE, SLOTS, SPEC

from flexpert.comm import Buffer, CommError, ExpertTable, Received, make_buffer
from flexpert.comm.cuda.cuda_buffer import CudaBuffer
from flexpert.comm.nixl_ep.nixl_ep_buffer import NixlEpBuffer

if not INTERPRETED:
    pytest.skip("the tensors of these tests lie in the host's memory", allow_module_level=True)

CPU = torch.device("cpu")
TOKENS = 3
TABLE = ExpertTable(torch.tensor([0, -1], dtype=torch.int32), torch.zeros(2, dtype=torch.int32), 1)


@pytest.fixture(params=["host", "cuda", "nixl_ep"])
def buffer(request: pytest.FixtureRequest) -> Iterator[Buffer]:
    made: Buffer
    if request.param == "host":
        made = make_buffer(0, SPEC)
    elif request.param == "cuda":
        made = CudaBuffer(0, SPEC, device=CPU, tuning=FEW)
    else:
        made = NixlEpBuffer(0, SPEC, slots=SLOTS, device=CPU, package=PACKAGE)
    made.set_active([0], 1)
    made.barrier(timeout_s=1.0)
    yield made
    made.close()


def dispatch(buffer: Buffer, expert: int, x: torch.Tensor | None = None) -> Received:
    if x is None:
        x = torch.ones((TOKENS, SPEC.hidden), dtype=SPEC.dtype)
    ids = torch.full((TOKENS, 1), expert, dtype=torch.int32)
    return buffer.dispatch(x, ids, torch.full((TOKENS, 1), 0.5), TABLE)


def test_grow(buffer: Buffer) -> None:
    more = SPEC.capacity * 2
    if buffer.capabilities.grow:
        buffer.grow(more)
        assert buffer.spec.capacity == more
    else:
        with pytest.raises(ValueError, match="capacity"):
            buffer.grow(more)


def test_reductions(buffer: Buffer) -> None:
    for reduce in ("home", "rank"):
        received = dispatch(buffer, 0)
        y = buffer.combine_input(received).fill_(2.0)
        if reduce in buffer.capabilities.reductions:
            assert bool((buffer.combine(y, received, reduce=reduce) == 1.0).all())
        else:
            with pytest.raises(ValueError, match="reduce"):
                buffer.combine(y, received, reduce=reduce)
            buffer.combine(y, received)


def test_byte_rows(buffer: Buffer) -> None:
    x = torch.arange(TOKENS * 16, dtype=torch.uint8).view(TOKENS, 16)
    if buffer.capabilities.byte_rows:
        assert torch.equal(dispatch(buffer, 0, x).x, x)
    else:
        with pytest.raises(ValueError, match="uint8"):
            dispatch(buffer, 0, x)


def test_row_weights(buffer: Buffer) -> None:
    received = dispatch(buffer, 0)
    if buffer.capabilities.row_weights:
        assert received.weights.tolist() == [0.5] * TOKENS
    else:
        with pytest.raises(CommError, match="weights"):
            _ = received.weights


def test_owners_checked(buffer: Buffer) -> None:
    if buffer.capabilities.owners_checked:
        with pytest.raises(ValueError, match="owned by nobody"):
            dispatch(buffer, 1)
    else:
        received = dispatch(buffer, 1)
        buffer.combine(buffer.combine_input(received), received)
        missing = buffer.missing_results(received)
        assert missing is not None
        assert missing.weight.tolist() == [0.5] * TOKENS


def test_epoch_needs_vote(buffer: Buffer) -> None:
    buffer.set_active([0], 2)
    if buffer.capabilities.epoch_needs_vote:
        with pytest.raises(CommError, match="before the first vote"):
            dispatch(buffer, 0)
    else:
        assert len(dispatch(buffer, 0).x) == TOKENS


def test_vote_bytes(buffer: Buffer) -> None:
    most = b"v" * buffer.capabilities.vote_bytes
    with pytest.raises(ValueError, match="a vote holds"):
        buffer.post_vote(most + b"v")
    assert buffer.barrier(most, timeout_s=1.0) == {0: most}


def test_traffic_counted(buffer: Buffer) -> None:
    received = dispatch(buffer, 0)
    buffer.combine(buffer.combine_input(received), received)
    counted = buffer.statistics()
    assert counted.exchanges == 1
    waits = sum(counted.combine_wait_ns.values()) + sum(counted.dispatch_wait_ns.values())
    assert waits == 0 or buffer.capabilities.traffic_counted
