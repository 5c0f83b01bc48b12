"""The baseline: replicas to the experts with the most load, all packed from nothing (pure).

That is the idea of DeepSeek's load balancer as it is described in public: a further replica goes to
the expert with the largest load a replica, and the replicas are packed from the largest down, each
on the rank with the least load that has a free slot. Where they lay before does not matter to it.
"""

from __future__ import annotations

from heapq import heapify, heapreplace

from flexpert.moe.expert_loads import ExpertLoads
from flexpert.moe.placement import Placement


def replicate_and_pack(loads: ExpertLoads, ranks: int, slots: int) -> Placement:
    """On ranks 0 to `ranks` - 1 with so many slots each in a layer."""
    layers = [_layer([float(load) for load in layer], ranks, slots) for layer in loads]
    return Placement(len(loads[0]), layers)


def _layer(loads: list[float], ranks: int, slots: int) -> dict[int, list[int]]:
    copies = [1] * len(loads)
    heap = [(-load, expert) for expert, load in enumerate(loads)]
    heapify(heap)
    for _ in range(ranks * slots - len(loads)):
        expert = heap[0][1]
        copies[expert] += 1
        part = loads[expert] / copies[expert] if copies[expert] < ranks else -1.0
        heapreplace(heap, (-part, expert))
    order = sorted(range(len(loads)), key=lambda expert: (-loads[expert] / copies[expert], expert))
    held: dict[int, list[int]] = {rank: [] for rank in range(ranks)}
    sums = [0.0] * ranks
    for expert in order:
        free = [rank for rank in held if len(held[rank]) < slots]
        for rank in sorted(free, key=lambda rank: (sums[rank], rank))[: copies[expert]]:
            held[rank].append(expert)
            sums[rank] += loads[expert] / copies[expert]
    return {rank: sorted(of) for rank, of in held.items()}
