"""What memory a rank needs, by the experts that it holds (pure)."""

from __future__ import annotations

import msgspec

from flexpert.engine.rank_protocol import Memory


class RankMemoryPlan(msgspec.Struct, frozen=True, kw_only=True):
    """Of the host's memory or of a GPU's, in bytes.

    kv: of keys, values and states. expert: of each replica of an expert. windows: of the whole
    capacity. members_only: only the regions of members are ever touched of them. runtime: of the
    process itself.
    """

    dense: int
    expert: int
    kv: int
    windows: int
    runtime: int
    capacity: int
    members_only: bool = False

    def needs(self, experts: int, members: int, runtime: int | None = None) -> Memory:
        """Of a rank that holds `experts` replicas (all layers) among `members` ranks.

        runtime: as a rank has measured it.
        """
        return Memory(
            dense=self.dense,
            experts=experts * self.expert,
            kv=self.kv,
            windows=self.windows * members // self.capacity if self.members_only else self.windows,
            runtime=self.runtime if runtime is None else runtime,
        )
