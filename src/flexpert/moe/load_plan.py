"""A plan by load for all layers, from and to lists of experts: slots, limits, machines (pure)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from flexpert.moe.even_placement import shares, spread_over_machines
from flexpert.moe.layer_states import Bools, Floats, Ints, LayerStates
from flexpert.moe.load_placement import changed_layers, covered_layers, fresh_layers

_TINY = 1e-9  # of a layer's mean: experts without load are spread evenly, too

Layer = Mapping[int, Sequence[int]]


def layers_by_load(
    before: Sequence[dict[int, list[int]]],
    machines: Mapping[int, str],
    loads: Floats,
    room: int | Mapping[int, int],
    min_replicas: int,
    max_moves: int | None,
) -> list[dict[int, list[int]]]:
    """Per layer: rank → its experts.

    Args:
        before: the same as it is now.
        machines: rank → its machine, of the ranks that there will be.
        loads: [layers, experts].
        room: how many replicas of each layer all ranks hold together, or rank → how many it holds.
        min_replicas, max_moves: see `flexpert.moe.placement.replan`.

    Raises:
        ValueError: there is no room for every expert, or no number of slots for a rank.
    """
    ids = sorted(machines)
    layers, experts = loads.shape
    if not layers or not experts:
        return [{rank: [] for rank in ids} for _ in range(layers)]
    slots = _slots(before, machines, room, experts)
    least = int(slots.sum(axis=1).min())
    if least < experts:
        raise ValueError(f"the ranks have {least} slots for {experts} experts of a layer")
    usable = int((slots > 0).sum(axis=1).min())
    floor = max(1, min(min_replicas, usable, least // experts))
    names = sorted(set(machines.values()))
    numbers = np.array([names.index(machines[rank]) for rank in ids], dtype=np.intp)
    weights = _weights(loads)
    home = _held(before, ids, experts)

    if not home.any():
        states = fresh_layers(weights, slots, numbers, floor)
    else:
        states = changed_layers(weights, home, slots, numbers, floor)
        if max_moves is not None:
            states = _limited(states, loads, max_moves)
    planned = [
        {rank: np.flatnonzero(held[:, place]).tolist() for place, rank in enumerate(ids)}
        for held in states.held
    ]
    if states.several:
        every = np.arange(experts)[None]
        alone = (states.copies > 1) & (states.spread(np.arange(layers)[:, None], every) == 1)
        for index in np.flatnonzero(alone.any(axis=1)):
            spread_over_machines(planned[index], machines, experts, most=2)
    return planned


def _weights(loads: Floats) -> Floats:
    """[layers, experts] with a mean of 1."""
    most = loads.max(axis=1, keepdims=True)
    shares = np.divide(loads, most, out=np.ones_like(loads), where=most > 0)
    weights: Floats = shares / shares.mean(axis=1, keepdims=True) + _TINY
    return weights


def _held(before: Sequence[Layer], ids: Sequence[int], experts: int) -> Bools:
    """[layers, experts, ranks]"""
    held = np.zeros((len(before), experts, len(ids)), dtype=np.bool_)
    for index, layer in enumerate(before):
        for place, rank in enumerate(ids):
            held[index, list(layer.get(rank, ())), place] = True
    return held


def _slots(
    before: Sequence[dict[int, list[int]]],
    machines: Mapping[int, str],
    room: int | Mapping[int, int],
    experts: int,
) -> Ints:
    """[layers, ranks]"""
    ids = sorted(machines)
    if not isinstance(room, int):
        wrong = [rank for rank in ids if room.get(rank, -1) < 0]
        if wrong:
            raise ValueError(f"rank {wrong[0]} has no number of slots")
        one = [min(experts, room[rank]) for rank in ids]
        return np.array([one] * len(before), dtype=np.intp)
    totals = dict.fromkeys(ids, 0)
    slots = []
    for layer in before:
        quota = shares(layer, machines, room, totals)
        for rank in ids:
            totals[rank] += quota[rank]
        slots.append([quota[rank] for rank in ids])
    return np.array(slots, dtype=np.intp)


def _limited(states: LayerStates, loads: Floats, max_moves: int) -> LayerStates:
    """As many layers of `states` as `max_moves` allow, those that gain most for each load first;
    the others hold what they have, and load what nobody has."""
    least = covered_layers(states.weights, states.home, states.slots, states.machines, states.floor)
    extra = states.moves - least.moves
    if extra.sum() <= max_moves:
        return states
    gain = (least.loads.max(axis=1) - states.loads.max(axis=1)) * loads.sum(axis=1)
    left = max_moves
    for index in np.lexsort((np.arange(len(gain)), -gain / np.maximum(extra, 0.5))):
        if gain[index] > 0 and extra[index] <= left:
            left -= max(0, int(extra[index]))
            least.take(np.array([index]), states, np.array([index]))
    return least
