"""Replicas placed by the load of their experts (pure).

A fresh placement gives each further replica to the expert whose replicas have the most to do, then
places them from the largest down, each on the ranks that have the least so far, and lets
`load_search` even out what is left. A change keeps what is held, fills free slots, and then loads
more only as long as a rank has clearly more to do than in a fresh placement.
"""

from __future__ import annotations

from heapq import heapify, heappop, heapreplace

import numpy as np

from flexpert.moe.layer_states import Bools, Floats, Ints, LayerStates
from flexpert.moe.load_search import relieve

TOLERANCE = 0.015  # a change is done when it is so much worse than a fresh placement
_FRESH = 0.003  # a fresh one, when it is so much worse than what is even
_CLOSE = 1.003  # of that: near enough


def fresh_layers(weights: Floats, slots: Ints, machines: Ints, floor: int) -> LayerStates:
    """From nothing. weights: [layers, experts], slots: [layers, ranks], machines: [ranks]."""
    home = np.ones((*weights.shape, len(machines)), dtype=np.bool_)  # all cost the same: nothing
    states = LayerStates(weights, home, slots, machines, floor, empty=True)
    _place_all(states, replica_counts(weights, slots, floor))
    _fill(states)
    _relieve(states, states.means * (1 + _FRESH), cost=0)
    return states


def changed_layers(
    weights: Floats, home: Bools, slots: Ints, machines: Ints, floor: int
) -> LayerStates:
    """From what is held. home: [layers, experts, ranks].

    Where what is kept stands in the way of balance, less is: first replicas of which there would be
    fewer in a fresh placement, then all that would leave a rank with too much to do.
    """
    fresh = fresh_layers(weights, slots, machines, floor)
    goals = fresh.loads.max(axis=1) * (1 + TOLERANCE)

    def kept(at: Ints) -> LayerStates:
        return covered_layers(weights[at], home[at], slots[at], machines, floor)

    def thinned(at: Ints) -> LayerStates:
        states = kept(at)
        _drop_surplus(states, fresh.copies[at])
        return states

    def placed(at: Ints) -> LayerStates:
        states = LayerStates(weights[at], home[at], slots[at], machines, floor, empty=True)
        _place_all(states, fresh.copies[at], goals[at])
        return states

    result = kept(np.arange(len(weights)))
    _improve(result, goals)
    for begin in (thinned, placed):
        far = np.flatnonzero(result.loads.max(axis=1) > goals * _CLOSE)
        if not len(far):
            break
        states = begin(far)
        _improve(states, goals[far])
        better = np.flatnonzero(states.loads.max(axis=1) < result.loads[far].max(axis=1))
        result.take(far[better], states, better)
    return result


def covered_layers(
    weights: Floats, home: Bools, slots: Ints, machines: Ints, floor: int
) -> LayerStates:
    """From what is held, with no more loads than hold every expert, `floor` times if there is
    room."""
    states = LayerStates(weights, home, slots, machines, floor)
    _trim(states)
    for wanted in range(1, floor + 1):
        _cover(states, wanted)
    return states


def _improve(states: LayerStates, goals: Floats) -> None:
    _fill(states)
    _relieve(states, goals, cost=0)
    _relieve(states, goals, cost=2)


def _relieve(states: LayerStates, goals: Floats, *, cost: int) -> None:
    relieve(states, goals, cost=cost, rounds=2 * min(states.ranks, 64) + 40)


# ---- fresh --------------------------------------------------------------------------------------


def replica_counts(weights: Floats, slots: Ints, floor: int) -> Ints:
    """[layers, experts]: how many replicas fill all slots. Each beyond `floor` goes to the expert
    with the largest load a replica; none has more than there are ranks."""
    return np.array(
        [
            _counts(of.tolist(), int(there.sum()), int((there > 0).sum()), floor)
            for of, there in zip(weights, slots, strict=True)
        ]
    )


def _counts(loads: list[float], replicas: int, most: int, floor: int) -> list[int]:
    copies = [floor] * len(loads)
    heap = [(-load / floor, expert) for expert, load in enumerate(loads) if floor < most]
    heapify(heap)
    for _ in range(replicas - floor * len(copies)):
        if not heap:
            break
        expert = heap[0][1]
        copies[expert] += 1
        if copies[expert] < most:
            heapreplace(heap, (-loads[expert] / copies[expert], expert))
        else:
            heappop(heap)
    return copies


def _place_all(states: LayerStates, copies: Ints, goals: Floats | None = None) -> None:
    """So many replicas of each expert, from the largest down."""
    order = np.argsort(-states.weights / copies, axis=1, kind="stable")
    every = np.arange(states.layers)
    for position, experts in enumerate(order.T):
        _place(states, experts, copies[every, experts], order.shape[1] - position, goals)


def _place(
    states: LayerStates, experts: Ints, copies: Ints, remaining: int, goals: Floats | None
) -> None:
    """Replicas of one expert a layer on the ranks that have the least to do, on two machines if
    possible; a rank that has room for all experts that remain takes each of them.

    goals: [layers], up to which ranks that have an expert already go first.
    """
    room, key = states.room, states.loads.copy()
    if goals is not None:
        every = np.arange(states.layers)
        then = states.loads + (states.weights[every, experts] / copies)[:, None]
        stays = states.home[every, experts] & (then <= goals[:, None])
        key[stays] -= states.weights.sum(axis=1, keepdims=True).repeat(states.ranks, 1)[stays] * 2
    key[room >= remaining] = -np.inf
    key[room <= 0] = np.inf
    order = np.argsort(key, axis=1, kind="stable")
    if states.several:
        order = _other_machine_second(states, order, np.take_along_axis(key, order, 1) < np.inf)
    chosen = np.zeros(key.shape, dtype=np.bool_)
    np.put_along_axis(chosen, order, np.arange(states.ranks)[None] < copies[:, None], 1)
    states.place(experts, chosen & (room > 0))


def _other_machine_second(states: LayerStates, order: Ints, able: Bools) -> Ints:
    """[layers, ranks]: the best rank on another machine than the first comes right after it."""
    here = states.machines[order]
    other = able & (here != here[:, :1])
    place = np.arange(states.ranks, dtype=np.float64)[None].repeat(states.layers, axis=0)
    rows = np.flatnonzero(other.any(axis=1))
    place[rows, other[rows].argmax(axis=1)] = 0.5
    return np.take_along_axis(order, place.argsort(axis=1, kind="stable"), 1)


# ---- change -------------------------------------------------------------------------------------


def _trim(states: LayerStates) -> None:
    """Ranks that hold more than their slots give some up, of such loads that what they keep is
    near the mean."""
    while (states.room < 0).any():
        at = np.flatnonzero((states.room < 0).any(axis=1))
        ranks = states.room[at].argmin(axis=1)
        excess = -states.room[at, ranks]
        each = np.maximum(0.0, states.loads[at, ranks] - states.means[at]) / excess
        key = np.abs(states.parts[at] - each[:, None])
        experts = np.arange(key.shape[1])[None]
        last = ~states.may_drop(at[:, None], experts, ranks[:, None])
        key[last] += states.weights[at].sum(axis=1, keepdims=True).repeat(key.shape[1], 1)[last]
        key[~states.held[at, :, ranks]] = np.inf
        states.drop(at, key.argmin(axis=1), ranks)


def _cover(states: LayerStates, wanted: int) -> None:
    """Every expert is held so many times, the largest first, as far as there is room."""
    failed = np.zeros(states.weights.shape, dtype=np.bool_)
    while True:
        thin = (states.copies < wanted) & ~failed
        at = np.flatnonzero(thin.any(axis=1))
        if not len(at):
            return
        experts = np.where(thin[at], states.weights[at], -1.0).argmax(axis=1)
        done = _load(states, at, experts)
        failed[at[~done], experts[~done]] = True


def _load(states: LayerStates, at: Ints, experts: Ints) -> Bools:
    """One more replica of one expert a layer, on a rank that has room or can drop something; where
    there is none, nothing happens. Returns where it did."""
    there = states.held[at, experts]
    far = 1e3 * states.weights[at].sum(axis=1, keepdims=True) + 1.0
    key = states.loads[at] + far * ~states.home[at, experts, :]
    if states.several:  # another machine goes before all else
        on = np.zeros((len(at), int(states.machines.max()) + 1), dtype=np.bool_)
        row, rank = np.nonzero(there)
        on[row, states.machines[rank]] = True
        key += 10 * far * on[:, states.machines]
    key[there] = np.inf
    open_ = np.where(states.room[at] > 0, key, np.inf)
    done: Bools = np.asarray(np.isfinite(open_).any(axis=1))
    states.add(at[done], experts[done], open_[done].argmin(axis=1))

    full = np.flatnonzero(~done)
    if len(full):
        done[full] = _replace(states, at[full], experts[full], key[full])
    return done


def _replace(states: LayerStates, at: Ints, experts: Ints, key: Floats) -> Bools:
    """The same where no rank has room: another expert with more replicas makes it. key: [at,
    ranks], which rank would be best."""
    copies = states.copies[at, experts]
    spare = states.copies[at] > np.maximum(copies + 1, 1)[:, None]
    load = states.weights[at, experts] / (copies + 1)
    part = np.where(spare, states.parts[at], 0.0)
    able = (states.held[at] & spare[:, :, None]).any(axis=1) & np.isfinite(key)
    rank = np.where(able, key, np.inf).argmin(axis=1)
    found: Bools = np.asarray(able.any(axis=1))
    # of that rank's experts the one whose other holders have the least to do afterwards
    after = _loads_without(states, at, rank)
    left = states.loads[at, rank][:, None] - part + load[:, None]
    worse = np.maximum(after, left)
    worse[~(states.held[at, :, rank] & spare)] = np.inf
    given = worse.argmin(axis=1)
    states.drop(at[found], given[found], rank[found])
    states.add(at[found], experts[found], rank[found])
    return found


def _loads_without(states: LayerStates, at: Ints, ranks: Ints) -> Floats:
    """[at, experts]: the largest load of the other holders when a rank drops an expert; 0 if it
    does not hold it."""
    row, expert = np.nonzero(states.held[at, :, ranks])
    layer = at[row]
    loads = np.where(states.held[layer, expert], states.loads[layer], 0.0)
    loads[np.arange(len(row)), ranks[row]] = 0.0
    copies = states.copies[layer, expert]
    more = states.weights[layer, expert] / np.maximum(copies - 1, 1) - states.parts[layer, expert]
    after = np.zeros((len(at), states.weights.shape[1]))
    after[row, expert] = loads.max(axis=1) + more
    return after


def _drop_surplus(states: LayerStates, wanted: Ints) -> None:
    """Experts that have more replicas than a fresh placement gives them drop these, on the ranks
    that have the most to do. wanted: [layers, experts]."""
    while True:
        surplus = states.copies > np.maximum(wanted, states.floor)
        at = np.flatnonzero(surplus.any(axis=1))
        if not len(at):
            return
        experts = np.where(surplus[at], states.parts[at], np.inf).argmin(axis=1)
        loads = np.where(states.held[at, experts], states.loads[at], -1.0)
        states.drop(at, experts, loads.argmax(axis=1))


def _fill(states: LayerStates) -> None:
    """Free slots are filled with what takes the most off those who have much to do: the sum of the
    squares of all loads becomes as small as one more replica can make it."""
    every = np.arange(states.layers)
    closed = states.room <= 0
    often = max(1, states.ranks // 16)
    holders = np.zeros(states.weights.shape)
    step = 0
    while True:
        at = every[~closed.all(axis=1)]
        if not len(at):
            return
        if step % often == 0:
            copies = np.maximum(states.copies[at], 1)
            holders[at] = np.einsum("ler,lr->le", states.held[at], states.loads[at]) / copies
        step += 1
        ranks = np.where(closed[at], np.inf, states.loads[at]).argmin(axis=1)
        copies = states.copies[at]
        share = states.weights[at] / (copies + 1)
        gain = 2 * share * (holders[at] - states.loads[at, ranks][:, None])
        gain -= share * share * (1 + 1 / np.maximum(copies, 1))
        if states.several and states.floor > 1:
            alone = states.spread(at[:, None], np.arange(gain.shape[1])[None]) == 1
            alone &= ~states.alone_on(at, ranks)
            gain += alone * (10 * states.weights[at].sum(axis=1, keepdims=True) ** 2)
        gain[states.held[at, :, ranks]] = -np.inf
        experts = gain.argmax(axis=1)
        fits = np.isfinite(gain[np.arange(len(at)), experts])
        states.add(at[fits], experts[fits], ranks[fits])
        closed[at[~fits], ranks[~fits]] = True
        closed[at, ranks] |= states.room[at, ranks] <= 0
