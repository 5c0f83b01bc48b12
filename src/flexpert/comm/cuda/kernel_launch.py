"""Launches of one kernel that differ in a few arguments, at little more than the driver's cost.

Triton's own launcher looks at every argument of every launch, for the kernel that was compiled for
its like. Here that is done by the first launch: what it compiled, and where each argument belongs,
is kept, and later launches write the arguments that change and call the driver (launches.c).

Launches that follow one another and take what changes from the same tensors become one call of C
(`make_call`), and what it costs to launch a graph of them: one kernel by itself takes the driver
three times as long as a graph of any few, and giving a node of a graph other arguments half as long
as a launch.

Where the kernel is not as expected (Triton's interpreter, another version of Triton, a part of this
package that was not compiled), every launch is Triton's own, and the log says so once.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch

from flexpert.comm.capture_guard import CAPTURE_GUARD
from flexpert.comm.cuda.cuda_layout import LANES, Page
from flexpert.comm.interpreter import INTERPRETED

if TYPE_CHECKING:
    from flexpert.comm.cuda._launches import Call, Kernel

_log = logging.getLogger("flexpert.comm")

_ALIGNMENT: Final = 16
_WARP: Final = 32
_SCRATCH: Final = (8, 8)
"""Bytes of the arguments that Triton adds: of memory for scratch and profiling."""
_OF_TOKENS: Final = -1  # of launches.c
_CONSTANT: Final = -2
_ENTRY: Final = re.compile(r"\.entry\s+\S+\s*\(([^)]*)\)")
_PARAMETER: Final = re.compile(r"\.param\s+(?:\.align\s+\d+\s+)?\.[usbf](\d+)")


class Unsuited(Exception):  # noqa: N818 - reads as what it says
    """Why a kernel cannot be launched in this way."""


class Driver(NamedTuple):
    """Addresses of functions.

    launching: cuLaunchKernel, cuCtxGetCurrent, cuCtxSetCurrent; and what names the current stream,
        0: torch's.
    graphs: see graph_functions in launches.c. destroying: cuGraphExecDestroy and cuGraphDestroy.
    """

    launching: tuple[int, int, int, int]
    graphs: tuple[int, ...]
    destroying: tuple[int, int]

    def destroy(self, executable: int, graph: int) -> None:
        """0: there is none."""
        with CAPTURE_GUARD.apart():
            for function, what in zip(self.destroying, (executable, graph), strict=True):
                if what:
                    ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)(function)(what)


@functools.cache
def cuda_driver() -> Driver:
    """Of the CUDA driver. Raises: Unsuited: there is none."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
        addresses = [
            ctypes.cast(cuda[name], ctypes.c_void_p).value or 0
            for name in (
                "cuLaunchKernel", "cuCtxGetCurrent", "cuCtxSetCurrent",
                "cuGraphCreate", "cuGraphAddKernelNode", "cuGraphInstantiateWithFlags",
                "cuGraphExecKernelNodeSetParams", "cuGraphLaunch", "cuStreamIsCapturing",
                "cuGraphExecDestroy", "cuGraphDestroy",
            )
        ]  # fmt: skip
    except (OSError, AttributeError) as error:
        raise Unsuited(str(error)) from None
    launch, get, set_, *graphs, destroy_executable, destroy = addresses
    return Driver((launch, get, set_, 0), tuple(graphs), (destroy_executable, destroy))


@functools.cache
def _launches() -> Any:
    """The part in C. Raises: Unsuited: it is not compiled, or cannot read this torch's tensors."""
    try:
        from flexpert.comm.cuda import _launches
    except ImportError:  # a checkout that was not installed again
        raise Unsuited(
            "flexpert.comm.cuda._launches is not compiled: install flexpert again"
        ) from None
    try:
        _launches.use_tensors(torch.Tensor)
    except (AttributeError, ValueError) as error:
        raise Unsuited(f"torch's tensors: {error}") from None
    return _launches


def _current_context(driver: Driver) -> int:
    """Of this thread."""
    context = ctypes.c_void_p()
    get = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)(driver.launching[1])
    if get(ctypes.byref(context)) or not context.value:
        raise Unsuited("the CUDA driver names no context")
    return context.value


def prepare(
    kernel: Any,
    compiled: Any,
    arguments: Mapping[str, Any],
    changing: tuple[str, ...],
    driver: Driver,
    device: int = -1,
) -> Kernel:
    """A compiled kernel with its arguments, all but those that change.

    Args:
        kernel: the function, as `triton.jit` made it.
        compiled: what a launch of it returned.
        arguments: of that launch, by name, constants included.
        changing: names of those that other launches have others of, tensors first, all aligned.
        device: its index.

    Raises: Unsuited: it is not as expected; says why.
    """
    made = _launches()
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
    order = [*changing, *(name for name in passed if name not in changing)]
    extra = range(len(passed), len(passed) + len(_SCRATCH))  # what Triton adds: 0 each
    kept: Kernel = made.Kernel(
        kernel.__name__,
        (compiled, [arguments[name] for name in passed if name not in changing]),
        driver.launching,
        device,
        function,
        _current_context(driver),
        threads,
        shared,
        len(pointers),
        len(changing),
        bytes([*(order.index(name) for name in passed), *extra]),
        (*(_value(arguments[name]) for name in order), *(0 for _ in extra)),
    )
    return kept


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
    """As a word of 64 bits."""
    value = argument.data_ptr() if isinstance(argument, torch.Tensor) else int(argument)
    return value % 2**64


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

        Attributes:
            changing: names of the arguments that change.
            driver: that launches, once that is prepared.
        """
        self._kernel, self._fixed, self._views, self._options = kernel, fixed, views, options
        self.changing = tuple(name for name in kernel.arg_names if name not in fixed)
        self._device = device
        self._index = device.index
        if device.type == "cuda" and device.index is None:
            self._index = torch.cuda.current_device()
        self._prepares = prepared and device.type == "cuda" and not INTERPRETED
        self._prepared: Kernel | None = None
        self.driver: Driver | None = None
        self._start: Callable[..., bool] | None = None

    @property
    def prepared(self) -> Kernel | None:
        """The kernel, once a launch has found that it can be prepared."""
        return self._prepared

    def __call__(self, programs: int, *changing: Any) -> None:
        """Raises: RuntimeError: the driver refuses."""
        if self._start is None or not self._start(programs, *changing):
            self._launch_by_triton(programs, changing)

    def _launch_by_triton(self, programs: int, changing: tuple[Any, ...]) -> None:
        arguments = dict(zip(self.changing, changing, strict=True))
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
            self.driver = cuda_driver()
            self._prepared = prepare(
                self._kernel, compiled, arguments, self.changing, self.driver, self._index
            )
            self._start = self._prepared.launch
        except Unsuited as error:
            _say_once(f"{self._kernel.__name__}: {error}")


@dataclass(frozen=True, slots=True, eq=False)
class LaunchStep:
    """A launch whose arguments are known by the names that the kernel has for them.

    each, most, more: its programs: at most `most` of `each` a token (as if there were one, where
    there is none), and so many more.
    """

    launch: KernelLaunch
    each: int = 0
    most: int = sys.maxsize
    more: int = 0

    def start(self, arguments: Mapping[str, Any], tokens: int = 0) -> None:
        """arguments: those that change, and maybe others.

        Raises: RuntimeError: the driver refuses.
        """
        programs = self.more
        if self.each:
            programs += min((tokens or 1) * self.each, self.most)
        self.launch(programs, *map(arguments.__getitem__, self.launch.changing))


TOKENS: Final = -1
ROWS: Final = -2
"""Sizes of an argument of a call: as many as there are tokens; a row for each that came, or for as
many as can come."""


def make_call(
    steps: Sequence[LaunchStep],
    tensors: Mapping[str, tuple[torch.Tensor, tuple[int, ...]]],
    fixed: Mapping[str, torch.Tensor | int],
    *,
    page: torch.Tensor,
    most_tokens: int,
    most_rows: int,
) -> Call | None:
    """Launches in a row, which look at their tensors first; None: not all are prepared.

    Args:
        tensors: in the order in which `Call.run` takes them: one such tensor, and what sizes others
            have, by the name that kernels have for them; their number is `tokens`.
        fixed: what is the same each time, of what kernels are prepared to take others of.
        page: of the host, see `Page`; where something is reported, calls do nothing.
    """
    kernels = [step.launch.prepared for step in steps]
    if None in kernels:
        return None
    made, names, begin = _launches(), list(tensors), page.data_ptr()

    def source(name: str) -> tuple[int, int]:
        if name == "tokens":
            return _OF_TOKENS, 0
        return (names.index(name), 0) if name in tensors else (_CONSTANT, _value(fixed[name]))

    call: Call = made.Call(
        begin + 8 * Page.REPORT,
        LANES,
        begin + 8 * Page.STOP,
        most_tokens,
        most_rows,
        tuple((*made.describe(tensor)[:4], sizes) for tensor, sizes in tensors.values()),
        tuple(
            (kernel, step.each, step.most, step.more, tuple(map(source, step.launch.changing)))
            for kernel, step in zip(kernels, steps, strict=True)
        ),
    )
    return call


def launch_at_once(call: Call, steps: Sequence[LaunchStep]) -> None:
    """Have a call launch all of its kernels as one graph, which takes the host less than each by
    itself, if the driver can. Not while this thread captures. steps: of the call."""
    driver = steps[0].launch.driver
    if driver is None or not driver.graphs:
        return

    def give_back(executable: int, graph: int) -> None:  # in a finaliser
        CAPTURE_GUARD.later(lambda: driver.destroy(executable, graph))

    with CAPTURE_GUARD.apart():
        status = call.arm(driver.graphs, give_back)
    if status:
        _log.debug("a graph of launches: the CUDA driver answers %d", status)


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
