"""Whether the GPUs have the memory for what ranks would hold, before anything is loaded.

Ranks are dealt out to the GPUs in turn, so that several may share one. A change loads experts
before it drops any: until it has committed, a rank holds those of both epochs, and a leaver all of
its memory.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Set
from types import MappingProxyType

from flexpert.cluster.formatting import ids, memory_parts, mib
from flexpert.cluster.served_model import ServedModel
from flexpert.engine.gpu_driver import GpuDriver
from flexpert.engine.rank_protocol import Memory
from flexpert.errors import OperationRefused
from flexpert.moe.placement import Placement


class GpuBudget:
    """By what the driver says, and what ranks have measured."""

    def __init__(self, model: ServedModel, driver: GpuDriver | None) -> None:
        """driver: None: how much a GPU has is not known, and nothing is refused for it."""
        assert model.device is not None
        self._plan = model.device
        self._driver = driver
        self._runtime: int | None = None

    def learn(self, memory: Memory) -> None:
        """What a warm rank has measured holds for those to come."""
        self._runtime = max(self._runtime or 0, memory.runtime)

    def planned(self, experts: int) -> Memory:
        """What a rank with so many experts needs of its GPU."""
        return self._plan.needs(experts, self._plan.capacity, self._runtime)

    def peaks(self, placement: Placement, previous: Placement | None) -> dict[int, int]:
        """Bytes that each rank of a placement needs while it takes the place of `previous`."""
        return {
            rank: self.planned(most_held(rank, placement, previous)).total
            for rank in placement.ranks
        }

    def fits(self, totals: Mapping[int, int]) -> bool:
        """Whether GPUs of this size could hold ranks that need so much, were they all empty."""
        driver = self._driver
        if driver is None:
            return True
        sums = by_gpu(totals, driver.gpus)
        sizes = {gpu: driver.memory(gpu) for gpu in sums}
        return all(size is None or sums[gpu] <= size.total for gpu, size in sizes.items())

    def check_spare(self, rank: int) -> None:
        """Raises: OperationRefused: its GPU has not enough free for a rank without experts."""
        driver = self._driver
        memory = driver.memory(rank % driver.gpus) if driver else None
        needs = self.planned(0).total
        if driver is not None and memory is not None and needs > memory.free:
            raise OperationRefused(
                f"GPU {rank % driver.gpus} has {mib(memory.free)} of its {mib(memory.total)} free, "
                f"and it needs {mib(needs)}"
            )

    def check(
        self,
        joining: Iterable[int],
        placement: Placement,
        previous: Placement | None,
        held: Mapping[int, int] = MappingProxyType({}),
        *,
        elsewhere: Set[int] = frozenset(),
    ) -> None:
        """
        Args:
            held: bytes that newcomers have already.
            elsewhere: ranks of other hosts.

        Raises:
            OperationRefused: a GPU has not enough free for the newcomers and for what the others
                load.
        """
        driver = self._driver
        if driver is None:
            return
        needs = {
            rank: max(0, need - held.get(rank, 0))
            for rank, need in self.needs(frozenset(joining), placement, previous).items()
            if rank not in elsewhere
        }
        for gpu, desired in sorted(by_gpu(needs, driver.gpus).items()):
            memory = driver.memory(gpu)
            if memory is not None and desired > memory.free:
                there = {rank: need for rank, need in needs.items() if rank % driver.gpus == gpu}
                largest = max(there, key=lambda rank: there[rank])
                raise OperationRefused(
                    f"GPU {gpu} has {mib(memory.free)} of its {mib(memory.total)} free, and "
                    f"{_ranks(there)} {mib(desired)} more there (rank {largest} with "
                    f"{memory_parts(self.planned(placement.count(largest)), gpu=True)}); lower "
                    "--kv-memory or --max-tokens-per-step, let more ranks on more GPUs share the "
                    "experts, or quantize them (--quantization fp8)"
                )

    def needs(
        self, joining: frozenset[int], placement: Placement, previous: Placement | None
    ) -> dict[int, int]:
        """Bytes that ranks take beyond what they have: newcomers everything, others for experts."""
        growth = {
            rank: self._plan.expert * (most_held(rank, placement, previous) - previous.count(rank))
            for rank in placement.ranks
            if previous is not None and rank not in joining
        }
        fresh = {rank: self.planned(placement.count(rank)).total for rank in sorted(joining)}
        return {rank: size for rank, size in (growth | fresh).items() if size}


def most_held(rank: int, placement: Placement, previous: Placement | None) -> int:
    """Experts, over all layers, that a rank has while `placement` takes the place of `previous`."""
    after = placement.held_by(rank)
    before = previous.held_by(rank) if previous else [[]] * len(after)
    return sum(len({*new, *old}) for new, old in zip(after, before, strict=True))


def by_gpu(needs: Mapping[int, int], gpus: int) -> dict[int, int]:
    """Sums of what ranks need, for each GPU that any of them is on."""
    sums: defaultdict[int, int] = defaultdict(int)
    for rank, need in needs.items():
        sums[rank % gpus] += need
    return dict(sums)


def _ranks(needs: Mapping[int, int]) -> str:
    return f"rank{'s' if len(needs) > 1 else ''} {ids(sorted(needs))} need" + (
        "" if len(needs) > 1 else "s"
    )
