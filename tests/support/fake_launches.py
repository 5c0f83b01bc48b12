"""Kernels that were prepared for a driver which only writes down what it is to launch, so that the
calls of C in which exchanges are launched can be looked at without a GPU."""

from __future__ import annotations

import ctypes
import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flexpert.comm.cuda.cuda_buffer import CudaBuffer
from flexpert.comm.cuda.kernel_launch import Driver, KernelLaunch, argument_sizes, prepare

CONTEXT = 0x40

_LAUNCH = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, *[ctypes.c_uint] * 7, *[ctypes.c_void_p] * 3
)
_GET = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_void_p))
_SET = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)
_POINTER = ctypes.c_void_p
_OF_POINTERS = tuple(ctypes.CFUNCTYPE(ctypes.c_int, *[_POINTER] * n) for n in range(6))
_STREAM = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int32, ctypes.c_int32, ctypes.c_void_p)

_KEPT: list[Any] = []  # functions that destroy graphs, which finalisers call when tests are over


class FakeLaunches:
    """names: of the kernels that were launched, by Triton (prepared then) or by the driver.
    by_driver: how many were launched by the driver; graphs: in so many graphs; updated: nodes that
    were given other arguments. answer: of the driver. captured: what it says of the stream. alive:
    graphs that were not given back."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, with_graphs: bool = False) -> None:
        self.names: list[str] = []
        self.by_driver = self.answer = self.graphs = self.captured = 0
        self.updated: list[str] = []
        self.alive: dict[int, list[int]] = {}
        self._numbers = itertools.count(1)
        self._nodes: dict[int, str] = {}
        self._kernels: list[str] = []
        functions: Any = (
            _LAUNCH(self._launch), _GET(self._get), _SET(lambda context: 0),
            _STREAM(lambda device, index, stream: 0),
        )  # fmt: skip
        self._functions = functions
        launching: Any = tuple(ctypes.cast(f, ctypes.c_void_p).value or 0 for f in functions)
        made: Any = (
            _OF_POINTERS[2](self._create), _OF_POINTERS[5](self._add), _OF_POINTERS[3](self._copy),
            _OF_POINTERS[3](self._update), _OF_POINTERS[2](self._launch_graph),
            _OF_POINTERS[2](self._is_captured),
            _OF_POINTERS[1](lambda executable: 0), _OF_POINTERS[1](self._destroy),
        )  # fmt: skip
        _KEPT.append(made)
        *graphs, destroy, and_graph = (ctypes.cast(f, _POINTER).value or 0 for f in made)
        self._driver = Driver(launching, tuple(graphs) if with_graphs else (), (destroy, and_graph))
        fake = self

        def by_triton(launch: KernelLaunch, programs: int, changing: tuple[Any, ...]) -> None:
            fake._by_triton(launch, changing)

        monkeypatch.setattr(KernelLaunch, "_launch_by_triton", by_triton)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        monkeypatch.setattr(CudaBuffer, "_synchronize", lambda buffer: None)

    def taken(self) -> list[str]:
        """Names of what was launched since this was called last."""
        names, self.names = self.names, []
        return names

    def _launch(self, function: int, *rest: Any) -> int:
        self.names.append(self._kernels[function - 1])
        self.by_driver += 1
        return self.answer

    def _create(self, graph: int, flags: int) -> int:
        number = next(self._numbers)
        self.alive[number] = []
        _POINTER.from_address(graph).value = number
        return 0

    def _add(self, node: int, graph: int, after: int, many: int, of: int) -> int:
        nodes = self.alive[graph]
        assert (many or 0) == bool(nodes)
        number = len(self._nodes) + 1
        self._nodes[number] = self._kernel_at(of)
        nodes.append(number)
        _POINTER.from_address(node).value = number
        return 0

    def _copy(self, executable: int, graph: int, flags: int) -> int:
        _POINTER.from_address(executable).value = graph
        return 0

    def _update(self, executable: int, node: int, to: int) -> int:
        assert node in self.alive[executable]
        assert self._nodes[node] == self._kernel_at(to)
        self.updated.append(self._nodes[node])
        return 0

    def _launch_graph(self, executable: int, stream: int) -> int:
        self.graphs += 1
        nodes = self.alive[executable]
        self.names += [self._nodes[node] for node in nodes]
        self.by_driver += len(nodes)
        return self.answer

    def _is_captured(self, stream: int, status: int) -> int:
        ctypes.c_int.from_address(status).value = self.captured
        return 0

    def _destroy(self, graph: int) -> int:
        del self.alive[graph]
        return 0

    def _kernel_at(self, node: int) -> str:
        return self._kernels[(_POINTER.from_address(node).value or 0) - 1]

    def _get(self, context: Any) -> int:
        context[0] = CONTEXT
        return 0

    def _by_triton(self, launch: KernelLaunch, changing: tuple[Any, ...]) -> None:
        kernel = launch._kernel
        arguments = dict(zip(launch.changing, changing, strict=True)) | dict(launch._fixed)
        signature = {name: _kind(name, arguments[name]) for name in kernel.arg_names}
        sizes = argument_sizes(kernel.arg_names, signature)
        self.names.append(kernel.__name__)
        self._kernels.append(kernel.__name__)
        compiled = SimpleNamespace(
            src=SimpleNamespace(signature=signature),
            metadata=SimpleNamespace(
                num_warps=4, num_ctas=1, shared=0, global_scratch_size=0, profile_scratch_size=0,
                launch_cooperative_grid=False, launch_pdl=False,
            ),
            asm={"ptx": f".entry k({','.join(f'.param .u{8 * size} p' for size in sizes)})"},
            function=len(self._kernels),
        )  # fmt: skip
        seen = SimpleNamespace(
            __name__=kernel.__name__,
            arg_names=kernel.arg_names,
            params=[SimpleNamespace(name=n, do_not_specialize=True) for n in kernel.arg_names],
        )
        launch._prepared = prepare(seen, compiled, arguments, launch.changing, self._driver)
        launch._start = launch._prepared.launch
        launch.driver = self._driver


def _kind(name: str, argument: Any) -> str:
    if name.isupper():
        return "constexpr"
    if isinstance(argument, torch.Tensor):
        return f"*{argument.dtype}"
    return "i64" if abs(int(argument)) > 2**31 else "i32"
