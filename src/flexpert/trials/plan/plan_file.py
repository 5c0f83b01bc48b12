"""What happens when: a list of phases, each with the ranks that are up and those that die in it."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from flexpert.comm.window_layout import MAX_CAPACITY
from flexpert.errors import ConfigError
from flexpert.reading import read_text, shown

_MOST_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class PlanPhase:
    """ranks: ids that begin the phase, sorted; kill: those of them that do not survive it."""

    ranks: tuple[int, ...]
    kill: tuple[int, ...] = ()

    def __str__(self) -> str:
        return " ".join(f"{rank}†" if rank in self.kill else str(rank) for rank in self.ranks)


def load(path: Path) -> list[PlanPhase]:
    """Raises: ConfigError: no such file, or not a plan; says where and what is wrong."""
    text = read_text(path, "plan", most=_MOST_BYTES)
    try:
        plan = json.loads(text)
    except (ValueError, RecursionError) as error:  # the first also of a number without an end
        raise ConfigError(f"plan {path} is not JSON: {error}") from error
    return parse(plan, str(path))


def parse(plan: Any, name: str = "plan") -> list[PlanPhase]:
    """A phase is a list of ids, negative ones die; or {"ranks": [...], "kill": [...]}.

    Raises: ConfigError: see `load`.
    """
    if not isinstance(plan, list) or not plan:
        raise ConfigError(
            f"{name}: a plan is a list of phases, such as [[0, 1], [0, 1, -2], [0, 1]]"
        )
    phases = [_phase(phase, f"{name}, phase {number}") for number, phase in enumerate(plan, 1)]
    for number, (before, after) in enumerate(pairwise(phases), 2):
        if not set(before.ranks) - set(before.kill) & set(after.ranks):
            raise ConfigError(
                f"{name}, phase {number}: nobody of phase {number - 1} is left to go on with"
            )
    return phases


def _phase(phase: Any, where: str) -> PlanPhase:
    if isinstance(phase, dict):
        if unknown := set(phase) - {"ranks", "kill"}:
            raise ConfigError(f'{where}: {shown(min(unknown))!r} is not "ranks" or "kill"')
        ranks, kill = phase.get("ranks", []), phase.get("kill", [])
        if not isinstance(ranks, list) or not isinstance(kill, list):
            raise ConfigError(f'{where}: "ranks" and "kill" are lists of ids')
    elif isinstance(phase, list):
        numbers = [rank for rank in phase if _is_id(rank)]
        ranks = [abs(rank) if _is_id(rank) else rank for rank in phase]
        kill = [-rank for rank in numbers if rank < 0]
    else:
        raise ConfigError(f'{where}: expected a list of ids or {{"ranks": [...], "kill": [...]}}')
    for rank in (*ranks, *kill):
        if not _is_id(rank) or not 0 <= rank < MAX_CAPACITY:
            raise ConfigError(
                f"{where}: {shown(repr(rank))} is not a rank id from 0 to {MAX_CAPACITY - 1}"
            )
    if not ranks:
        raise ConfigError(f"{where}: no ranks")
    if len(set(ranks)) < len(ranks):
        raise ConfigError(f"{where}: an id stands there twice: {ranks}")
    if stray := set(kill) - set(ranks):
        raise ConfigError(f"{where}: rank {min(stray)} is to be killed but is not in the phase")
    if set(kill) == set(ranks):
        raise ConfigError(f"{where}: somebody has to survive")
    return PlanPhase(tuple(sorted(ranks)), tuple(sorted(kill)))


def _is_id(rank: Any) -> bool:
    return isinstance(rank, int) and not isinstance(rank, bool)


def random_plan(seed: int, capacity: int = 6, phases: int = 4) -> list[PlanPhase]:
    """Joins, leaves, kills and rejoins; at least one rank goes on from phase to phase."""
    draw = random.Random(seed)
    plan: list[PlanPhase] = []
    up = set(draw.sample(range(capacity), draw.randint(1, 3)))
    for _ in range(phases):
        kill = set(draw.sample(sorted(up), draw.randint(0, min(2, len(up) - 1))))
        plan.append(PlanPhase(tuple(sorted(up)), tuple(sorted(kill))))
        stay = sorted(up - kill)
        keep = set(draw.sample(stay, draw.randint(1, len(stay))))
        others = sorted(set(range(capacity)) - keep)  # also ids that have just died
        up = keep | set(draw.sample(others, draw.randint(0, min(3, 4 - len(keep), len(others)))))
    return plan
