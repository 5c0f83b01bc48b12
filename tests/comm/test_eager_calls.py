"""Calls outside of graphs make no tensors and ask nothing of the device, once one was made.

The launches themselves are left out: what the host does between them is what is looked at.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.comm_ranks import random_sent, spec_of
from support.cuda_local import FEW, INTERPRETED, parts
from support.nixl_ep_local import Ranks, Setup, make_input
from torch.utils._python_dispatch import TorchDispatchMode

from flexpert.comm.cuda.cuda_buffer import CudaBuffer
from flexpert.comm.cuda.kernel_launch import KernelLaunch
from flexpert.compat.nixl_ep.device_exchange import VARIABLE

if not INTERPRETED:
    pytest.skip("the tensors of these tests lie in the host's memory", allow_module_level=True)

SPEC = spec_of(1, dtype=torch.float32, max_tokens=4, hidden=40)
SETUP = Setup(capacity=2, max_tokens=4, hidden=512)


class Operations(TorchDispatchMode):
    """The operations of torch that run inside of it, and how many kernels are launched."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.names: list[str] = []
        self.launches = 0
        self._patch = monkeypatch

    def __enter__(self) -> Any:
        def launch(launched: KernelLaunch, programs: int, *changing: Any) -> None:
            self.launches += 1

        self._patch.setattr(KernelLaunch, "__call__", launch)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patch.undo()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def operations(monkeypatch: pytest.MonkeyPatch, call: Callable[[], object]) -> list[str]:
    with Operations(monkeypatch) as seen:
        call()
    assert seen.launches >= 4
    return seen.names


def test_a_buffer_s_calls_make_no_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = CudaBuffer(0, SPEC, device=torch.device("cpu"), tuning=FEW)
    arguments = parts(random_sent(SPEC, (0,), 4)[0])
    tokens = arguments[0].shape[0]
    y, out = torch.zeros(buffer.most_rows, SPEC.hidden), torch.zeros(tokens, SPEC.hidden)

    def exchange() -> None:
        received = buffer.dispatch(*arguments)
        buffer.combine(y, received, out=out)

    exchange()
    assert operations(monkeypatch, exchange) == []
    buffer.close()


@pytest.mark.parametrize("fp8", [False, True])
def test_nixl_ep_s_calls_make_no_tensors(monkeypatch: pytest.MonkeyPatch, fp8: bool) -> None:
    monkeypatch.setenv(VARIABLE, "cuda")
    with Ranks(SETUP) as ranks:
        buffer = ranks.add(0)
        mine = make_input(SETUP, 0, 18)
        tokens, handles = mine.x.shape[0], list[Any]()
        y = torch.zeros(3, 2 * SETUP.max_tokens, SETUP.hidden, dtype=torch.bfloat16)
        out = torch.zeros(tokens, SETUP.hidden, dtype=torch.bfloat16)

        def exchange() -> None:
            recv_x, _, handle, _, _ = buffer.dispatch(
                mine.x, mine.experts, SETUP.max_tokens, 2 * 3, use_fp8=fp8
            )
            buffer.combine(y, mine.experts, mine.weights, handle, out=out)
            handles[:] = [recv_x, handle]

        for _ in range(3):
            exchange()
        first = handles[0]
        assert operations(monkeypatch, exchange) == []
        assert operations(monkeypatch, exchange) == []
        again = handles[0]
        first, again = (x[0] if fp8 else x for x in (first, again))
        assert first.data_ptr() == again.data_ptr()  # there are two sets, used in turns


def test_only_a_handle_that_somebody_has_kept_costs_a_tensor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(VARIABLE, "cuda")
    with Ranks(SETUP) as ranks:
        buffer = ranks.add(0)
        mine = make_input(SETUP, 0, 18)
        handles = [
            buffer.dispatch(mine.x, mine.experts, SETUP.max_tokens, 6, use_fp8=False)[2]
            for _ in range(3)
        ]
        del handles[1:]
        assert handles[0][0].data_ptr() not in {
            done.returned.src_info.data_ptr()
            for done in buffer._exchange._kept  # type: ignore[union-attr]
        }


def test_a_dispatch_that_is_refused_takes_nothing_of_earlier_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(VARIABLE, "cuda")
    with Ranks(SETUP) as ranks:
        buffer = ranks.add(0)
        mine = make_input(SETUP, 0, 18)

        def dispatch(experts: torch.Tensor) -> int:
            recv_x = buffer.dispatch(mine.x, experts, SETUP.max_tokens, 6, use_fp8=False)[0]
            assert isinstance(recv_x, torch.Tensor)
            return recv_x.data_ptr()

        first, second = (dispatch(mine.experts) for _ in range(2))
        with pytest.raises(ValueError, match="must be int32 or int64"):
            dispatch(mine.experts.short())
        assert first == dispatch(mine.experts)
        assert second == dispatch(mine.experts)
