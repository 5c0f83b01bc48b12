"""All layers while their replicas are placed by load: who holds what, how much each rank does.

Layers are worked on together, one replica of each at a time, because one operation on an array of
all costs little more than on one. Ranks and machines are numbered from 0 here, in the order of
their ids and names. `at` are indices of layers, each at most once, and what goes with them is as
long: `add(at, experts, ranks)` adds one expert to one rank in each of these layers.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.intp]
Bools = NDArray[np.bool_]

NOBODY = -1


class LayerStates:
    """`add` and `drop` keep every figure right.

    Args:
        weights: [layers, experts], the load of each.
        home: [layers, experts, ranks], what lies on a rank already and costs nothing there.
        slots: [layers, ranks], replicas that each can hold.
        machines: [ranks], the number of each one's machine.
        floor: replicas of which nothing is dropped.
        empty: begin with nothing, not with what is home.

    held: [layers, experts, ranks]. copies: [layers, experts]. parts: [layers, experts], the load of
    each replica. loads: [layers, ranks]. room: [layers, ranks], slots that are free; negative: too
    much is held.
    """

    def __init__(
        self,
        weights: Floats,
        home: Bools,
        slots: Ints,
        machines: Ints,
        floor: int,
        *,
        empty: bool = False,
    ) -> None:
        self.weights, self.home, self.slots, self.machines = weights, home, slots, machines
        self.floor = floor
        self.held = np.zeros_like(home) if empty else home.copy()
        self.copies = self.held.sum(axis=2, dtype=np.intp)
        self.parts = weights / np.maximum(self.copies, 1)
        self.loads = np.einsum("le,ler->lr", self.parts, self.held)
        self.room = slots - self.held.sum(axis=1, dtype=np.intp)
        self.several = bool(machines.any())
        # [layers, machines, experts]
        self._on = np.zeros((len(weights), int(machines.max()) + 1, weights.shape[1]), np.intp)
        if self.several:
            for rank, machine in enumerate(machines):
                self._on[:, machine] += self.held[:, :, rank]

    @property
    def layers(self) -> int:
        return len(self.weights)

    @property
    def ranks(self) -> int:
        return len(self.machines)

    @property
    def means(self) -> Floats:
        """[layers], the load of a rank."""
        means: Floats = self.weights.sum(axis=1) / self.ranks
        return means

    @property
    def moves(self) -> Ints:
        """[layers], replicas that must be loaded."""
        moves: Ints = np.count_nonzero(self.held & ~self.home, axis=(1, 2))
        return moves

    def take(self, at: Ints, other: LayerStates, theirs: Ints) -> None:
        """These layers become as some of another's are."""
        for name in ("held", "copies", "parts", "loads", "room", "_on"):
            getattr(self, name)[at] = getattr(other, name)[theirs]

    # ---- changes ------------------------------------------------------------------------------

    def add(self, at: Ints, experts: Ints, ranks: Ints) -> None:
        self._share(at, experts, self.copies[at, experts] + 1)
        self.held[at, experts, ranks] = True
        self.loads[at, ranks] += self.parts[at, experts]
        self._count(at, experts, ranks, 1)

    def drop(self, at: Ints, experts: Ints, ranks: Ints) -> None:
        self.held[at, experts, ranks] = False
        self.loads[at, ranks] -= self.parts[at, experts]
        self._share(at, experts, self.copies[at, experts] - 1)
        self._count(at, experts, ranks, -1)

    def move(self, at: Ints, experts: Ints, sources: Ints, targets: Ints) -> None:
        part = self.parts[at, experts]
        for ranks, more in ((sources, -1), (targets, 1)):
            self.held[at, experts, ranks] = more > 0
            self.loads[at, ranks] += more * part
            self._count(at, experts, ranks, more)

    def place(self, experts: Ints, ranks: Bools) -> None:
        """An expert of each layer that nobody holds, on any number of ranks ([layers, ranks])."""
        at = np.arange(self.layers)
        self.copies[at, experts] = ranks.sum(axis=1)
        self.parts[at, experts] = self.weights[at, experts] / np.maximum(1, ranks.sum(axis=1))
        self.held[at, experts] = ranks
        self.loads += ranks * self.parts[at, experts][:, None]
        self.room -= ranks
        if self.several:
            layer, rank = np.nonzero(ranks)
            np.add.at(self._on, (layer, self.machines[rank], experts[layer]), 1)

    def _share(self, at: Ints, experts: Ints, copies: Ints) -> None:
        parts = self.weights[at, experts] / np.maximum(copies, 1)
        more = parts - self.parts[at, experts]
        self.loads[at] += more[:, None] * self.held[at, experts]
        self.parts[at, experts], self.copies[at, experts] = parts, copies

    def _count(self, at: Ints, experts: Ints, ranks: Ints, more: int) -> None:
        self.room[at, ranks] -= more
        if self.several:
            self._on[at, self.machines[ranks], experts] += more

    # ---- machines -----------------------------------------------------------------------------

    def spread(self, at: Ints, experts: Ints) -> Ints:
        """On how many machines experts are; arrays that fit each other."""
        spread: Ints = np.count_nonzero(self._on[at, :, experts], axis=-1)
        return spread

    def alone_on(self, at: Ints, ranks: Ints) -> Bools:
        """[at, experts]: whether each is on the machine of that rank, and on no other."""
        there = self._on[at, self.machines[ranks]] > 0
        alone: Bools = there & (np.count_nonzero(self._on[at], axis=1) == 1)
        return alone

    def may_drop(self, at: Ints, experts: Ints, ranks: Ints) -> Bools:
        """Whether an expert that a rank holds keeps `floor` replicas without it, and two machines
        if it is on two; arrays that fit each other."""
        copies = self.copies[at, experts]
        enough: Bools = copies > max(1, self.floor)
        if self.several:
            there = self._on[at, self.machines[ranks], experts] > 1
            enough = enough & (there | (copies == 2) | (self.spread(at, experts) != 2))
        return enough

    def may_move(self, at: Ints, experts: Ints, sources: Ints, targets: Ints) -> Bools:
        """Whether an expert keeps two machines, if it is on two, when it goes from one rank to
        another; arrays that fit each other."""
        if not self.several:
            return np.ones(np.broadcast_shapes(experts.shape, targets.shape), dtype=np.bool_)
        here, there = self.machines[sources], self.machines[targets]
        stays: Bools = (
            (here == there)
            | (self._on[at, here, experts] > 1)
            | (self._on[at, there, experts] == 0)
            | (self.spread(at, experts) != 2)
        )
        return stays


def listed(mask: Bools) -> Ints:
    """[..., places]: the indices that are true in the last axis, then NOBODY."""
    flat = mask.reshape(-1, mask.shape[-1])
    counts = flat.sum(axis=1, dtype=np.intp)
    row, column = np.nonzero(flat)
    found = np.full((len(flat), max(1, int(counts.max(initial=0)))), NOBODY)
    found[row, np.arange(len(row)) - (counts.cumsum() - counts)[row]] = column
    return found.reshape(*mask.shape[:-1], -1)
