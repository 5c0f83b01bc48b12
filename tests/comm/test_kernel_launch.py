"""Prepared launches hand the driver what the kernel takes; the driver here is a function of Python.

What only a GPU shows, that a kernel so launched computes the same, is in tests/comm/test_cuda_*.py
there; that Triton's kernels take arguments as is expected here, in test_cuda_compile.py.
"""

from __future__ import annotations

import ctypes
import logging
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: pip install flexpert[cuda]")

from flexpert.comm.cuda import kernel_launch
from flexpert.comm.cuda._launches import Kernel
from flexpert.comm.cuda.kernel_launch import Driver, KernelLaunch, Unsuited, prepare

CONTEXT, FUNCTION, STREAM = 0x40, 0x77, 0x99
PTX = """.version 8.7
.visible .entry scale(
	.param .u64 .ptr .global .align 1 scale_param_0,
	.param .u64 .ptr .global .align 1 scale_param_1,
	.param .u32 scale_param_2,
	.param .u64 scale_param_3,
	.param .u64 .ptr .global .align 1 scale_param_4,
	.param .u64 .ptr .global .align 1 scale_param_5
)
.reqntid 128
"""
SIZES = (8, 8, 4, 8, 8, 8)  # Triton adds two addresses

_LAUNCH = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, *[ctypes.c_uint] * 7, ctypes.c_void_p,
    ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p,
)  # fmt: skip
_GET = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_void_p))
_SET = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)
_CURRENT = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_int32, ctypes.c_int32, ctypes.POINTER(ctypes.c_void_p)
)


@dataclass
class FakeDriver:
    """Keeps what it is called with. context: of the calling thread. answer: of launches."""

    context: int = CONTEXT
    answer: int = 0
    launches: list[tuple[Any, ...]] = field(default_factory=list)
    contexts: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._functions = (
            _LAUNCH(self._launch), _GET(self._get), _SET(self._set), _CURRENT(self._stream),
        )  # fmt: skip
        addresses: Any = tuple(ctypes.cast(f, ctypes.c_void_p).value or 0 for f in self._functions)
        self.addresses = Driver(addresses, (), (0, 0))

    def _launch(self, function: int, *rest: Any) -> int:
        *shape, stream, arguments, extra = rest
        assert extra is None
        kinds = {4: ctypes.c_int32, 8: ctypes.c_uint64}
        values = [kinds[n].from_address(arguments[i]).value for i, n in enumerate(SIZES)]
        self.launches.append((function, tuple(shape), stream, values, self.context))
        return self.answer

    def _get(self, context: Any) -> int:
        context[0] = self.context
        return 0

    def _stream(self, device: int, index: int, stream: Any) -> int:
        stream[0] = STREAM
        return 0

    def _set(self, context: int | None) -> int:
        self.context = context or 0
        self.contexts.append(self.context)
        return 0


KERNEL = SimpleNamespace(
    __name__="scale",
    arg_names=["x", "table", "tokens", "window", "WIDTH"],
    params=[
        SimpleNamespace(name=name, do_not_specialize=name == "tokens")
        for name in ("x", "table", "tokens", "window", "WIDTH")
    ],
)
SIGNATURE = {"x": "*bf16", "table": "*i64", "tokens": "i32", "window": "i64", "WIDTH": "constexpr"}
METADATA = SimpleNamespace(
    num_warps=4, num_ctas=1, shared=1024, global_scratch_size=0, profile_scratch_size=0,
    launch_cooperative_grid=False, launch_pdl=False,
)  # fmt: skip
TABLE = torch.zeros(4, dtype=torch.int64)
WINDOW = 2**47 + 256


def compiled(**metadata: Any) -> SimpleNamespace:
    return SimpleNamespace(
        src=SimpleNamespace(signature=dict(SIGNATURE)),
        metadata=SimpleNamespace(**vars(METADATA) | metadata),
        asm={"ptx": PTX},
        function=FUNCTION,
    )


def prepared(driver: FakeDriver, made: Any, changing: tuple[str, ...] = ("x", "tokens")) -> Kernel:
    arguments = {"x": torch.zeros(8), "table": TABLE, "tokens": 1, "window": WINDOW, "WIDTH": 8}
    return prepare(KERNEL, made, arguments, changing, driver.addresses)


@pytest.fixture
def driver() -> FakeDriver:
    return FakeDriver()


class Launch(KernelLaunch):
    """Counts the launches that are left to Triton."""

    by_triton = 0

    def _launch_by_triton(self, programs: int, changing: tuple[Any, ...]) -> None:
        self.by_triton += 1


def launch_of(driver: FakeDriver) -> Launch:
    fixed = {"table": TABLE, "window": WINDOW, "WIDTH": 8}
    launch = Launch(KERNEL, torch.device("cpu"), fixed)
    launch._prepared = prepared(driver, compiled())
    launch._start = launch._prepared.launch
    return launch


def test_the_driver_gets_the_arguments_in_the_kernels_order(driver: FakeDriver) -> None:
    launch = launch_of(driver)
    for tokens in (3, 65535):
        x = torch.zeros(8)
        launch(tokens + 1, x, tokens)
        function, shape, stream, values, _ = driver.launches.pop()
        assert (function, stream) == (FUNCTION, STREAM)
        assert shape == (tokens + 1, 1, 1, 128, 1, 1, 1024)
        assert values == [x.data_ptr(), TABLE.data_ptr(), tokens, WINDOW, 0, 0]
    assert launch.by_triton == 0


def test_a_tensor_that_is_not_aligned_is_left_to_triton(driver: FakeDriver) -> None:
    launch = launch_of(driver)
    launch(1, torch.zeros(9)[1:], 1)
    assert launch.by_triton == 1
    assert driver.launches == []
    launch(1, torch.zeros(9), 1)
    assert launch.by_triton == 1


@pytest.mark.parametrize("elsewhere", [0, 0x50], ids=["no context", "another device"])
def test_it_launches_where_the_kernel_is_and_leaves_the_thread_as_it_was(
    driver: FakeDriver, elsewhere: int
) -> None:
    launch = launch_of(driver)
    driver.context = elsewhere
    launch(1, torch.zeros(8), 1)
    assert driver.launches[0][-1] == CONTEXT
    assert driver.contexts == [CONTEXT, elsewhere]


def test_what_the_driver_refuses_is_an_error(driver: FakeDriver) -> None:
    launch = launch_of(driver)
    driver.answer = 719
    with pytest.raises(RuntimeError, match="does not launch scale on device -1: error 719"):
        launch(1, torch.zeros(8), 1)


def test_a_kernel_that_is_not_as_expected_is_refused(driver: FakeDriver) -> None:
    for metadata in (
        {"num_ctas": 2},
        {"global_scratch_size": 8},
        {"launch_cooperative_grid": True},
        {"launch_pdl": True},
    ):
        with pytest.raises(Unsuited, match="clusters"):
            prepared(driver, compiled(**metadata))
    missing = compiled()
    del missing.metadata.shared
    with pytest.raises(Unsuited, match="shared"):
        prepared(driver, missing)
    more = compiled()
    more.asm["ptx"] = PTX.replace("scale_param_5", "scale_param_5,\n\t.param .u64 scale_param_6")
    with pytest.raises(Unsuited, match=r"it takes \(8, 8, 4, 8, 8, 8, 8\) bytes"):
        prepared(driver, more)
    wider = compiled()
    wider.src.signature["tokens"] = "i64"
    with pytest.raises(Unsuited, match="bytes"):
        prepared(driver, wider)
    with pytest.raises(Unsuited, match=r"certain values of \['window'\]"):
        prepared(driver, compiled(), ("x", "tokens", "window"))
    with pytest.raises(Unsuited, match="no tensors with numbers after them"):
        prepared(driver, compiled(), ("tokens", "x"))


def test_that_triton_launches_all_is_said_once(
    driver: FakeDriver, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kernel_launch._logged().clear()
    monkeypatch.setattr(kernel_launch, "cuda_driver", lambda: driver.addresses)
    with caplog.at_level(logging.WARNING, "flexpert.comm"):
        for _ in range(2):
            launch = Launch(KERNEL, torch.device("cpu"), {"WIDTH": 8})
            launch._prepare(compiled(num_ctas=2), {})
            assert launch._prepared is None
    assert len(caplog.messages) == 1
    assert "launched by Triton itself" in caplog.text
