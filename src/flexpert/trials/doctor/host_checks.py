"""What `flexpert doctor` says of each fact: a list of small checks, each pure."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Literal

import msgspec

from flexpert.trials.doctor.host_facts import HostFacts, PackageFact

Device = Literal["cpu", "cuda"]
Verdict = Literal["fine", "without", "broken"]

_SETS = (
    ("amx", {"amx_tile", "amx_bf16", "avx512f", "avx512_bf16"}),
    ("avx512_bf16", {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16"}),
    ("avx512", {"avx512f", "avx512bw", "avx512vl", "avx512dq"}),
    ("avx2", {"avx2", "fma"}),
)
_LEAST_MEMORY = 2**30  # the embedded model on two ranks
_LEAST_FILES, _MANY_FILES = 64, 4096
_OLD_KERNEL = (5, 4)  # pidfds that can be waited for
_CLOCK_NS = 1000.0


class Finding(msgspec.Struct, frozen=True):
    """verdict: "fine"; "without": serving works, without something or less well; "broken": serving
    cannot work. found: the fact; means: what follows from it; mend: what to do."""

    check: str
    verdict: Verdict
    found: str
    means: str = ""
    mend: str = ""


Check = Callable[[HostFacts, Device], Iterable[Finding]]


def _system(facts: HostFacts, device: Device) -> Iterable[Finding]:
    found = f"{facts.system}, {facts.machine}, Python {facts.python}"
    release = re.search(r"(\d+)\.(\d+)", facts.system)
    if not facts.system.startswith("Linux"):
        yield Finding(
            "system", "broken", found, "flexpert needs Linux", "run it in a Linux machine"
        )
    elif release and (int(release[1]), int(release[2])) < _OLD_KERNEL:
        yield Finding(
            "system", "broken", found, "the kernel has no pidfds", "use Linux 5.4 or newer"
        )
    else:
        yield Finding("system", "fine", found)


def _cores(facts: HostFacts, device: Device) -> Iterable[Finding]:
    quota = "" if facts.quota is None else f", of which the cgroup gives {facts.quota:g}"
    found = f"{facts.cores} cores{quota}"
    if min(facts.cores, facts.quota or facts.cores) < 2 and device == "cpu":
        yield Finding(
            "cores",
            "without",
            found,
            "ranks and head share one core, and take turns",
            "give the service two cores or more: one a rank, and some for the head",
        )
    else:
        yield Finding("cores", "fine", found)


def _memory(facts: HostFacts, device: Device) -> Iterable[Finding]:
    limit = facts.memory_limit
    usable = min(facts.memory_available, limit) if limit else facts.memory_available
    of = f" (the cgroup's limit is {_size(limit)})" if limit else ""
    found = f"{_size(facts.memory_available)} of {_size(facts.memory)} available{of}"
    if usable < _LEAST_MEMORY:
        yield Finding(
            "memory",
            "broken",
            found,
            f"even the embedded model wants {_size(_LEAST_MEMORY)}",
            "free some, or raise the limit of the container",
        )
    else:
        means = "`flexpert check MODEL` says whether a model fits"
        yield Finding("memory", "fine", found, means)


def _shared_memory(facts: HostFacts, device: Device) -> Iterable[Finding]:
    if facts.memfd:
        yield Finding(
            "shared memory",
            "broken",
            facts.memfd,
            "ranks open each other's memory through /proc/PID/fd, and cannot here",
            "mount /proc without hidepid, and allow a process to look at its parent's descriptors",
        )
    else:
        yield Finding("shared memory", "fine", "memory of one process opens in another")
    free = "there is none" if facts.shm is None else f"{_size(facts.shm)} free"
    yield Finding(
        "/dev/shm",
        "fine" if facts.shm else "without",
        free,
        "flexpert puts nothing there; NCCL, Ray and other programs do",
        "" if facts.shm else "a container gets it with --shm-size",
    )
    if facts.pidfd:
        yield Finding(
            "pidfd",
            "broken",
            facts.pidfd,
            "lost ranks are seen through pidfds",
            "allow pidfd_open in the container's seccomp profile",
        )


def _limits(facts: HostFacts, device: Device) -> Iterable[Finding]:
    soft, hard = facts.files
    found = f"{_number(soft)} open files, {_number(hard)} at most"
    if 0 <= hard < _LEAST_FILES:
        yield Finding("open files", "broken", found, "ranks cannot be started", "raise ulimit -n")
    elif 0 <= hard < _MANY_FILES:
        means = f"some {max(0, hard - 256)} connections of clients at once"
        yield Finding("open files", "without", found, means, "raise the hard limit (ulimit -Hn)")
    else:
        yield Finding("open files", "fine", found, "serve raises its own limit")
    locked = facts.locked[1]
    found = "without limit" if locked < 0 else f"{_size(locked)} at most"
    if 0 <= locked < 2**30:
        yield Finding(
            "locked memory",
            "without",
            found,
            "RDMA between hosts may not register its buffers; TCP needs none",
            "ulimit -l unlimited, or LimitMEMLOCK=infinity in the unit",
        )
    else:
        yield Finding("locked memory", "fine", found)
    most = facts.processes[0]
    if 0 <= most < 256:
        yield Finding(
            "processes",
            "without",
            f"{most} at most",
            "threads count too; many ranks may not be started",
            "raise ulimit -u",
        )


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            break
        count /= 1024
    return f"{count:.0f} {unit}" if count >= 10 else f"{count:.1f} {unit}"


def _number(limit: int) -> str:
    return "any number of" if limit < 0 else str(limit)


def best_set(flags: Iterable[str]) -> str:
    """The largest instruction set that this processor has kernels for."""
    there = set(flags)
    return next((name for name, needed in _SETS if needed <= there), "portable")


def _extensions(facts: HostFacts, device: Device) -> Iterable[Finding]:
    tried, best = facts.extensions, best_set(facts.cpu_flags)
    if tried.error:
        yield Finding(
            "C parts",
            "broken",
            tried.error,
            "neither the exchange nor the kernels of the CPU can be loaded",
            "install flexpert with pip, or build them: python setup.py build_ext --inplace",
        )
    elif tried.said != best and facts.machine == "x86_64":
        yield Finding(
            "C parts",
            "without",
            f"loaded, with {tried.said}",
            f"this processor has {best}",
            "unset FLEXPERT_CPU, or build with a compiler that knows it (GCC 11, Clang 14)",
        )
    elif tried.said == "portable":
        means = "products are several times slower than with AVX2 or AVX-512"
        yield Finding("C parts", "without", "loaded, with portable code", means)
    else:
        yield Finding("C parts", "fine", f"loaded, with {tried.said}")


def _packages(facts: HostFacts, device: Device) -> Iterable[Finding]:
    if not facts.packages:
        yield Finding(
            "packages",
            "without",
            "flexpert is not installed, it runs from its sources",
            "versions cannot be compared with those asked for",
            "pip install .",
        )
        return
    needed = [one for one in facts.packages if not one.extra]
    wrong = [one for one in needed if not one.fits]
    for one in wrong:
        yield Finding(
            f"package {one.name}",
            "without" if one.installed else "broken",
            one.installed or "not installed",
            f"asked for: {one.wanted or 'any version'}; this one was not tried",
            f"pip install '{one.name}{one.wanted}'",
        )
    if not wrong:
        shown = ("torch", "transformers")
        named = [f"{p.name} {p.installed}" for p in needed if p.name in shown]
        yield Finding("packages", "fine", f"{', '.join(named)} and {len(needed) - 2} others fit")
    for extra in sorted({one.extra for one in facts.packages} - {"", "nixl", "cuda"}):
        yield _extra(extra, [one for one in facts.packages if one.extra == extra])


def _extra(extra: str, wanted: list[PackageFact]) -> Finding:
    missing = [one for one in wanted if not one.fits]
    if not missing:
        found = ", ".join(f"{one.name} {one.installed}" for one in wanted)
        return Finding(f"extra {extra}", "fine", found)
    found = ", ".join(f"{one.name} {one.installed or 'is not installed'}" for one in missing)
    return Finding(
        f"extra {extra}",
        "without",
        found,
        "only what it is for",
        f"pip install 'flexpert[{extra}]'",
    )


def _nixl(facts: HostFacts, device: Device) -> Iterable[Finding]:
    if not facts.nixl.error:
        yield Finding("NIXL", "fine", f"an agent starts, with {facts.nixl.said}")
        return
    yield Finding(
        "NIXL",
        "without",
        facts.nixl.error,
        "all ranks must be on this machine",
        "pip install 'flexpert[nixl]' for ranks on several hosts",
    )


def _gpus(facts: HostFacts, device: Device) -> Iterable[Finding]:
    broken: Verdict = "broken" if device == "cuda" else "without"
    cpu_only = "serving with --device cuda cannot work"
    if not facts.driver:
        mend = "install NVIDIA's driver, or start the container with its GPUs"
        yield Finding("GPUs", broken, "there is no NVIDIA driver", cpu_only, mend)
        return
    if not facts.gpus:
        found = facts.gpu_error or "torch sees none"
        mend = "install a torch that is built for CUDA, not newer than the driver"
        yield Finding("GPUs", broken, f"driver {facts.driver}; {found}", cpu_only, mend)
        return
    names = ", ".join(f"{gpu.name} ({_size(gpu.memory)})" for gpu in facts.gpus)
    yield Finding("GPUs", "fine", f"driver {facts.driver}: {names}")
    old = [gpu.name for gpu in facts.gpus if gpu.capability < (8, 0)]
    if old:
        means = "there is no bfloat16 before compute capability 8.0"
        yield Finding("GPU age", broken, ", ".join(old), means, "use newer ones")
    everybody = len(facts.gpus) - 1
    alone = [i for i, gpu in enumerate(facts.gpus) if len(gpu.peers) < everybody]
    if everybody and alone:
        yield Finding(
            "peer access",
            broken,
            f"GPUs {alone} do not reach all others",
            "ranks of one host write into each other's GPUs",
            "choose GPUs that reach each other (CUDA_VISIBLE_DEVICES, nvidia-smi topo -m)",
        )
    elif everybody:
        yield Finding("peer access", "fine", "each reaches all others")
    triton = next((one for one in facts.packages if one.extra == "cuda"), None)
    if triton is not None and not triton.fits:
        yield Finding(
            "Triton",
            broken,
            triton.installed or "not installed",
            "the kernels of GPUs are compiled with it",
            "pip install 'flexpert[cuda]'",
        )
    if facts.mps:
        yield Finding(
            "MPS",
            "without",
            "its daemon runs",
            "ranks of one GPU run at the same time, and one that is killed in a kernel takes the "
            "others down",
            "for one rank a GPU, stop it: echo quit | nvidia-cuda-mps-control",
        )


def _port(facts: HostFacts, device: Device) -> Iterable[Finding]:
    if facts.port_error:
        yield Finding(
            "port",
            "without",
            f"{facts.port}: {facts.port_error}",
            "serve cannot listen there",
            "choose another --port, or end who has it (ss -ltnp)",
        )
    else:
        yield Finding("port", "fine", f"{facts.port} is free")


def _clock(facts: HostFacts, device: Device) -> Iterable[Finding]:
    found = f"{facts.clock or 'unknown'}, {facts.clock_ns:.0f} ns to ask"
    if facts.clock_ns > _CLOCK_NS:
        mend = "see /sys/devices/system/clocksource; in a virtual machine ask for tsc or kvm-clock"
        yield Finding("clock", "without", found, "each wait in an exchange asks it", mend)
    elif facts.synchronised is False:
        yield Finding(
            "clock",
            "without",
            f"{found}; nobody keeps it in step",
            "logs of several hosts, and certificates, go by it; nothing of serving does",
            "run chrony or systemd-timesyncd",
        )
    else:
        yield Finding("clock", "fine", found)


CHECKS: tuple[Check, ...] = (
    _system,
    _cores,
    _memory,
    _shared_memory,
    _limits,
    _extensions,
    _packages,
    _gpus,
    _nixl,
    _port,
    _clock,
)


def findings(facts: HostFacts, device: Device) -> list[Finding]:
    """All checks, in their order."""
    return [finding for check in CHECKS for finding in check(facts, device)]


def works(found: Iterable[Finding]) -> bool:
    """Whether serving can work."""
    return all(one.verdict != "broken" for one in found)
