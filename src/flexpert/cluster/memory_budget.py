"""Whether ranks have the memory for what they would hold."""

from __future__ import annotations

from collections.abc import Iterable

import psutil

from flexpert.config import Config
from flexpert.engine.memory_plan import planned_memory
from flexpert.errors import OperationRefused
from flexpert.models.source import ModelSource
from flexpert.moe.placement import Placement


class MemoryBudget:
    """By the settings and the memory of this machine."""

    def __init__(self, config: Config, source: ModelSource) -> None:
        self._config = config
        self._source = source

    def planned(self, placement: Placement) -> dict[int, int]:
        """Bytes that each rank of a placement needs."""
        return {
            rank: planned_memory(
                self._source,
                self._config.engine,
                self._config.cluster.max_ranks,
                placement.count(rank),
                len(placement.ranks),
            ).total
            for rank in placement.ranks
        }

    def fits(self, placement: Placement) -> bool:
        """Whether no rank needs more than `memory_per_rank`."""
        limit = self._config.cluster.memory_per_rank
        return limit is None or max(self.planned(placement).values()) <= limit

    def check(self, joining: Iterable[int], placement: Placement) -> None:
        """Raises: OperationRefused: a rank, or this machine with the ranks that join, has less."""
        totals = self.planned(placement)
        limit = self._config.cluster.memory_per_rank
        worst = max(totals, key=lambda rank: totals[rank])
        if limit is not None and totals[worst] > limit:
            raise OperationRefused(
                f"{len(totals)} ranks cannot hold the experts: rank {worst} would need "
                f"{_mib(totals[worst])} of its {_mib(limit)} (memory_per_rank)"
            )
        self.check_free({rank: totals[rank] for rank in joining})

    def check_free(self, needs: dict[int, int]) -> None:
        """Whether this machine has the memory for newcomers. needs: rank → bytes."""
        try:
            memory = psutil.virtual_memory()
        except OSError as error:  # no descriptor is left to read it with
            raise OperationRefused(
                f"how much memory is free cannot be read: {error.strerror}; "
                "too many connections are open, or the limit of open files is low (ulimit -n)"
            ) from None
        free = memory.available - int(memory.total * self._config.cluster.memory_headroom)
        desired = sum(needs.values())
        if desired > free:
            raise OperationRefused(
                f"{len(needs)} more ranks need {_mib(desired)} but {_mib(max(free, 0))} of "
                "memory are free; lower --kv-memory or the number of ranks"
            )

    def too_small(self, ranks: Iterable[int]) -> str:
        """Said of ranks for which no placement fits."""
        return (
            f"ranks {sorted(ranks)} cannot hold all experts within "
            f"{_mib(self._config.cluster.memory_per_rank or 0)} each (memory_per_rank)"
        )


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"
