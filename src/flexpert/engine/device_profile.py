"""What a rank computes on: one profile a process, made once, that all others ask.

There are three kinds: a CPU, an NVIDIA GPU, and a CPU in the place of a GPU, on which Triton's
interpreter runs the GPU's kernels (with TRITON_INTERPRET=1: to test with, thousands of times
slower). A profile gives the kernels, makes what depends on the device, and knows which sizes to
compile for. Which settings a device takes is said in `flexpert.device_settings`.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum, auto
from typing import Final

import torch

from flexpert.comm import Buffer, BufferSpec, CommError, make_buffer
from flexpert.comm.interpreter import INTERPRETED
from flexpert.comm.peer_memory import ExportedMemory, ImportedMemory, export_memory, import_memory
from flexpert.comm.remote_memory import HostRegion, ServedMemory
from flexpert.config import EngineConfig
from flexpert.engine.gpu_driver import GpuDriver, driver_of
from flexpert.engine.gpu_usage import GpuUsage, HostUsage
from flexpert.engine.head_store import HeadMeeting
from flexpert.engine.host_network import check_network
from flexpert.engine.sampler import Sampler, TokenSampler
from flexpert.errors import ConfigError
from flexpert.kernels.cpu import ops
from flexpert.kernels.device_region import DeviceRegion
from flexpert.kernels.device_stream import CudaStream, DeviceStream, HostStream
from flexpert.kernels.kernel_set import (
    Kernels,
    check_gpu,
    cpu_kernels,
    fixed_order_gpu_kernels,
    gpu_kernels,
)
from flexpert.kernels.step_shapes import FEW, graph_size
from flexpert.models.padding import padded_sizes
from flexpert.models.source import ModelSource
from flexpert.models.step_graphs import GraphShape
from flexpert.moe.expert_store import ExpertStore, Store
from flexpert.moe.moe_layers import ElasticMoELayers
from flexpert.moe.runtime import MoERuntime

MAPPED_BYTES: Final = 2**30
"""Of all experts of a model; those of a smaller one are copied unless `map_experts` is on."""
THREADED_HIDDEN = 2048


def result_rows(config: EngineConfig, topk: int) -> int:
    """For each token that GPU ranks have room to send back: partial sums, or a row of each choice,
    whose sum does not depend on who computes it."""
    return topk if config.deterministic else 1


MOST_CAPTURED = 512
"""Sequences of the largest graph that decodes; more of them go into one with prompts."""

LEAST_CAPTURED_TOKENS = 128
"""Tokens of the smallest graph with prompts."""


class WarmUpTime(Enum):
    """When a new rank computes its first steps, alone, so that none is slow while it serves."""

    AFTER_LOADING = auto()
    """With its experts, whose products are compiled by size."""
    WHILE_LOADING = auto()
    """Without any: graphs are captured and kernels compiled while a thread loads experts."""
    BEFORE_LOADING = auto()
    """The same, but nothing is loaded meanwhile: connecting waits for the device."""


@dataclass(frozen=True, slots=True)
class WarmUpBatch:
    """rows: tokens, of `sequences`, each of which has one but the last. context: tokens that the
    last has in all, if that is more. experts: these compute, too."""

    rows: int
    sequences: int = 1
    context: int = 0
    experts: bool = True


class DeviceProfile(ABC):
    """The device of one rank.

    Attributes:
        stream: of the device; its `device` is where tensors lie.
        warm_up: when a new rank computes its first steps.
        looks_ahead: the next step is launched before the tokens of one are known.
        measures_steps: whether proposed tokens pay is decided by what steps take.
    """

    stream: DeviceStream
    warm_up: WarmUpTime
    looks_ahead: bool
    measures_steps = True

    def __init__(self, config: EngineConfig) -> None:
        """
        Args:
            config: the settings, which the device takes (see `DeviceSettings.refusal`).
        """
        self.config = config

    @property
    def device(self) -> torch.device:
        return self.stream.device

    def synchronize(self) -> None:
        """Wait until all that this thread launched is computed."""
        self.stream.synchronize()

    # ---- what is made for it ----------------------------------------------------------------

    @abstractmethod
    def make_kernels(self) -> Kernels:
        """What the dense part of a model calls."""

    @abstractmethod
    def make_exchange(
        self, rank: int, spec: BufferSpec, timeout_s: float, experts: int, meeting: HeadMeeting
    ) -> Buffer:
        """The buffer of a rank.

        Args:
            experts: of a layer; a rank that is alone holds all of them.
            meeting: for ranks of other machines, where the exchange reaches them.

        Raises:
            ConfigError: there is no room for it on the device, or nixl_ep is absent or does not
                take it; says what to do.
        """

    @abstractmethod
    def make_sampler(
        self, sampled: torch.Tensor, accepted: torch.Tensor | None = None
    ) -> TokenSampler:
        """sampled: `ModelRunner.sampled`, of the rank. accepted: `DeviceDrafts.accepted`, where the
        device goes on without the host's knowing what came true."""

    @abstractmethod
    def make_moe_layers(self, buffer: Buffer, source: ModelSource) -> ElasticMoELayers:
        """The MoE layers of a rank."""

    @abstractmethod
    def make_expert_store(self, rank: int, source: ModelSource) -> Store:
        """Where the experts of a rank lie, for it and its peers."""

    def export_kv_cache(self, size: int) -> ExportedMemory:
        """Memory of the KV cache, of `size` bytes, which peers may read.

        Raises:
            ConfigError: the device does not have it; says what to do.
        """
        try:
            return export_memory(size, self.device)
        except CommError as error:
            raise ConfigError(f"the KV cache: {error}; lower --kv-memory") from error

    def import_memory(self, address: bytes) -> ImportedMemory:
        """What a peer exported on a device of this kind.

        Raises:
            PeerUnreachable: the peer is gone or on another machine.
            ValueError: that is no address.
        """
        return import_memory(address, self.device)

    def served(self, memory: torch.Tensor) -> ServedMemory:
        """What ranks of other machines may read: [size] uint8 of this device."""
        return (
            HostRegion(memory) if self.device.type == "cpu" else DeviceRegion(memory, self.stream)
        )

    # ---- its memory -------------------------------------------------------------------------

    @property
    def usage(self) -> GpuUsage | HostUsage:
        """What this process takes of the device's memory, where that is not the host's."""
        return HostUsage()

    def alone(self, ranks: Iterable[int]) -> bool:
        """Whether no other of these ranks of the service has the same device."""
        return True

    # ---- sizes ------------------------------------------------------------------------------

    @abstractmethod
    def warm_up_batches(self, most: int, context: int) -> list[WarmUpBatch]:
        """Batches that need each kernel once.

        Args:
            most: tokens of a step.
            context: of a sequence.
        """

    @abstractmethod
    def graph_shapes(self, most_running: int, most_tokens: int) -> list[GraphShape]:
        """Of the steps to capture as graphs, up to so many sequences and tokens; may be none."""


class CpuProfile(DeviceProfile):
    """Kernels in C, exchange over shared memory."""

    warm_up = WarmUpTime.AFTER_LOADING
    looks_ahead = False

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config)
        self.stream = HostStream()

    def make_kernels(self) -> Kernels:
        return cpu_kernels()

    def make_exchange(
        self, rank: int, spec: BufferSpec, timeout_s: float, experts: int, meeting: HeadMeeting
    ) -> Buffer:
        return make_buffer(
            rank, spec, timeout_s=timeout_s, store=meeting.store, machine=meeting.machine
        )

    def make_sampler(
        self, sampled: torch.Tensor, accepted: torch.Tensor | None = None
    ) -> TokenSampler:
        return Sampler()

    def make_moe_layers(self, buffer: Buffer, source: ModelSource) -> ElasticMoELayers:
        return MoERuntime(
            buffer,
            reduce="home" if self.config.deterministic else "rank",
            layers=source.info.moe_layers,
            experts=source.info.experts,
        )

    def make_expert_store(self, rank: int, source: ModelSource) -> Store:
        return ExpertStore(
            rank,
            source.expert_shapes(),
            source.info.experts,
            deterministic=self.config.deterministic,
            maps=source.map_experts if maps_experts(self.config, source) else None,
        )

    def warm_up_batches(self, most: int, context: int) -> list[WarmUpBatch]:
        sizes = padded_sizes(most)
        if self.config.deterministic:
            sizes = sorted({min(rows, most) for rows in (1, 2, most)})
        # what is compiled for a size is the dense part; experts of a large model take seconds
        return [WarmUpBatch(rows, experts=rows <= 2 or rows == sizes[-1]) for rows in sizes]

    def graph_shapes(self, most_running: int, most_tokens: int) -> list[GraphShape]:
        return []


class TritonProfile(DeviceProfile):
    """Kernels in Triton. A service whose capacity is one rank exchanges nothing: that rank holds
    all experts."""

    def __init__(self, config: EngineConfig, stream: DeviceStream) -> None:
        super().__init__(config)
        self.stream = stream
        nixl_ep = config.all2all == "nixl_ep"
        self.looks_ahead = not nixl_ep  # which tells what it met by waiting for the device
        self.warm_up = WarmUpTime.BEFORE_LOADING if nixl_ep else WarmUpTime.WHILE_LOADING

    def make_kernels(self) -> Kernels:
        return (
            fixed_order_gpu_kernels(self.device)
            if self.config.deterministic
            else gpu_kernels(self.device)
        )

    def make_exchange(
        self, rank: int, spec: BufferSpec, timeout_s: float, experts: int, meeting: HeadMeeting
    ) -> Buffer:
        if self.config.all2all == "nixl_ep" and spec.capacity > 1:
            return _make_nixl_ep(rank, spec, timeout_s, experts)
        from flexpert.comm.cuda.cuda_runtime import CudaError  # needs torch with CUDA

        try:
            return make_buffer(
                rank,
                spec,
                backend="cuda",
                timeout_s=timeout_s,
                store=meeting.store,
                machine=meeting.machine,
                channel="auto" if meeting.several else "shm",
                choices=result_rows(self.config, spec.topk),
            )
        except CudaError as error:
            raise ConfigError(f"{error}; lower --max-tokens-per-step or --max-ranks") from error

    def make_sampler(
        self, sampled: torch.Tensor, accepted: torch.Tensor | None = None
    ) -> TokenSampler:
        from flexpert.engine.device_sampler import DeviceSampler  # needs triton

        deterministic = self.config.deterministic
        return DeviceSampler(sampled, self.stream, accepted=accepted, deterministic=deterministic)

    def make_moe_layers(self, buffer: Buffer, source: ModelSource) -> ElasticMoELayers:
        info = source.info
        of_model = info.moe_layers, info.experts, source.expert_shape(), self.device
        deterministic = self.config.deterministic
        if buffer.spec.capacity == 1:
            from flexpert.moe.cuda.local_experts import LocalExperts  # needs triton

            return LocalExperts(buffer.rank, *of_model, deterministic=deterministic)
        from flexpert.moe.cuda.exchanged_experts import ExchangedExperts  # needs triton

        return ExchangedExperts(buffer, *of_model, deterministic=deterministic)

    def make_expert_store(self, rank: int, source: ModelSource) -> Store:
        from flexpert.moe.cuda.device_expert_store import DeviceExpertStore  # needs triton

        shapes = source.expert_shapes()
        return DeviceExpertStore(rank, shapes, source.info.experts, self.device)


class CudaProfile(TritonProfile):
    """An NVIDIA GPU; several are dealt out to the ranks in turn."""

    def __init__(self, config: EngineConfig, rank: int) -> None:
        """Raises: ConfigError: there is no GPU, or what the settings need is not installed."""
        check_device(config)
        self._gpus = torch.cuda.device_count()
        device = torch.device("cuda", rank % self._gpus)
        self._usage = GpuUsage(device.index, find_driver())  # before it is opened
        torch.cuda.set_device(device)
        super().__init__(config, CudaStream(device))

    @property
    def usage(self) -> GpuUsage | HostUsage:
        return self._usage

    def alone(self, ranks: Iterable[int]) -> bool:
        return sum(rank % self._gpus == self.device.index for rank in ranks) == 1

    def warm_up_batches(self, most: int, context: int) -> list[WarmUpBatch]:
        return triton_batches(most, context, deterministic=self.config.deterministic)

    def graph_shapes(self, most_running: int, most_tokens: int) -> list[GraphShape]:
        return captured_shapes(most_running, most_tokens)


class InterpreterProfile(TritonProfile):
    """Triton's interpreter on a CPU, which compiles nothing: the fewest sizes will do. What a step
    takes there says nothing."""

    measures_steps = False

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config, HostStream())

    def warm_up_batches(self, most: int, context: int) -> list[WarmUpBatch]:
        return [WarmUpBatch(2)]

    def graph_shapes(self, most_running: int, most_tokens: int) -> list[GraphShape]:
        return [GraphShape(1, 1)]


def profile_of(config: EngineConfig, rank: int = 0) -> DeviceProfile:
    """The profile of a rank, by its settings; opens the device.

    Raises:
        ConfigError: it cannot be used; says what to do.
    """
    if config.device == "cpu":
        return CpuProfile(config)
    if uses_gpu(config):
        return CudaProfile(config, rank)
    return InterpreterProfile(config)


def uses_gpu(config: EngineConfig) -> bool:
    """Whether ranks compute on GPUs, and not on a CPU, perhaps in the place of a GPU."""
    return config.device == "cuda" and not (INTERPRETED and not torch.cuda.is_available())


def check_device(config: EngineConfig) -> None:
    """Whether a rank of this machine could open what the settings need; opens nothing.

    Raises:
        ConfigError: there is no GPU or no such network interface, or something is not installed;
            says what to do.
    """
    check_network(config)
    if uses_gpu(config):
        check_gpu()
        if config.all2all == "nixl_ep":
            find_nixl_ep()


def find_driver() -> GpuDriver | None:
    """What says how much memory the GPUs have, without opening one; None: nothing does, or not of
    those that CUDA sees (it counts a MIG instance that is named by a number)."""
    return driver_of(torch.cuda.device_count())


def find_nixl_ep() -> None:
    """Raises: ConfigError: NVIDIA's package cannot be used here; says what is missing."""
    from flexpert.comm.nixl_ep.package import find

    try:
        find()
    except CommError as error:
        raise ConfigError(f"--all2all nixl_ep: {error}") from error


def _make_nixl_ep(rank: int, spec: BufferSpec, timeout_s: float, experts: int) -> Buffer:
    try:
        return make_buffer(rank, spec, backend="nixl_ep", slots=experts, timeout_s=timeout_s)
    except (CommError, ValueError) as error:
        raise ConfigError(f"--all2all nixl_ep: {error}") from error


def triton_batches(most: int, context: int, *, deterministic: bool = False) -> list[WarmUpBatch]:
    """Batches that choose each kernel once: each tiling by the number of tokens, and attention of
    few and many sequences and of a chunk of a long prompt, with their keys whole and cut."""
    sizes = {2, 16, 64, 256, 1024, most}
    if deterministic:  # linear layers have tilings of their own
        sizes |= {32, 128}
    batches = [WarmUpBatch(rows) for rows in sorted({min(rows, most) for rows in sizes})]
    batches.append(WarmUpBatch(min(256, most), context=context))
    for sequences in (1, FEW + 1):
        if sequences + 1 <= most:
            batches += [
                WarmUpBatch(sequences + 1, sequences),
                WarmUpBatch(sequences + 1, sequences, context),
            ]
    return list(dict.fromkeys(batches))


def captured_shapes(most_running: int, most_tokens: int) -> list[GraphShape]:
    """Graphs that pad a batch to less than twice its size.

    Steps that decode 1, 2, 4, 8, 16, 24, 32, 48, 64, 96, … `most_running` sequences, or
    `MOST_CAPTURED` if that is less; steps with prompts of 128, 192, 256, … `most_tokens` tokens, of
    half as many sequences, at most as many as run.
    """
    running = _graph_sizes(min(most_running, MOST_CAPTURED))
    shapes = [GraphShape(size, size) for size in running]
    if most_tokens >= LEAST_CAPTURED_TOKENS:
        for tokens in _graph_sizes(most_tokens):
            if tokens >= LEAST_CAPTURED_TOKENS:
                shapes.append(GraphShape(tokens, min(most_running, tokens // 2)))
    return shapes


def _graph_sizes(most: int) -> list[int]:
    """1, 2, 4, 8, 16, 24, 32, 48, 64, 96, … `most`."""
    return sorted({min(graph_size(rows), most) for rows in range(1, most + 1)})


def maps_experts(config: EngineConfig, source: ModelSource) -> bool:
    """Whether ranks on CPUs use experts where the checkpoint is mapped. By themselves they copy
    those of a small model: it is done at once, and depends on no file any more."""
    if config.map_experts != "auto":
        return config.map_experts == "on"
    return sum(s.nbytes for s in source.expert_shapes()) * source.info.experts >= MAPPED_BYTES


def set_threads(config: EngineConfig, hidden: int, members: int) -> None:
    """How many threads compute in this process, which is one of `members` ranks."""
    cores = len(os.sched_getaffinity(0))
    # Sleeping threads take longer to wake than small products take: with 256 channels two
    # threads gave 1,190 tokens/s where one gave 2,080, with 1,024 channels they gave the same.
    worth_it = hidden >= THREADED_HIDDEN
    share = config.threads or (max(1, cores // members) if worth_it else 1)
    # one thread of torch: how it splits a product over threads must not decide the product's bits
    torch.set_num_threads(1 if config.deterministic else share)
    ops.set_threads(config.threads or max(1, cores // members))
