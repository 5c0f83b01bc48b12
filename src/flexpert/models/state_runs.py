"""Which rows of a step a layer with a state computes together, and where the states lie. Pure.

A sequence's states at all layers lie in one *slot*. A step never changes a slot that it reads: it
writes the state after it to another one, so that a step that was broken can be computed again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

NO_STATE = -1
"""In place of a slot: the sequence begins, and there is no state yet."""


@dataclass(frozen=True)  # without slots: what is worked out is kept, for all layers
class StateRuns:
    """R runs of consecutive rows, each of one sequence, that cover a step's rows in order.

    A sequence has several runs where a state in the middle of its rows is to be kept; then one run
    writes what the next one reads.

    begins: R + 1 rows; run r has the rows begins[r] … begins[r + 1] - 1. sources, targets: R slots
    that it reads (or `NO_STATE`) and writes. decodes: so many runs, the first ones, have one row
    each, of sequences that have a state: the row that one decodes, and those of what is proposed to
    come after it.
    """

    begins: Sequence[int]
    sources: Sequence[int]
    targets: Sequence[int]
    decodes: int

    def __len__(self) -> int:
        return len(self.targets)

    def goes_on(self, run: int) -> bool:
        """Whether a run reads what the one before it writes."""
        return run > 0 and self.sources[run] == self.targets[run - 1]

    @cached_property
    def apart(self) -> bool:
        """Whether each run is a row that decodes, of a sequence of its own."""
        return self.decodes == len(self) and not any(map(self.goes_on, range(len(self))))

    @cached_property
    def waves(self) -> list[list[int]]:
        """Of the runs that decode those that may be computed at one time, in turn: the first of
        each sequence, then the second ones, and so on."""
        found: list[list[int]] = []
        depth = 0
        for run in range(self.decodes):
            depth = depth + 1 if self.goes_on(run) else 0
            if depth == len(found):
                found.append([])
            found[depth].append(run)
        return found
