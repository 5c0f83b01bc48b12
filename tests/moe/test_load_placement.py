"""Placements by load are valid for any input, balanced, and move little."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from flexpert.moe.placement import Placement, keep, loads, replan
from flexpert.moe.placement_steps import PlacementStep, applied, moves

LAYERS = 2


@st.composite
def changes(draw: st.DrawFn) -> list[dict]:
    """Arguments of `replan`, one after the other, of one model."""
    experts = draw(st.integers(1, 24))
    number = st.one_of(st.just(0.0), st.floats(0, 1e9), st.sampled_from([1.0, 5.0, 1e-30, 1e300]))
    result = []
    for _ in range(draw(st.integers(1, 4))):
        machines = draw(
            st.dictionaries(st.integers(0, 12), st.sampled_from("abc"), min_size=1, max_size=9)
        )
        one = st.lists(number, min_size=experts, max_size=experts)
        arguments = {
            "ranks": sorted(machines),
            "experts": experts,
            "layers": LAYERS,
            "machines": machines,
            "min_replicas": draw(st.integers(1, 3)),
            "loads": draw(st.none() | st.lists(one, min_size=LAYERS, max_size=LAYERS)),
            "max_moves": draw(st.none() | st.integers(0, 20)),
        }
        if arguments["loads"] is None or draw(st.booleans()):
            slots = draw(st.fixed_dictionaries({rank: st.integers(0, 20) for rank in machines}))
            while sum(min(experts, count) for count in slots.values()) < experts:
                slots = {rank: count + 1 for rank, count in slots.items()}
            arguments["slots"] = slots
        else:
            arguments["redundant"] = draw(st.integers(0, 40))
        result.append(arguments)
    return result


def check(placement: Placement, arguments: dict) -> None:
    experts, ranks = arguments["experts"], arguments["ranks"]
    assert placement.ranks == ranks
    assert placement.missing() == []
    slots = arguments.get("slots")
    if slots is None:
        share = (experts + arguments["redundant"]) / len(ranks)
        slots = dict.fromkeys(ranks, -int(-share // 1))
    for layer in placement.layers:
        for rank, held in layer.items():
            assert held == sorted(set(held)), "no rank holds two of one expert"
            assert len(held) <= slots[rank]
        copies = Counter(expert for held in layer.values() for expert in held)
        assert set(copies) == set(range(experts))


@settings(max_examples=60, deadline=None)
@given(changes(), st.data())
def test_any_change_leads_to_a_valid_placement_and_always_to_the_same(
    history: list[dict], data: st.DataObject
) -> None:
    placement: Placement | None = None
    for arguments in history:
        after = replan(placement, **arguments)
        check(after, arguments)
        shuffled = dict(reversed(arguments["machines"].items()))
        again = {**arguments, "machines": shuffled, "ranks": list(shuffled)}
        assert replan(placement, **again) == after
        lost = data.draw(st.sampled_from([None, *after.ranks]))
        left = [rank for rank in after.ranks if rank != lost]
        placement = keep(after, left) if left else after


@settings(max_examples=40, deadline=None)
@given(changes())
def test_every_step_of_a_change_holds_all_experts_and_needs_one_slot_more(
    history: list[dict],
) -> None:
    placement: Placement | None = None
    for arguments in history:
        after = replan(placement, **arguments)
        if placement is not None:
            now = placement
            steps = moves(placement, after, arguments["loads"])
            for step in steps:
                full = now
                if step.load is not None:
                    assert step.load[1] not in now.layers[step.layer].get(step.load[0], [])
                    full = applied(now, PlacementStep(step.layer, step.load, []))
                over = 0
                for rank, held in full.layers[step.layer].items():
                    ends = (placement.layers[step.layer], after.layers[step.layer])
                    most = max(len(end.get(rank, ())) for end in ends)
                    assert len(held) <= most + 1
                    over += len(held) > most
                assert over <= 2
                now = applied(now, step)
                assert now.missing() == []
            for layer, wanted in zip(now.layers, after.layers, strict=True):
                assert {rank: held for rank, held in layer.items() if held} == {
                    rank: held for rank, held in wanted.items() if held
                }
            assert sum(step.load is not None for step in steps) == sum(
                map(len, loads(placement, after).values())
            )
        placement = after
