"""What `flexpert doctor` judges by, gathered: nothing is decided here, and nothing that fails ends
it."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import platform
import re
import resource
import socket
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import msgspec
import psutil

_CHILD_S = 30.0  # for what is tried in a process of its own
_UNSYNCHRONISED = 0x40  # STA_UNSYNC of adjtimex(2)

_EXTENSIONS = (
    "from flexpert.comm.host import _kernels\n"
    "from flexpert.kernels.cpu import ops\n"
    "print(ops.instruction_set())\n"
)
_NIXL = (
    "from flexpert.comm.host.nixl import load\n"
    "nixl = load()\n"
    "agent = nixl.agent('doctor', nixl.config(enable_prog_thread=False))\n"
    "print('UCX')\n"
)
_CUDA = (
    "import json, torch\n"
    "count = torch.cuda.device_count()\n"
    "print(json.dumps([[torch.cuda.get_device_name(i), *torch.cuda.get_device_capability(i),"
    " [j for j in range(count) if j != i and torch.cuda.can_device_access_peer(i, j)],"
    " torch.cuda.mem_get_info(i)[1]] for i in range(count)]))\n"
)


class Tried(msgspec.Struct, frozen=True):
    """What a process of its own has printed, or why it could not."""

    said: str = ""
    error: str = ""


class GpuFact(msgspec.Struct, frozen=True):
    """peers: numbers of the GPUs whose memory it reaches."""

    name: str
    capability: tuple[int, int]
    peers: list[int]
    memory: int


class PackageFact(msgspec.Struct, frozen=True):
    """installed: a version, or None. wanted: as pip writes it. extra: "" is what every install
    has."""

    name: str
    installed: str | None
    wanted: str
    extra: str = ""
    fits: bool = True


class HostFacts(msgspec.Struct, frozen=True, kw_only=True):
    """Limits are (soft, hard); -1: none. Memory in bytes.

    cores: that this process may run on; quota: of processors, by its cgroup, or None.
    memfd: memory of one process could be opened by another; else why not. port_error: why the port
    cannot be listened on. clock: what the kernel takes time from; synchronised: whether somebody
    sets the clock; None: it does not say. driver: of NVIDIA; "": there is none. mps: its control
    daemon's directory is there.
    """

    system: str
    machine: str
    python: str
    cores: int
    quota: float | None
    cpu_flags: list[str]
    memory: int
    memory_available: int
    memory_limit: int | None
    shm: int | None
    files: tuple[int, int]
    locked: tuple[int, int]
    processes: tuple[int, int]
    memfd: str
    pidfd: str
    extensions: Tried
    packages: list[PackageFact]
    nixl: Tried
    port: int
    port_error: str
    clock: str
    clock_ns: float
    synchronised: bool | None
    driver: str
    gpus: list[GpuFact]
    gpu_error: str
    mps: bool


def gather(port: int) -> HostFacts:
    """Look at everything; takes seconds. port: to listen on, which is tried."""
    memory = psutil.virtual_memory()
    driver = _driver()
    gpus, gpu_error = _gpus() if driver else ([], "")
    return HostFacts(
        system=f"{platform.system()} {platform.release()}",
        machine=platform.machine(),
        python=platform.python_version(),
        cores=len(os.sched_getaffinity(0)),
        quota=_quota(),
        cpu_flags=_cpu_flags(),
        memory=memory.total,
        memory_available=memory.available,
        memory_limit=_memory_limit(),
        shm=_shm(),
        files=_limit(resource.RLIMIT_NOFILE),
        locked=_limit(resource.RLIMIT_MEMLOCK),
        processes=_limit(resource.RLIMIT_NPROC),
        memfd=_memfd(),
        pidfd=_pidfd(),
        extensions=_try(_EXTENSIONS),
        packages=packages(),
        nixl=_try(_NIXL),
        port=port,
        port_error=_port(port),
        clock=_read("/sys/devices/system/clocksource/clocksource0/current_clocksource"),
        clock_ns=_clock_ns(),
        synchronised=_synchronised(),
        driver=driver,
        gpus=gpus,
        gpu_error=gpu_error,
        mps=Path(os.environ.get("CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps"), "control").exists(),
    )


def packages() -> list[PackageFact]:
    """Those that flexpert asks for, as it is installed; [] if it runs from its sources alone."""
    from packaging.requirements import Requirement

    try:
        required = metadata.requires("flexpert") or []
    except metadata.PackageNotFoundError:
        return []
    found = []
    for line in required:
        wanted = Requirement(line)
        extra = re.search(r"extra == ['\"](\w+)['\"]", str(wanted.marker or ""))
        if extra and extra[1] in ("dev", "plot"):
            continue
        try:
            installed: str | None = metadata.version(wanted.name)
        except metadata.PackageNotFoundError:
            installed = None
        fits = installed is not None and wanted.specifier.contains(installed, prereleases=True)
        name, what = wanted.name, str(wanted.specifier)
        found.append(PackageFact(name, installed, what, extra[1] if extra else "", fits))
    return found


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace").strip()
    except OSError:
        return ""


def _quota() -> float | None:
    most, _, period = _read("/sys/fs/cgroup/cpu.max").partition(" ")
    return int(most) / int(period) if most.isdecimal() and period.isdecimal() else None


def _memory_limit() -> int | None:
    limit = _read("/sys/fs/cgroup/memory.max")
    return int(limit) if limit.isdecimal() else None


def _cpu_flags() -> list[str]:
    for line in _read("/proc/cpuinfo").splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return value.split()
    return []


def _shm() -> int | None:
    try:
        return psutil.disk_usage("/dev/shm").free
    except OSError:
        return None


def _limit(which: int) -> tuple[int, int]:
    soft, hard = resource.getrlimit(which)
    unlimited = resource.RLIM_INFINITY
    return (-1 if soft == unlimited else soft, -1 if hard == unlimited else hard)


def _memfd() -> str:
    """Why a child's memory cannot be opened as ranks open each other's; "": it can."""
    try:
        descriptor = os.memfd_create("doctor")
    except OSError as error:
        return error.strerror or str(error)
    try:
        os.ftruncate(descriptor, 4096)
        reach = f"import os; os.close(os.open('/proc/{os.getpid()}/fd/{descriptor}', os.O_RDWR))"
        return _try(reach).error
    finally:
        os.close(descriptor)


def _pidfd() -> str:
    try:
        os.close(os.pidfd_open(os.getpid()))
    except (OSError, AttributeError) as error:
        return str(error)
    return ""


def _try(program: str) -> Tried:
    """In a process of its own: it may crash or hang, or open a GPU."""
    try:
        ran = subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            timeout=_CHILD_S,
            stdin=subprocess.DEVNULL,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return Tried(error=str(error))
    if ran.returncode:
        last = ran.stderr.strip().splitlines()
        return Tried(error=last[-1] if last else f"exit status {ran.returncode}")
    lines = ran.stdout.strip().splitlines()
    return Tried(lines[-1] if lines else "")


def _port(port: int) -> str:
    try:
        with socket.create_server(("127.0.0.1", port), reuse_port=False):
            return ""
    except OSError as error:
        return error.strerror or str(error)


def _clock_ns() -> float:
    """What asking the clock costs, on average."""
    began = time.perf_counter_ns()
    for _ in range(1000):
        time.monotonic_ns()
    return (time.perf_counter_ns() - began) / 1000


def _synchronised() -> bool | None:
    """Whether the kernel's clock is kept in step, by adjtimex(2)."""
    with contextlib.suppress(OSError, AttributeError):
        state = (ctypes.c_ubyte * 512)()
        if ctypes.CDLL(None, use_errno=True).adjtimex(state) < 0:
            return None
        status = ctypes.c_int.from_buffer(state, 40).value  # behind modes and four longs
        return not status & _UNSYNCHRONISED
    return None


def _driver() -> str:
    found = re.search(r"Kernel Module\D*([\d.]+)", _read("/proc/driver/nvidia/version"))
    return found[1] if found else ""


def _gpus() -> tuple[list[GpuFact], str]:
    tried = _try(_CUDA)
    if tried.error:
        return [], tried.error
    gpus = [
        GpuFact(name, (major, minor), peers, memory)
        for name, major, minor, peers, memory in json.loads(tried.said or "[]")
    ]
    return gpus, ""
