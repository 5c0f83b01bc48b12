"""On which nodes of Ray ranks are started (pure).

A placement group of Ray cannot grow, so each rank has one of its own, with one bundle, and what a
strategy means for all ranks of the service is decided here:

    SPREAD         the node with the fewest ranks that has room
    PACK           the node with the most ranks that has room
    STRICT_SPREAD  one rank a node
    STRICT_PACK    all ranks on one node
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Literal

from flexpert.cluster.hosts.ray_protocol import RayNode
from flexpert.config import Config

Strategy = Literal["SPREAD", "PACK", "STRICT_SPREAD", "STRICT_PACK"]

_SHOWN_NODES = 8
_SMALLEST = 1e-4  # Ray counts resources in units of this


class NoRoomError(Exception):
    """The message says what is missing, and on which nodes."""


def demand_of(config: Config) -> dict[str, float]:
    """The resources of one rank."""
    gpus = {"GPU": 1.0} if config.engine.device == "cuda" else {}
    return {"CPU": config.cluster.ray_cpus_per_rank, **gpus, **config.cluster.ray_resources}


def choose_nodes(
    nodes: Sequence[RayNode],
    demand: Mapping[str, float],
    count: int,
    strategy: Strategy,
    *,
    ranks: Mapping[str, int],
    avoided: Collection[str] = (),
) -> list[str]:
    """The node of each of `count` ranks that are to be started.

    Args:
        ranks: how many run on each node already.
        avoided: nodes that are not to be relied on now.

    Raises: NoRoomError
    """
    usable = [node for node in nodes if node.id not in avoided]
    room = {node.id: _places(node.free, demand) for node in usable}
    held = dict(ranks)
    if strategy == "STRICT_PACK" and not any(held.values()):
        room = {node: places for node, places in room.items() if places >= count}
    chosen: list[str] = []
    for _ in range(count):
        allowed = [node for node in room if room[node] > 0 and _allows(strategy, node, held)]
        if not allowed:
            raise NoRoomError(
                _shortage(nodes, demand, count, len(chosen), strategy, held=ranks, avoided=avoided)
            )
        packs = strategy in ("PACK", "STRICT_PACK")
        best = max(
            allowed,
            key=lambda node: (held.get(node, 0) * (1 if packs else -1), room[node], node),
        )
        chosen.append(best)
        room[best] -= 1
        held[best] = held.get(best, 0) + 1
    return chosen


def _allows(strategy: Strategy, node: str, held: Mapping[str, int]) -> bool:
    if strategy == "STRICT_SPREAD":
        return not held.get(node)
    if strategy == "STRICT_PACK":
        return bool(held.get(node)) or not any(held.values())
    return True


def _places(free: Mapping[str, float], demand: Mapping[str, float]) -> int:
    """For how many ranks there is room."""
    return min(
        int((free.get(name, 0.0) + _SMALLEST / 2) / amount) for name, amount in demand.items()
    )


def _shortage(
    nodes: Sequence[RayNode],
    demand: Mapping[str, float],
    count: int,
    found: int,
    strategy: Strategy,
    *,
    held: Mapping[str, int],
    avoided: Collection[str],
) -> str:
    lines = [_describe(node, demand, held.get(node.id, 0), avoided) for node in nodes]
    if len(lines) > _SHOWN_NODES:
        lines[_SHOWN_NODES:] = [f"and {len(lines) - _SHOWN_NODES} more nodes"]
    if not lines:
        lines = ["no node is alive"]
    return (
        f"Ray has no room for {count} more rank{'s' if count > 1 else ''} with {_amounts(demand)} "
        f"each ({strategy}), only for {found}: " + "; ".join(lines)
    )


def _describe(
    node: RayNode, demand: Mapping[str, float], ranks: int, avoided: Collection[str]
) -> str:
    free = ", ".join(
        f"{node.free.get(name, 0.0):g} of {node.total.get(name, 0.0):g} {name}" for name in demand
    )
    text = f"node {node.id[:8]} ({node.host}) has {free} free and {ranks} of our ranks"
    return f"{text}, and did not answer lately" if node.id in avoided else text


def _amounts(demand: Mapping[str, float]) -> str:
    return ", ".join(f"{amount:g} {name}" for name, amount in demand.items())
