"""Whether ranks have the memory for what they would hold."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import psutil

from flexpert.cluster.formatting import mib
from flexpert.cluster.gpu_budget import GpuBudget
from flexpert.cluster.hosts.agent_protocol import FreeMemory
from flexpert.cluster.served_model import ServedModel
from flexpert.config import Config
from flexpert.device_settings import DEVICE_SETTINGS
from flexpert.engine.gpu_driver import GpuDriver
from flexpert.engine.rank_protocol import Memory, MemoryUse
from flexpert.errors import OperationRefused
from flexpert.moe.placement import Placement


def free_memory(config: Config) -> int:
    """Bytes of this machine that ranks may take: what is free, less the headroom.

    Raises: OperationRefused: the system does not say it.
    """
    try:
        memory = psutil.virtual_memory()
    except OSError as error:  # no descriptor is left to read it with
        raise OperationRefused(
            f"how much memory is free cannot be read: {error.strerror}; "
            "too many connections are open, or the limit of open files is low (ulimit -n)"
        ) from None
    return memory.available - int(memory.total * config.cluster.memory_headroom)


class MemoryBudget:
    """By the settings, the memory of this machine, and that of its GPUs.

    `memory_per_rank` bounds the memory in which weights and KV cache lie: the GPU's, or the host's.
    held: what processes that wait to join have of it already, by rank.
    elsewhere: ranks of other hosts, and what each of those had free when its model was opened.
    """

    def __init__(self, config: Config, model: ServedModel, driver: GpuDriver | None = None) -> None:
        """driver: of the GPUs; None: there are none, or how much they have is not known."""
        self._config = config
        self._model = model
        on_host = DEVICE_SETTINGS[config.engine.device].uses_host_memory
        self._gpus = None if on_host else GpuBudget(model, driver)
        self.held: Callable[[], Mapping[int, MemoryUse]] = dict
        self.elsewhere: Callable[[], Mapping[int, FreeMemory]] = dict

    def learn(self, memory: Memory) -> None:
        """A warm rank has measured what it needs of its GPU."""
        if self._gpus:
            self._gpus.learn(memory)

    def planned(self, placement: Placement, previous: Placement | None = None) -> dict[int, int]:
        """Bytes that each rank of a placement needs of the memory that `memory_per_rank` bounds.

        previous: the placement of the running epoch. On a GPU a rank needs the most while both
        are held; None: what it needs once it holds the new one.
        """
        if self._gpus:
            return self._gpus.peaks(placement, previous)
        return self._on_host(placement)

    def _on_host(self, placement: Placement) -> dict[int, int]:
        return {
            rank: self._model.host.needs(placement.count(rank), len(placement.ranks)).total
            for rank in placement.ranks
        }

    def fits(self, placement: Placement, elsewhere: Mapping[int, FreeMemory] | None = None) -> bool:
        """Whether no rank needs more than `memory_per_rank`, and no GPU more than it has.

        elsewhere: what `self.elsewhere` gives; default: what it gives now.
        """
        others = self.elsewhere() if elsewhere is None else elsewhere
        totals = self.planned(placement)
        limit = self._config.cluster.memory_per_rank
        within = limit is None or max(totals.values()) <= limit
        here = {rank: total for rank, total in totals.items() if rank not in others}
        return within and (self._gpus is None or self._gpus.fits(here))

    def check(
        self, joining: Iterable[int], placement: Placement, previous: Placement | None = None
    ) -> None:
        """Before a change begins, and before any process is started for it.

        previous: the placement of the running epoch.

        Raises:
            OperationRefused: a rank, a GPU, or this machine with the ranks that join, has less.
        """
        elsewhere = self.elsewhere()
        on_hosts = {rank: elsewhere[rank] for rank in joining if rank in elsewhere}
        joining = frozenset(joining) - set(on_hosts)
        totals = self.planned(placement, previous)
        limit = self._config.cluster.memory_per_rank
        worst = max(totals, key=lambda rank: totals[rank])
        if limit is not None and totals[worst] > limit:
            raise OperationRefused(
                f"{len(totals)} ranks cannot hold the experts: rank {worst} would need "
                f"{mib(totals[worst])} of its {mib(limit)} (memory_per_rank)"
            )
        held = self.held()
        if self._gpus:
            devices = {rank: used.device for rank, used in held.items()}
            for rank, free in on_hosts.items():
                self._check_device(rank, free, totals[rank])
            self._gpus.check(joining, placement, previous, devices, elsewhere=frozenset(elsewhere))
            totals = self._on_host(placement)
        host = {rank: used.host for rank, used in held.items()}
        for rank, free in on_hosts.items():
            if totals[rank] > free.host:
                raise OperationRefused(
                    f"rank {rank} needs {mib(totals[rank])} but its host has "
                    f"{mib(max(free.host, 0))} "
                    "of memory free; lower --kv-memory or join from another host"
                )
        if joining:
            self.check_free({rank: max(0, totals[rank] - host.get(rank, 0)) for rank in joining})

    @property
    def expert_bytes(self) -> int:
        """Of the largest expert."""
        return self._model.largest_expert

    def check_moves(self, experts: int) -> None:
        """Whether ranks of this machine can load so many while they have those that they give up.
        Of a GPU `check` knows. Raises: OperationRefused"""
        here = not self.elsewhere() and self._gpus is None
        needs = experts * self.expert_bytes
        if here and needs > (free := free_memory(self._config)):
            raise OperationRefused(
                f"{experts} experts to move need {mib(needs)}, but {mib(max(free, 0))} of memory "
                "are free until the old ones are given up"
            )

    def _check_device(self, rank: int, free: FreeMemory, needs: int) -> None:
        if free.device is not None and needs > free.device:
            raise OperationRefused(
                f"rank {rank} needs {mib(needs)} of a GPU but that of its host has "
                f"{mib(free.device)} free; lower --kv-memory or join from another host"
            )

    def check_spare(self, rank: int) -> None:
        """Whether a process fits that waits to become this rank. Raises: OperationRefused"""
        if self._gpus:
            self._gpus.check_spare(rank)
        self.check_free({rank: self._model.host.needs(0, self._config.cluster.max_ranks).total})

    def check_free(self, needs: dict[int, int]) -> None:
        """Whether this machine has the memory for newcomers. needs: rank → bytes."""
        free = free_memory(self._config)
        desired = sum(needs.values())
        if desired > free:
            raise OperationRefused(
                f"{len(needs)} more ranks need {mib(desired)} but {mib(max(free, 0))} of "
                "memory are free; lower --kv-memory or the number of ranks"
            )

    def too_small(self, ranks: Iterable[int]) -> str:
        """Said of ranks for which no placement fits."""
        limit = self._config.cluster.memory_per_rank
        bound = "the memory of their GPUs" if limit is None else f"{mib(limit)} each"
        where = "" if limit is None else " (memory_per_rank)"
        return f"ranks {sorted(ranks)} cannot hold all experts within {bound}{where}"
