"""How evenly a placement spreads a load over its ranks, and what another would gain (pure).

The load of an expert that several ranks hold counts in equal parts on each of them. Who sends what
where is decided by `Placement.owners`: a rank prefers its own replica, then one on its machine, and
the others spread. With tokens from all ranks alike the parts are about equal; they are not exact.

A step waits in every layer for the rank that has most to do there, so a layer is as slow as its
largest load, and all layers together as slow as the sum of these.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from flexpert.moe.expert_loads import ExpertLoads, load_array
from flexpert.moe.placement import Placement


def rank_loads(placement: Placement, loads: ExpertLoads) -> NDArray[np.float64]:
    """[layers, ranks] in the order of `placement.ranks`: what each has to do in each layer.

    What nobody holds counts nowhere: its tokens are routed around it.

    Raises:
        ValueError: see `load_array`.
    """
    weights = load_array(loads, len(placement.layers), placement.experts)
    result = np.zeros((len(placement.layers), len(placement.ranks)))
    for index, layer in enumerate(placement.layers):
        held = [layer.get(rank, []) for rank in placement.ranks]
        every = np.fromiter((expert for of in held for expert in of), dtype=np.intp)
        where = np.repeat(np.arange(len(held)), [len(of) for of in held])
        replicas = np.bincount(every, minlength=placement.experts)
        parts = weights[index] / np.maximum(replicas, 1)
        result[index] = np.bincount(where, weights=parts[every], minlength=len(held))
    return result


def imbalance(placement: Placement, loads: ExpertLoads) -> list[float]:
    """Per layer the largest load of a rank over the mean; 1.0 is even, and so is no load at all."""
    each = rank_loads(placement, loads)
    mean = each.mean(axis=1)
    even = np.ones_like(mean)
    return [float(of) for of in np.divide(each.max(axis=1), mean, out=even, where=mean > 0)]


def total_imbalance(placement: Placement, loads: ExpertLoads) -> float:
    """The same of all layers, weighted with their loads: the sum of the largest loads over the sum
    of the means."""
    each = rank_loads(placement, loads)
    mean = each.mean(axis=1).sum()
    return float(each.max(axis=1).sum() / mean) if mean else 1.0


def gain(before: Placement, after: Placement, loads: ExpertLoads) -> float:
    """The part of the experts' time that `after` saves under these loads; negative: it costs.

    Both are on the same ranks, or the comparison is one of different resources as well.
    """
    return 1.0 - total_imbalance(after, loads) / total_imbalance(before, loads)
