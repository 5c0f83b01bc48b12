"""What memory a rank needs: planned before it starts, measured while it lives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec

from flexpert.comm import BufferSpec
from flexpert.comm.window_layout import size_bytes
from flexpert.config import EngineConfig
from flexpert.device_settings import DEVICE_SETTINGS
from flexpert.engine.rank_memory import RankMemoryPlan
from flexpert.engine.rank_protocol import Memory
from flexpert.engine.state_slots import SLOTS_AHEAD, SLOTS_PER_SEQUENCE
from flexpert.errors import FlexpertError
from flexpert.models.dense_weights import mapped_nbytes
from flexpert.models.kv_cache import KVCache
from flexpert.models.source import ModelInfo, ModelSource

SERVING_BYTES = 4 * 2**20  # what requests in flight add to a warm process (measured: 3 to 6 MiB)


def private_memory(exported: int = 0, pid: int | None = None) -> int:
    """Bytes of a process that no other shares, and its part of the shared windows.

    Pages of files do not count as long as they are as in the file: whether they are this process's
    alone depends on who else runs (of a rank 27 MiB, where a second service comes and goes).

    Args:
        exported: what `comm.export_memory` takes, bytes: it counts as private while no peer has
        opened it. pid: default: this process.

    Raises: ProcessLookupError, FileNotFoundError: it is gone.
    """
    sizes = _rollup(pid)
    return sizes["Private_Dirty"] + max(0, sizes["Pss_Shmem"] - exported)


def unshared_memory(pid: int | None = None) -> int:
    """The same without any memory that can be shared: where windows are not this machine's memory,
    what else is mapped of it are files, a checkpoint in a tmpfs among them."""
    return _rollup(pid)["Private_Dirty"]


def _rollup(pid: int | None) -> dict[str, int]:
    sizes = {}
    for line in Path(f"/proc/{pid or 'self'}/smaps_rollup").read_text().splitlines()[1:]:
        name, size = line.split(":")
        sizes[name] = int(size.split()[0]) * 1024
    return sizes


def kv_blocks(info: ModelInfo, config: EngineConfig) -> int:
    """KV blocks that the configured memory holds, at least one sequence's worth of one block.

    Raises:
        FlexpertError: not even one block fits, or the device does not compute such attention with
            these settings.
    """
    indexed = any(shape.indexed for shape in info.attention)
    if indexed and config.device != "cpu" and config.deterministic:
        raise FlexpertError(
            f"attention of {info.model_type} is to the keys that an indexer picks, which with "
            "--deterministic flexpert computes on CPUs only; serve it with --device cpu"
        )
    block = info.kv_bytes_per_token() * config.kv_block_size
    blocks = config.kv_memory // block
    if blocks < 1:
        raise FlexpertError(
            f"engine.kv_memory of {config.kv_memory} bytes holds no KV block of {block} bytes; "
            "raise --kv-memory"
        )
    return int(blocks)


def state_slots(info: ModelInfo, config: EngineConfig) -> int:
    """Slots for states, of a model whose layers keep one of each sequence; 0: they keep none.

    Raises:
        FlexpertError: the device does not compute such layers, or a setting does not go with them.
    """
    if not info.states:
        return 0
    if config.device != "cpu" and config.deterministic:
        raise FlexpertError(
            f"layers of {info.model_type} keep a state of each sequence, which with "
            "--deterministic flexpert computes on CPUs only; serve it with --device cpu"
        )
    each = SLOTS_PER_SEQUENCE + (SLOTS_AHEAD if config.device != "cpu" else 0)
    running = min(config.max_running, config.max_tokens_per_step)
    proposed = 0  # rows of tokens that are proposed, each with a state behind it
    if (how := config.speculate) is not None:
        proposed = min(how.max_rows, running * how.num_speculative_tokens)
    return each * running + proposed


def most_samples(config: EngineConfig) -> int:
    """Tokens that are sampled in a step at most: one for each sequence, and those behind proposed
    ones."""
    running, how = config.max_running, config.speculate
    if how is None:
        return running
    return max(running, min(how.max_rows, running * (1 + how.num_speculative_tokens)))


def buffer_spec(info: ModelInfo, config: EngineConfig, capacity: int) -> BufferSpec:
    """The windows' size; the same on every rank of a service."""
    return BufferSpec(
        capacity=capacity,
        max_tokens=config.max_tokens_per_step,
        hidden=info.hidden,
        topk=info.topk,
        dtype=info.dtype,
    )


def planned_memory(
    source: ModelSource, config: EngineConfig, capacity: int, experts: int, members: int
) -> Memory:
    """What a rank needs of the host's memory when it holds `experts` replicas (all layers) among
    `members` ranks; of a GPU's: `flexpert.engine.device_memory_plan`."""
    return host_memory_plan(source, config, capacity).needs(experts, members)


def host_memory_plan(source: ModelSource, config: EngineConfig, capacity: int) -> RankMemoryPlan:
    """What any rank needs of the host's memory. Windows are sparse."""
    settings = DEVICE_SETTINGS[config.device]
    if not settings.uses_host_memory:
        runtime = settings.process_bytes
        return RankMemoryPlan(
            dense=0, expert=0, kv=0, windows=0, runtime=runtime, capacity=capacity
        )
    info = source.info
    return RankMemoryPlan(
        dense=source.dense_nbytes(),
        expert=source.expert_nbytes(),
        kv=kv_blocks(info, config) * config.kv_block_size * info.kv_bytes_per_token()
        + KVCache.state_nbytes(info, state_slots(info, config)),
        windows=size_bytes(buffer_spec(info, config, capacity)),
        runtime=settings.process_bytes,
        capacity=capacity,
        members_only=True,
    )


class MemoryMeter:
    """The host's memory of one rank: measured from time to time, and planned by what was measured
    first.

    measured: bytes, when they were last; 0 before that.
    """

    def __init__(
        self,
        source: ModelSource,
        config: EngineConfig,
        capacity: int,
        exported: Callable[[], int],
        mapped: Callable[[], int],
    ) -> None:
        """exported: as `private_memory` takes it, now. mapped: bytes of experts that are used
        where their files are mapped, which are not measured."""
        self.measured = 0
        self._source = source
        self._config = config
        self._capacity = capacity
        self._exported = exported
        self._mapped_experts = mapped
        self._runtime: int | None = None  # unknown until the rank is warm
        uses_host = DEVICE_SETTINGS[config.device].uses_host_memory
        self._mapped = mapped_nbytes(source) if uses_host else 0

    def measure(self) -> None:
        """From any thread; takes milliseconds."""
        if DEVICE_SETTINGS[self._config.device].uses_host_memory:
            self.measured = private_memory(self._exported())
        else:
            self.measured = unshared_memory()

    def plan(self, experts: int, members: int) -> Memory:
        """What this rank needs with so many experts and members; first when it has been measured,
        warm and without having served yet."""
        planned = planned_memory(self._source, self._config, self._capacity, experts, members)
        if self._runtime is None:  # the rest is the process itself
            own_dense = planned.dense - self._mapped  # pages of files are not measured
            own_experts = planned.experts - self._mapped_experts()
            process = self.measured - own_dense - own_experts
            self._runtime = max(0, process) + SERVING_BYTES
        return msgspec.structs.replace(planned, runtime=self._runtime)
