"""In which order ranks leave when a smaller number of them is asked for (pure)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Candidate:
    """A member, as far as it matters for who leaves.

    failing: it does not answer, or its host is to be drained anyway. joined: only its host can
    bring it back, as with `flexpert join`. kv_used: share of its KV blocks. experts: replicas.
    """

    id: int
    machine: str = ""
    failing: bool = False
    joined: bool = False
    kv_used: float = 0.0
    experts: int = 0


def leave_order(
    members: Iterable[Candidate], *, spread: bool = False, least_machines: int = 1
) -> list[int]:
    """All ids, the first to leave first. Of what comes below, the earlier decides:

    1. who is failing leaves;
    2. at least so many machines keep a rank;
    3. who has joined stays: the head can start its own again, and so undo what was asked for;
    4. the machine with the fewest ranks is emptied, so that those that stay share memory; with
       `spread`, the one with the most gives one up;
    5. the least KV has to move;
    6. the fewest experts have to be loaded elsewhere;
    7. the highest id leaves.
    """
    left = list(members)
    order = []
    while left:
        on = Counter(one.machine for one in left)
        chosen = min(
            left,
            key=lambda one: (
                not one.failing,
                on[one.machine] == 1 and len(on) <= least_machines,
                one.joined,
                -on[one.machine] if spread else on[one.machine],
                one.kv_used,
                one.experts,
                -one.id,
            ),
        )
        left.remove(chosen)
        order.append(chosen.id)
    return order
