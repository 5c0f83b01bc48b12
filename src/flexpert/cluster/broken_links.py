"""Which rank is given up when ranks that live do not reach each other (pure).

Between machines a link may break though both ends live and reach the head. A link that broke does
not come back by itself, so one of the two has to go; it joins again with links that are new.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

GATHER_S = 0.02
"""After the first report: a rank that nobody reaches is accused by all, and accuses all."""


def accusations(
    reporter: int, silent: Collection[int], machines: Mapping[int, str]
) -> set[tuple[int, int]]:
    """(who says so, whom it does not reach), of ranks that are there and on another machine; on one
    machine there is no link that could break, and who is silent has stopped."""
    own = machines.get(reporter)
    return {(reporter, peer) for peer in silent if own and machines.get(peer, own) != own}


def whom_to_give_up(pairs: Collection[tuple[int, int]]) -> int | None:
    """The rank that most others do not reach; of a pair the one that was accused, of two that
    accuse each other the higher."""
    if not pairs:
        return None
    partners: dict[int, set[int]] = {}
    for one, other in pairs:
        partners.setdefault(one, set()).add(other)
        partners.setdefault(other, set()).add(one)
    accused = {other for _, other in pairs}
    return max(partners, key=lambda rank: (len(partners[rank]), rank in accused, rank))
