"""Launches of one kernel that differ in a few arguments, at little more than the driver's cost.

Triton's own launcher looks at every argument of every launch, for the kernel that was compiled for
its like. Here that is done by the first launch: what it compiled, and where each argument belongs,
is kept, and later launches write the arguments that change and call the driver (launches.c).

Where the kernel is not as expected (Triton's interpreter, another version of Triton, a part of this
package that was not compiled), every launch is Triton's own, and the log says so once.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import re
import struct
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final, NamedTuple

import torch

from flexpert.comm.interpreter import INTERPRETED

try:
    from flexpert.comm.cuda._launches import ffi, lib
except ImportError:  # a checkout that was not installed again
    ffi = lib = None

_log = logging.getLogger("flexpert.comm")

_ALIGNMENT: Final = 16
_WARP: Final = 32
_WORD: Final = struct.calcsize("=q")
_UNALIGNED: Final = -1  # of fx_start
_SCRATCH: Final = (8, 8)
"""Bytes of the arguments that Triton adds: of memory for scratch and profiling."""
_ENTRY: Final = re.compile(r"\.entry\s+\S+\s*\(([^)]*)\)")
_PARAMETER: Final = re.compile(r"\.param\s+(?:\.align\s+\d+\s+)?\.[usbf](\d+)")


class Unsuited(Exception):  # noqa: N818 - reads as what it says
    """Why a kernel cannot be launched in this way."""


class Driver(NamedTuple):
    """Addresses of cuLaunchKernel, cuCtxGetCurrent and cuCtxSetCurrent."""

    launch: int
    get_context: int
    set_context: int


@functools.cache
def cuda_driver() -> Driver:
    """Of the CUDA driver. Raises: Unsuited: there is none."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
        functions = cuda.cuLaunchKernel, cuda.cuCtxGetCurrent, cuda.cuCtxSetCurrent
    except (OSError, AttributeError) as error:
        raise Unsuited(str(error)) from None
    return Driver(*(ctypes.cast(f, ctypes.c_void_p).value or 0 for f in functions))


def _current_context(driver: Driver) -> int:
    """Of this thread."""
    context = ctypes.c_void_p()
    get = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)(driver.get_context)
    if get(ctypes.byref(context)) or not context.value:
        raise Unsuited("the CUDA driver names no context")
    return context.value


class PreparedKernel:
    """A compiled kernel with its arguments, all but those that change.

    Args:
        kernel: the function, as `triton.jit` made it.
        compiled: what a launch of it returned.
        arguments: of that launch, by name, constants included.
        changing: names of those that other launches have others of, tensors first, all aligned.

    Raises: Unsuited: it is not as expected; says why.
    """

    def __init__(
        self,
        kernel: Any,
        compiled: Any,
        arguments: Mapping[str, Any],
        changing: tuple[str, ...],
        driver: Driver,
    ) -> None:
        if lib is None:
            raise Unsuited("flexpert.comm.cuda._launches is not compiled: install flexpert again")
        try:
            signature, metadata = dict(compiled.src.signature), compiled.metadata
            threads, shared = _WARP * metadata.num_warps, metadata.shared
            extras = (
                metadata.num_ctas != 1,
                metadata.global_scratch_size,
                metadata.profile_scratch_size,
                metadata.launch_cooperative_grid,
                metadata.launch_pdl,
            )
            fixed_ints = {p.name for p in kernel.params if not p.do_not_specialize}
            sizes, function = parameter_sizes(compiled.asm["ptx"]), int(compiled.function)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise Unsuited(f"{type(error).__name__}: {error}") from None
        if any(extras):
            raise Unsuited("it needs clusters, memory for scratch, or a special launch")
        passed = [name for name in kernel.arg_names if signature.get(name) != "constexpr"]
        if argument_sizes(kernel.arg_names, signature) != sizes:
            raise Unsuited(f"it takes {sizes} bytes, for {[signature.get(n) for n in passed]}")
        pointers = [name for name in changing if signature.get(name, "").startswith("*")]
        numbers = changing[len(pointers) :]
        if tuple(pointers) != changing[: len(pointers)] or not set(numbers) <= set(passed):
            raise Unsuited(f"{changing} are no tensors with numbers after them")
        if special := sorted(fixed_ints & set(numbers)):
            raise Unsuited(f"it is compiled for certain values of {special}")
        self.compiled = compiled  # keeps what the driver has loaded
        self.pointers = len(pointers)
        self.pack_into = struct.Struct(f"={len(changing)}q").pack_into
        self.words = _launch(
            driver,
            function=function,
            threads=threads,
            shared=shared,
            order=[*changing, *(name for name in passed if name not in changing)],
            passed=passed,
            values={name: _value(arguments[name]) for name in passed},
            pointers=len(pointers),
        )
        self.buffer = ffi.buffer(self.words.word)


def parameter_sizes(ptx: str) -> tuple[int, ...]:
    """Bytes of each argument that a compiled kernel takes. Raises: ValueError: there is none."""
    entry = _ENTRY.search(ptx)
    if entry is None:
        raise ValueError("no kernel in its PTX")
    return tuple(int(bits) // 8 for bits in _PARAMETER.findall(entry[1]))


def argument_sizes(names: Sequence[str], signature: Mapping[str, str]) -> tuple[int, ...]:
    """Bytes of each argument of a launch, those that Triton adds included.

    names, signature: of the kernel, constants included; what Triton compiled each for.
    """
    passed = [name for name in names if signature.get(name) != "constexpr"]
    return (*(_size(signature.get(name)) for name in passed), *_SCRATCH)


def _size(kind: str | None) -> int:
    """Bytes of an argument of this kind; 0: none that is known here."""
    if kind is None:
        return 0
    return 8 if kind.startswith("*") else {"i32": 4, "u32": 4, "i64": 8, "u64": 8}.get(kind, 0)


def _aligned(argument: Any) -> bool:
    return not isinstance(argument, torch.Tensor) or argument.data_ptr() % _ALIGNMENT == 0


def _value(argument: Any) -> int:
    return argument.data_ptr() if isinstance(argument, torch.Tensor) else int(argument)


def _launch(
    driver: Driver,
    *,
    function: int,
    threads: int,
    shared: int,
    order: list[str],
    passed: list[str],
    values: Mapping[str, int],
    pointers: int,
) -> Any:
    """fx_launch. order: of the words; passed: of the arguments, to which Triton adds two."""
    words = ffi.new("fx_launch *")
    words.launch, words.get_context, words.set_context = driver
    words.function, words.context = function, _current_context(driver)
    words.threads, words.shared, words.pointers = threads, shared, pointers
    words.words = len(passed) + len(_SCRATCH)
    for at, name in enumerate(order):
        words.word[at] = values[name] % 2**64
    for at, name in enumerate(passed):
        words.place[at] = order.index(name)
    for at in range(len(passed), words.words):
        words.place[at] = at  # which is 0
    return words


class KernelLaunch:
    """Launches of one kernel on one device; one thread at a time.

    Called with the number of programs and the arguments that change, in the kernel's order: tensors
    first (contiguous, of the same dtypes each time), then ints that the kernel is not specialised
    for. It launches on the current stream, also into a graph that is captured.
    """

    def __init__(
        self,
        kernel: Any,
        device: torch.device,
        fixed: Mapping[str, Any],
        *,
        views: Mapping[str, torch.dtype] = MappingProxyType({}),
        prepared: bool = True,
        **options: Any,
    ) -> None:
        """
        Args:
            fixed: arguments and constants that stay as they are, by name.
            views: as what the kernel gets tensors of another dtype.
            prepared: False: every launch is Triton's own.
            options: of Triton: num_warps and so on.
        """
        self._kernel, self._fixed, self._views, self._options = kernel, fixed, views, options
        self._changing = tuple(name for name in kernel.arg_names if name not in fixed)
        self._device = device
        self._index = device.index
        if device.type == "cuda" and device.index is None:
            self._index = torch.cuda.current_device()
        self._prepares = prepared and device.type == "cuda" and not INTERPRETED
        self._prepared: PreparedKernel | None = None

    def __call__(self, programs: int, *changing: Any) -> None:
        """Raises: RuntimeError: the driver refuses."""
        prepared = self._prepared
        if prepared is not None:
            n = prepared.pointers
            pointers = map(_address, changing[:n])
            prepared.pack_into(prepared.buffer, 0, *pointers, *changing[n:])
            status = lib.fx_start(prepared.words, programs, _stream(self._index))
            if status == 0:
                return
            if status != _UNALIGNED:
                raise RuntimeError(
                    f"the CUDA driver does not launch {self._kernel.__name__} on {self._device}: "
                    f"error {status}"
                )
        self._launch_by_triton(programs, changing)

    def _launch_by_triton(self, programs: int, changing: tuple[Any, ...]) -> None:
        arguments = dict(zip(self._changing, changing, strict=True))
        for name, dtype in self._views.items():
            arguments[name] = arguments[name].view(dtype)
        arguments.update(self._fixed)
        if self._device.type != "cuda":
            self._kernel[(programs,)](**arguments, **self._options)
            return
        with torch.cuda.device(self._index):
            compiled = self._kernel[(programs,)](**arguments, **self._options)
            if self._prepares and all(_aligned(argument) for argument in changing):
                self._prepare(compiled, arguments)

    def _prepare(self, compiled: Any, arguments: Mapping[str, Any]) -> None:
        self._prepares = False
        try:
            self._prepared = PreparedKernel(
                self._kernel, compiled, arguments, self._changing, cuda_driver()
            )
        except Unsuited as error:
            _say_once(f"{self._kernel.__name__}: {error}")


_address = torch.Tensor.data_ptr
_stream: Any = getattr(torch._C, "_cuda_getCurrentRawStream", None)


@functools.cache
def _logged() -> list[str]:
    return []


def _say_once(why: str) -> None:
    if not _logged():
        _logged().append(why)
        _log.warning(
            "kernels of the exchange are launched by Triton itself, which takes the host several "
            "times as long (%s)",
            why,
        )
