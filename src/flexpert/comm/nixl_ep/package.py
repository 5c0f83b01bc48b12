"""The nixl_ep package: where it is, and what its kernels take."""

from __future__ import annotations

import importlib
import importlib.metadata
import re
from dataclasses import dataclass
from typing import Any

import torch

from flexpert.comm.buffer import BufferSpec
from flexpert.comm.errors import CommError
from flexpert.comm.interpreter import INTERPRETED

MOST_RANKS = 32
_OLDEST = (1, 4)
_FIXED = (1, 5)  # `num_experts` of a dispatch counts from here on
_GROUPS = 14  # experts that one multiprocessor serves
# by first release: compute capabilities that there is code for, and versions of torch
_BUILDS = (
    ((1, 5), ((9, 0), (10, 0), (10, 3), (12, 0)), "2.12 to 2.14"),
    ((1, 4), ((9, 0),), "2.11 to 2.13"),
)


@dataclass(frozen=True, slots=True)
class Package:
    """module: has `Buffer` and `topk_idx_t`. fixed: the sizes of its tensors do not depend on who
    is active, so that captured graphs go on through changes, and connecting may run during
    exchanges."""

    module: Any
    fixed: bool


def find() -> Package:
    """The installed package; in Triton's interpreter our own `compat`, for tensors on the CPU.

    Raises: CommError: this machine cannot use it; says what is missing.
    """
    if INTERPRETED and not torch.cuda.is_available():
        return Package(importlib.import_module("flexpert.compat.nixl_ep"), fixed=True)
    if not torch.cuda.is_available():
        raise CommError("backend 'nixl_ep' needs a GPU, and a torch that is built with CUDA")
    cuda = (torch.version.cuda or "0").split(".")[0]
    return load(cuda, torch.__version__, torch.cuda.get_device_capability())


def load(cuda: str, torch_version: str, capability: tuple[int, int]) -> Package:
    """cuda: major version.

    Raises: CommError: not installed, too old, or not for this torch or GPU.
    """
    name, wheel = f"nixl_ep_cu{cuda}", f"nixl-cu{cuda}"
    try:
        version = importlib.metadata.version(wheel)
    except importlib.metadata.PackageNotFoundError:
        # the extra brings the wheel of one CUDA version
        how = "'flexpert[nixl]'" if cuda == "13" else wheel
        raise CommError(
            f"backend 'nixl_ep' needs NVIDIA's nixl_ep for CUDA {cuda}: pip install {how}"
        ) from None
    numbers = release(version)
    if numbers < _OLDEST:
        raise CommError(
            f"backend 'nixl_ep' needs {wheel} {_dotted(_OLDEST)} or later, {version} is "
            f"installed: pip install --upgrade {wheel}"
        )
    check_capability(capability, numbers)
    try:
        module = importlib.import_module(name)
    except (ImportError, OSError) as error:
        raise CommError(
            f"{name} of {wheel} {version} cannot be imported under torch {torch_version}: {error}; "
            f"it is compiled for torch {_build(numbers)[2]}"
        ) from error
    return Package(module, fixed=numbers >= _FIXED)


def check_capability(capability: tuple[int, int], numbers: tuple[int, ...]) -> None:
    """numbers: of nixl_ep's version. Raises: CommError: it has no code for this GPU."""
    _, capabilities, _ = _build(numbers)
    # code for one capability also runs on later ones of the same major number
    if not any(c[0] == capability[0] and c <= capability for c in capabilities):
        known = ", ".join(map(_dotted, capabilities))
        raise CommError(
            f"nixl_ep {_dotted(numbers)} is compiled for GPUs of compute capability {known}, this "
            f"one has {_dotted(capability)}; backend 'cuda' takes it"
        )


def _build(numbers: tuple[int, ...]) -> tuple[tuple[int, int], tuple[tuple[int, int], ...], str]:
    """The entry of `_BUILDS` for a version; of the oldest for older ones."""
    return next((build for build in _BUILDS if numbers >= build[0]), _BUILDS[-1])


def check(spec: BufferSpec, slots: int) -> None:
    """Raises: ValueError: sizes that nixl_ep's kernels do not take."""
    check_capacity(spec.capacity)
    if spec.dtype is not torch.bfloat16:
        raise ValueError(f"backend 'nixl_ep' sends bfloat16 rows, not {spec.dtype}")
    if slots < 1:
        raise ValueError(
            f"slots is {slots}; backend 'nixl_ep' needs the most slots that a rank will have"
        )


def check_capacity(capacity: int) -> None:
    """Raises: ValueError: nixl_ep's barrier and layout do not take so many ids."""
    if not 1 <= capacity <= MOST_RANKS or (capacity > 8 and capacity % 8):
        raise ValueError(
            f"backend 'nixl_ep' takes a capacity of 1 to 8, 16, 24 or {MOST_RANKS}, not {capacity}"
        )


def check_room(capacity: int, slots: int, multiprocessors: int) -> None:
    """Raises: ValueError: more experts than its kernels spread over a GPU."""
    most = _GROUPS * multiprocessors
    if capacity * slots > most:
        raise ValueError(
            f"capacity {capacity} with {slots} slots a rank is {capacity * slots} experts to "
            f"nixl_ep, whose kernels take at most {most} on this GPU; lower the capacity"
        )


def release(version: str) -> tuple[int, ...]:
    """The numbers of a version: "1.5.1.post2" → (1, 5, 1)."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, found[0].split("."))) if found else (0,)


def _dotted(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))
