"""Which rank of another machine gets what is meant for several of them. Pure.

Ranks on one machine that share rows from elsewhere are a *group*. A sender outside of it sends each
token once to one rank of the group, the sender's *gateway* there, which hands it on. All ranks of
an epoch compute the same gateways from the same ids and groups, without a word.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field

_GROUP_BYTES = 8


def group_of(machine: str) -> bytes:
    """The group of the ranks on a machine that share rows."""
    return hashlib.sha256(machine.encode()).digest()[:_GROUP_BYTES]


@dataclass(frozen=True, slots=True)
class TwoLevelPlan:
    """What one rank knows of an epoch's gateways; without entries everything goes directly.

    out: rank on another machine → the gateway there for what this rank sends it.
    into: rank on another machine → the gateway on this one for what that rank sends here.
    siblings: the other ranks of the own group, ascending.
    """

    out: Mapping[int, int] = field(default_factory=dict)
    into: Mapping[int, int] = field(default_factory=dict)
    siblings: tuple[int, ...] = ()


def plan_gateways(rank: int, groups: Mapping[int, bytes], remote: Set[int]) -> TwoLevelPlan:
    """The plan of one rank.

    Args:
        rank: the own id.
        groups: of all active ids; b"": the rank shares nothing.
        remote: ids that this rank reaches over NIXL.
    """
    own = groups[rank]
    if not own:
        return TwoLevelPlan()
    members: dict[bytes, list[int]] = {}
    for other in sorted(groups):
        if groups[other]:
            members.setdefault(groups[other], []).append(other)
    out = {
        member: _gateway(rank, there, members)
        for group, there in members.items()
        if group != own and len(there) > 1 and remote >= set(there)
        for member in there
    }
    here = members[own]
    siblings = tuple(other for other in here if other != rank)
    into: dict[int, int] = {}
    if siblings and remote.isdisjoint(siblings):
        sources = [other for group, there in members.items() if group != own for other in there]
        into = {other: _gateway(other, here, members) for other in sources if other in remote}
    return TwoLevelPlan(out, into, siblings)


def _gateway(source: int, there: Sequence[int], members: Mapping[bytes, list[int]]) -> int:
    """The ranks outside of a group are dealt out to it in turn, so that all carry the same."""
    outside = sorted(other for group in members.values() if group is not there for other in group)
    return there[outside.index(source) % len(there)]
