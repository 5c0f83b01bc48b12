"""Local search: takes load off the ranks that have the most, for the fewest loads (pure).

In each step one expert of a loaded rank is shared with a rank that has little to do, moved there,
or exchanged for another, or the rank drops a replica that others hold as well. A step makes the
loads that it changes all smaller than the one it began with, so the search comes to an end.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from flexpert.moe.layer_states import NOBODY, Bools, Floats, Ints, LayerStates, listed

_LEAST_RELIEF = 3e-4  # of the mean load; less is not worth a step
_TARGETS = 8  # ranks of little load that are looked at for each that has much
_RANKS_A_SOURCE = 64  # so many ranks have one source in a round, twice as many have two
_LOOKED_AT = 32  # ranks of much load
_MOST_CHOICES = 3_000_000  # that are compared in a round
_SHARE, _MOVE, _SWAP, _DROP = range(4)
_THINNER = 0.5  # what relief counts if it takes a replica away


@dataclass(frozen=True, slots=True)
class _Steps:
    """One step of each row; arrays of one length. kind: NOBODY: there is none. other: what the
    target gives up, or NOBODY."""

    kind: Ints
    expert: Ints
    target: Ints
    other: Ints
    worth: Floats

    def better(self, other: _Steps) -> _Steps:
        first = self.worth >= other.worth
        return _Steps(
            np.where(first, self.kind, other.kind),
            np.where(first, self.expert, other.expert),
            np.where(first, self.target, other.target),
            np.where(first, self.other, other.other),
            np.maximum(self.worth, other.worth),
        )


@dataclass(frozen=True, slots=True)
class _Rows:
    """at: layers. turn: the how manieth source of its layer each is. targets: [rows, targets]."""

    at: Ints
    turn: Ints
    sources: Ints
    targets: Ints


def relieve(states: LayerStates, goals: Floats, *, cost: int, rounds: int) -> None:
    """Steps until no rank has more to do than its layer's goal, or none helps any more.

    Args:
        goals: [layers].
        cost: replicas that one step may make more to load than before it.
        rounds: the most.
    """
    active = np.arange(states.layers)
    for _ in range(rounds):
        active = active[states.loads[active].max(axis=1, initial=0.0) > goals[active]]
        if not len(active):
            return
        rows = _rows(states, active, goals)
        steps = _best_steps(states, rows, goals, cost)
        first = rows.turn == 0
        stuck = rows.at[first & (steps.worth <= 0)]
        for turn in range(int(rows.turn.max()) + 1):
            chosen = (rows.turn == turn) & (steps.worth > 0)
            if turn:
                chosen &= steps.kind != _DROP
            _apply(states, rows, steps, np.flatnonzero(chosen))
        active = np.setdiff1d(active, stuck)


def _rows(states: LayerStates, active: Ints, goals: Floats) -> _Rows:
    """The ranks with the most load in each layer, and the targets of each: none has two."""
    most = max(1, states.ranks // _RANKS_A_SOURCE)
    loads = states.loads[active]
    order = np.argsort(loads, axis=1, kind="stable")
    count = min(_TARGETS, (states.ranks - 1) // most)
    sources = order[:, ::-1][:, :most]
    targets = np.stack([order[:, turn::most][:, :count] for turn in range(most)], axis=1)
    layer, turn = np.nonzero(np.take_along_axis(loads, sources, 1) > goals[active][:, None])
    return _Rows(active[layer], turn, sources[layer, turn], targets[layer, turn])


def _apply(states: LayerStates, rows: _Rows, steps: _Steps, chosen: Ints) -> None:
    at, source, target = rows.at[chosen], rows.sources[chosen], steps.target[chosen]
    kind, expert, other = steps.kind[chosen], steps.expert[chosen], steps.other[chosen]
    drops, swaps = kind == _DROP, kind == _SWAP
    gives = (other != NOBODY) & ~swaps
    # what was done for other sources of this round may have left fewer replicas
    fine = ~gives | states.may_drop(at, other, target)
    fine &= ~swaps | states.may_move(at, other, target, source)
    fine &= drops | (kind == _SHARE) | states.may_move(at, expert, source, target)

    def only(those: Bools) -> Bools:
        fit: Bools = those & fine
        return fit

    for these, experts, ranks in ((drops, expert, source), (gives, other, target)):
        now = only(these)
        states.drop(at[now], experts[now], ranks[now])
    now = only(swaps)
    states.move(at[now], other[now], target[now], source[now])
    now = only(kind == _SHARE)
    states.add(at[now], expert[now], target[now])
    now = only(swaps | (kind == _MOVE))
    states.move(at[now], expert[now], source[now], target[now])


def _best_steps(states: LayerStates, rows: _Rows, goals: Floats, most_cost: int) -> _Steps:
    mine = listed(states.held[rows.at, :, rows.sources])
    best = _drops(states, rows, mine, goals)
    if rows.targets.shape[1]:
        for steps in _exchanges(states, rows, mine, goals, most_cost):
            best = best.better(steps)
    return best


def _worth(
    states: LayerStates, rows: _Rows, then: Floats, goals: Floats, cost: Ints, most_cost: int
) -> Floats:
    """What steps are worth that lead to `then` as the largest load that they change; -1: no step.

    Relief beyond the goal counts little, so that the cheapest step that leads there is taken.
    """
    shape = (-1,) + (1,) * (then.ndim - 1)
    now = states.loads[rows.at, rows.sources].reshape(shape)
    goal = goals[rows.at].reshape(shape)
    least = (_LEAST_RELIEF * states.means[rows.at]).reshape(shape)
    worth: Floats = (now - np.maximum(then, goal)) + 0.01 * (goal - np.minimum(then, goal))
    worth /= np.maximum(cost, 0.5)
    worth[(cost > most_cost) | (now - then < least)] = -1.0
    return worth


def _peaks(states: LayerStates, at: Ints, experts: Ints, ranks: Ints) -> Floats:
    """The largest load of an expert's other holders once a rank has dropped it."""
    loads = np.where(states.held[at, experts], states.loads[at], 0.0)
    loads[np.arange(len(at)), ranks] = 0.0
    copies = states.copies[at, experts]
    more = states.weights[at, experts] / np.maximum(copies - 1, 1) - states.parts[at, experts]
    peaks: Floats = loads.max(axis=1, initial=0.0) + more
    return peaks


def _drops(states: LayerStates, rows: _Rows, mine: Ints, goals: Floats) -> _Steps:
    at = rows.at[:, None]
    may = (mine != NOBODY) & states.may_drop(at, mine, rows.sources[:, None])
    may &= rows.turn[:, None] == 0  # others may drop the same
    row, place = np.nonzero(may)
    peak = np.full(mine.shape, np.inf)
    peak[row, place] = _peaks(states, rows.at[row], mine[row, place], rows.sources[row])
    left = states.loads[rows.at, rows.sources][:, None] - states.parts[at, mine]
    cost = -(~states.home[at, mine, rows.sources[:, None]]).astype(np.intp)
    worth = _THINNER * _worth(states, rows, np.maximum(left, peak), goals, cost, 0)
    best = worth.argmax(axis=1)
    every = np.arange(len(mine))
    return _Steps(
        np.full(len(mine), _DROP),
        mine[every, best],
        rows.sources,
        np.full(len(mine), NOBODY),
        worth[every, best],
    )


def _exchanges(
    states: LayerStates, rows: _Rows, mine: Ints, goals: Floats, most_cost: int
) -> list[_Steps]:
    """The best of each kind for each row. Axes: rows, experts of the source, targets, and what a
    target gives up: first nothing, then its experts."""
    held, home = states.held, states.home
    width = max(1, _MOST_CHOICES // max(1, mine.size * 2 * (2 + int(mine.shape[1]))))
    targets = rows.targets[:, :width]
    given = listed(held[rows.at[:, None], :, targets])
    given = np.concatenate([np.full((*given.shape[:2], 1), NOBODY), given], axis=2)
    some = given != NOBODY

    at, source = rows.at, rows.sources
    at2, at3 = at[:, None], at[:, None, None]
    loads = states.loads[at2, targets]
    now = states.loads[at, source][:, None]
    part = states.parts[at2, mine]
    share = states.weights[at2, mine] / (states.copies[at2, mine] + 1)
    spared = np.where(some, states.parts[at3, given], 0.0)
    # rows, experts, targets
    new = (mine != NOBODY)[:, :, None] & ~held[at3, mine[:, :, None], targets[:, None]]
    fetched = (~home[at3, mine[:, :, None], targets[:, None]]).astype(np.intp)
    movable = new & states.may_move(at3, mine[:, :, None], source[:, None, None], targets[:, None])
    # rows, targets, given up
    with_source = held[at3, given, source[:, None, None]]
    droppable, peak = _droppable(states, at, targets, given, some & ~with_source)
    swappable = some & ~with_source
    swappable &= states.may_move(at3, given, targets[:, :, None], source[:, None, None])
    unfetched = (some & ~home[at3, given, targets[:, :, None]]).astype(np.intp)
    back = (some & ~home[at3, given, source[:, None, None]]).astype(np.intp)
    returned = (~home[at2, mine, source[:, None]]).astype(np.intp)[:, :, None, None]

    fetch = fetched[:, :, :, None] - unfetched[:, None]
    left = (loads[:, :, None] - spared)[:, None]
    every = np.arange(len(at))

    def best(kind: int, mine_then: Floats, arrives: Floats, fits: Bools, cost: Ints) -> _Steps:
        then = np.maximum(mine_then, left + arrives[:, :, None, None])
        if kind != _SWAP:
            then = np.maximum(then, peak[:, None])
        worth = np.where(fits, _worth(states, rows, then, goals, cost, most_cost), -1.0)
        if kind == _MOVE:
            worth[:, :, :, 1:] *= _THINNER
        flat = worth.reshape(len(at), -1)
        top = flat.argmax(axis=1)
        expert, target, place = np.unravel_index(top, worth.shape[1:])
        return _Steps(
            np.full(len(at), kind),
            mine[every, expert],
            targets[every, target],
            given[every, target, place],
            flat[every, top],
        )

    after_share = (now - part + share)[:, :, None, None]
    after_move = (now - part)[:, :, None, None]
    free = droppable[:, None]
    may_share, may_move = new[:, :, :, None], movable[:, :, :, None]
    return [
        best(_SHARE, after_share, share, may_share & free, fetch),
        best(_MOVE, after_move, part, may_move & free, fetch - returned),
        best(
            _SWAP,
            after_move + spared[:, None],
            part,
            may_move & swappable[:, None],
            fetch - returned + back[:, None],
        ),
    ]


def _droppable(
    states: LayerStates, at: Ints, targets: Ints, given: Ints, candidates: Bools
) -> tuple[Bools, Floats]:
    """What targets may drop (nothing: those that have room), and the largest load that the
    expert's other holders have then."""
    at3 = at[:, None, None]
    droppable = candidates & states.may_drop(at3, given, targets[:, :, None])
    copies, weights = states.copies[at3, given], states.weights[at3, given]
    more = weights / np.maximum(copies - 1, 1) - states.parts[at3, given]
    peak = np.where(given == NOBODY, 0.0, _holders_peak(states, at)[at3, given] + more)
    droppable[:, :, 0] = states.room[at[:, None], targets] > 0
    return droppable, peak


def _holders_peak(states: LayerStates, at: Ints) -> Floats:
    """[layers, experts]: no holder of an expert has more to do. Looks only at the ranks that have
    the most, since what others have is little less."""
    peak = np.zeros(states.weights.shape)
    layers = np.unique(at)
    loads = states.loads[layers]
    order = np.argsort(loads, axis=1)[:, ::-1]
    order, rest = order[:, :_LOOKED_AT], order[:, _LOOKED_AT : _LOOKED_AT + 1]
    first = np.take_along_axis(loads, rest, 1) if rest.size else np.zeros((len(layers), 1))
    peak[layers] = first
    for place in range(order.shape[1] - 1, -1, -1):
        ranks = order[:, place]
        held = states.held[layers, :, ranks]
        load = loads[np.arange(len(layers)), ranks][:, None]
        peak[layers] = np.where(held, load, peak[layers])
    return peak
