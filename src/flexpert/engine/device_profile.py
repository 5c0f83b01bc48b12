"""What a rank computes on: its device and threads, the exchange, where the experts' sum comes from,
and which batch sizes.

A service whose capacity is one rank exchanges nothing on a GPU: that rank holds all experts.
Without a GPU, `--device cuda` runs in Triton's interpreter if TRITON_INTERPRET=1 is set: to test
with, thousands of times slower.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch

from flexpert.comm import Buffer, BufferSpec, CommError, ExportedMemory, export_memory, make_buffer
from flexpert.comm.interpreter import INTERPRETED
from flexpert.config import EngineConfig
from flexpert.errors import ConfigError
from flexpert.kernels.kernel_set import Kernels, gpu_kernels, kernels_of, open_gpu
from flexpert.models.padding import padded_sizes
from flexpert.models.source import ModelSource
from flexpert.moe.expert_store import ExpertStore, Store
from flexpert.moe.runtime import MoERuntime

if TYPE_CHECKING:
    from flexpert.moe.cuda.exchanged_experts import ExchangedExperts
    from flexpert.moe.cuda.local_experts import LocalExperts

CPU = torch.device("cpu")

THREADED_HIDDEN = 2048

MOST_CAPTURED = 512
"""Sequences of the largest graph; more of them take so long that launching them costs little."""


def open_device(config: EngineConfig, rank: int = 0) -> torch.device:
    """The device of a rank that the settings name; several GPUs are dealt out to ranks in turn.

    Raises:
        ConfigError: it cannot be used.
    """
    if config.device == "cpu" or (INTERPRETED and not torch.cuda.is_available()):
        return CPU
    open_gpu()
    device = torch.device("cuda", rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    if config.all2all == "nixl_ep":
        find_nixl_ep()
    return device


def find_nixl_ep() -> None:
    """Raises: ConfigError: NVIDIA's package cannot be used here; says what is missing."""
    from flexpert.comm.nixl_ep.package import find

    try:
        find()
    except CommError as error:
        raise ConfigError(f"--all2all nixl_ep: {error}") from error


def kernels_for(config: EngineConfig, device: torch.device) -> Kernels:
    """What the dense part of a model calls."""
    return kernels_of(device) if config.device == "cpu" else gpu_kernels()


def make_exchange(
    rank: int, spec: BufferSpec, config: EngineConfig, timeout_s: float, experts: int
) -> Buffer:
    """The buffer of a rank, on the current device.

    experts: of a layer; a rank that is alone holds all of them.

    Raises:
        ConfigError: there is no room for it on the GPU, or nixl_ep is absent or does not take it.
    """
    if config.device == "cpu":
        return make_buffer(rank, spec, timeout_s=timeout_s)
    if config.all2all == "nixl_ep" and spec.capacity > 1:  # one rank exchanges nothing
        try:
            return make_buffer(rank, spec, backend="nixl_ep", slots=experts, timeout_s=timeout_s)
        except (CommError, ValueError) as error:
            raise ConfigError(f"--all2all nixl_ep: {error}") from error
    from flexpert.comm.cuda.ipc_memory import CudaError  # needs triton

    try:
        return make_buffer(rank, spec, backend="cuda", timeout_s=timeout_s)
    except CudaError as error:
        raise ConfigError(f"{error}; lower --max-tokens-per-step or --max-ranks") from error


def export_kv_cache(size: int, device: torch.device) -> ExportedMemory:
    """Memory of the KV cache, which peers may read.

    Raises:
        ConfigError: the GPU does not have it.
    """
    try:
        return export_memory(size, device)
    except CommError as error:
        raise ConfigError(f"the KV cache: {error}; lower --kv-memory") from error


def make_runtime(
    buffer: Buffer, source: ModelSource, config: EngineConfig, device: torch.device
) -> MoERuntime | LocalExperts | ExchangedExperts:
    """The MoE layers of a rank on a device."""
    if config.device == "cpu":
        return MoERuntime(buffer, reduce="home" if config.deterministic else "rank")
    info, shape = source.info, source.expert_shape()
    if buffer.spec.capacity == 1:
        from flexpert.moe.cuda.local_experts import LocalExperts  # needs triton

        return LocalExperts(buffer.rank, info.moe_layers, info.experts, shape, device)
    from flexpert.moe.cuda.exchanged_experts import ExchangedExperts  # needs triton

    return ExchangedExperts(buffer, info.moe_layers, info.experts, shape, device)


def make_store(source: ModelSource, config: EngineConfig, device: torch.device) -> Store:
    """Where the experts of a rank lie."""
    shapes = [source.expert_shape(layer) for layer in range(source.info.moe_layers)]
    if config.device == "cpu":
        return ExpertStore(shapes, source.info.experts)
    from flexpert.moe.cuda.device_expert_store import DeviceStore  # needs triton

    return DeviceStore(shapes, source.info.experts, device)


def warm_up_sizes(most: int, config: EngineConfig, device: torch.device) -> list[int]:
    """Tokens of the batches to compute before serving: one of each kernel that will be needed."""
    if config.device != "cpu":
        if device.type == "cpu":  # the interpreter compiles nothing
            return [2]
        return sorted({min(rows, most) for rows in (2, 16, 64, 256, 1024, most)})
    if config.deterministic:
        return sorted({min(rows, most) for rows in (1, 2, most)})
    return padded_sizes(most)


def graph_sizes(most: int, device: torch.device) -> list[int]:
    """Sequences of the decode steps to capture: 1, 2, 4, 8, 16, 24, 32, 48, 64, 96, … `most`."""
    most = 1 if device.type == "cpu" else min(most, MOST_CAPTURED)
    sizes = {1, 2, 4, 8} | {n for k in range(4, 10) for n in (1 << k, 3 << k - 1)}
    return sorted({size for size in sizes if size < most} | {most})


def set_threads(config: EngineConfig, hidden: int, members: int) -> None:
    """How many threads compute in this process, which is one of `members` ranks."""
    cores = len(os.sched_getaffinity(0))
    # Sleeping threads take longer to wake than small products take: with 256 channels two
    # threads gave 1,190 tokens/s where one gave 2,080, with 1,024 channels they gave the same.
    worth_it = hidden >= THREADED_HIDDEN
    share = config.threads or (max(1, cores // members) if worth_it else 1)
    # one thread: how a product is split over threads must not decide its bits
    torch.set_num_threads(1 if config.deterministic else share)
