"""The memory of a GPU that one rank takes, measured while it lives.

Of a whole GPU the driver says how much is in use, not by whom. So a rank counts what it has
allocated, and finds out once, when it is warm, what the driver took besides: how much more of the
GPU is in use than before the rank opened it. Where others may have allocated meanwhile, that is an
estimate.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import msgspec

from flexpert.engine.device_memory_plan import CONTEXT_BYTES
from flexpert.engine.rank_protocol import Memory

MOST_CONTEXT_BYTES = 2 * 2**30
"""More than that is not the driver's: others have allocated meanwhile."""


class DeviceUsage(Protocol):
    """How the rest of what a process takes of its device is known."""

    def pool(self, weights: int) -> int:
        """Bytes that torch holds. weights: those of the dense part, which lie there."""

    def besides(self, counted: int) -> int | None:
        """Bytes that the driver took for this process besides `counted`; None: it is not known."""


@runtime_checkable
class Slabs(Protocol):
    """allocated: bytes of the device that a store of experts takes. spare: of these, what no
    expert has."""

    @property
    def allocated(self) -> int: ...
    @property
    def spare(self) -> int: ...


class DeviceMeter:
    """See the module's docstring.

    used: bytes, when it was measured last; spare: of these, what is kept for experts to come.
    """

    def __init__(
        self,
        usage: DeviceUsage,
        slabs: Slabs,
        plan: Callable[[int], Memory],
        *,
        weights: int,
        allocated: int,
    ) -> None:
        """
        Args:
            plan: experts → what a rank with so many needs, before any was measured.
            weights: bytes of the dense part.
            allocated: of the KV cache and the windows.
        """
        self.used = 0
        self.spare = 0
        self._usage = usage
        self._slabs = slabs
        self._plan = plan
        self._weights = weights
        self._allocated = allocated
        self._context = CONTEXT_BYTES
        self._runtime: int | None = None  # unknown until the rank is warm

    def measure(self) -> None:
        """From any thread."""
        counted = self._usage.pool(self._weights) + self._allocated + self._slabs.allocated
        self.used = counted + self._context
        self.spare = self._slabs.spare

    def warm(self, *, alone: bool) -> None:
        """The rank has everything but requests. alone: on its device, of all ranks of the service;
        else what the driver took for each cannot be told apart. Only the first call counts."""
        if self._runtime is not None:
            return
        pool = self._usage.pool(self._weights)
        counted = pool + self._allocated + self._slabs.allocated
        besides = self._usage.besides(counted) if alone else None
        if besides is not None and 0 <= besides <= MOST_CONTEXT_BYTES:
            self._context = besides
        self._runtime = self._context + max(0, pool - self._plan(0).dense)
        self.measure()

    def plan(self, experts: int) -> Memory:
        """What this rank needs with so many; its runtime as measured, once it is warm."""
        planned = self._plan(experts)
        if self._runtime is None:
            return planned
        return msgspec.structs.replace(planned, runtime=self._runtime)
