"""From what a service shows of itself to samples, decisions and changes; time and I/O are others'.

scaler = Autoscaler(goals)
step = scaler.look(view, families, now)   # every goals.every_s
if step.begin is not None: ask for so many ranks, and tell `asked` how that went
"""

from __future__ import annotations

import importlib.util
import math
import re
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from flexpert.cluster.autoscale_policy import Attempt, Decision, Goals, Policy, Sample, decide
from flexpert.cluster.views import ClusterView
from flexpert.config import parse_duration
from flexpert.errors import ConfigError

_KEPT = 300  # samples
_ATTEMPTS = 32

TTFT = "flexpert_time_to_first_token_seconds"
GAP = "flexpert_inter_token_seconds"
UNFINISHED = "flexpert_unfinished_sequences"
ENDED = "flexpert_sequences_total"
TOKENS = "flexpert_tokens_total"

EXAMPLE = "min=1,max=8,ttft_p99=0.5s,itl_p99=50ms"


def parse_goals(text: str, capacity: int) -> Goals:
    """Goals from "min=1,max=8,ttft_p99=0.5s,itl_p99=50ms,kv=0.9,settle=30s,every=2s".

    capacity: what max is if it is not said, and at most.

    Raises:
        ConfigError
    """
    said: dict[str, Any] = {}
    for part in filter(None, text.replace(" ", "").split(",")):
        name, equals, value = part.partition("=")
        if name not in _READERS or not equals:
            raise ConfigError(
                f"--autoscale: {part!r} is none of {', '.join(_READERS)}; write {EXAMPLE}"
            )
        field, read = _READERS[name]
        try:
            said[field] = read(value)
        except ValueError as error:
            raise ConfigError(f"--autoscale: {name}={value}: {error}") from None
    goals = Goals(**{"max": capacity, **said})
    if not 1 <= goals.min <= goals.max:
        raise ConfigError(f"--autoscale: min={goals.min} and max={goals.max}: 1 ≤ min ≤ max")
    if goals.max > capacity:
        raise ConfigError(
            f"--autoscale: max={goals.max} exceeds the capacity of {capacity}; start with a larger "
            "--max-ranks"
        )
    return goals


def _count(text: str) -> int:
    if not re.fullmatch(r"\d{1,6}", text):
        raise ValueError("is no number of ranks")
    return int(text)


def _seconds(text: str) -> float:
    value = parse_duration(text)
    if not isinstance(value, float) or not 1e-4 <= value <= 86400:
        raise ValueError("is no duration; write for example 2s or 500ms")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise ValueError("is no share between 0 and 1")
    return value


_READERS: Mapping[str, tuple[str, Callable[[str], Any]]] = {
    "min": ("min", _count),
    "max": ("max", _count),
    "ttft_p99": ("ttft_p99_s", _seconds),
    "itl_p99": ("itl_p99_s", _seconds),
    "kv": ("kv", _share),
    "settle": ("settle_s", _seconds),
    "every": ("every_s", _seconds),
}


def load_policy(text: str) -> Policy:
    """A policy of the user's own, from "FILE.py" or "FILE.py:FUNCTION" (default: decide).

    Raises:
        ConfigError
    """
    path, _, name = text.partition(":")
    try:
        spec = importlib.util.spec_from_file_location("flexpert_user_policy", Path(path))
        if spec is None or spec.loader is None:
            raise ConfigError(f"--policy {text}: name a Python file, as policy.py:decide")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        found = getattr(module, name or "decide", None)
    except ConfigError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever is in the file
        raise ConfigError(f"--policy {text}: {type(error).__name__}: {error}") from None
    if not callable(found):
        raise ConfigError(f"--policy {text}: there is no function {name or 'decide'} in it")
    policy: Policy = found
    return policy


class Histogram:
    """The p99 of what a histogram of Prometheus has counted since the last look."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._before: dict[float, float] = {}

    def p99(self, families: Iterable[Any]) -> float | None:
        """None: nothing was counted. families: as `CollectorRegistry.collect` gives them."""
        buckets: dict[float, float] = {
            float(sample.labels["le"]): sample.value
            for family in families
            if family.name == self._name
            for sample in family.samples
            if sample.name == f"{self._name}_bucket"
        }
        bounds = sorted(buckets)
        # a counter that fell is another process's: all it counted is new
        again = any(buckets[bound] < self._before.get(bound, 0.0) for bound in bounds)
        before = {} if again else self._before
        grown = [buckets[bound] - before.get(bound, 0.0) for bound in bounds]
        self._before = buckets
        if not grown or grown[-1] <= 0:
            return None
        wanted = 0.99 * grown[-1]
        low, below = 0.0, 0.0
        for bound, count in zip(bounds, grown, strict=True):
            if count >= wanted:
                if math.isinf(bound):
                    return low
                return low + (bound - low) * (wanted - below) / (count - below)
            low, below = bound, count
        return low


class Increase:
    """By how much a counter of Prometheus has grown since the last look."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._before: int | None = None

    def of(self, families: Iterable[Any]) -> int | None:
        """None: not known, at the first look and when another process has begun to count. families:
        as for `Histogram`."""
        found = sum(
            int(sample.value)
            for family in families
            for sample in family.samples
            if sample.name == self._name
        )
        before, self._before = self._before, found
        return None if before is None or found < before else found - before


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """decision: what was found; begin: the number of ranks to ask for now, or None."""

    sample: Sample
    decision: Decision
    begin: int | None


class Autoscaler:
    """One service's. Not thread-safe."""

    def __init__(self, goals: Goals, policy: Policy = decide) -> None:
        self.goals = goals
        self._policy = policy
        self._samples: deque[Sample] = deque(maxlen=_KEPT)
        self._attempts: deque[Attempt] = deque(maxlen=_ATTEMPTS)
        self._ttft, self._gap = Histogram(TTFT), Histogram(GAP)
        self._ended, self._tokens = Increase(ENDED), Increase(TOKENS)
        # operation, target, when, whether to more ranks
        self._asked: tuple[str, int, float, bool] | None = None

    def look(self, view: ClusterView, families: Iterable[Any], now: float) -> Step:
        """What there is, and what to do. view, families: `GET /cluster` and `GET /metrics`."""
        families = list(families)
        active = [rank for rank in view.ranks if rank.state in ("active", "leaving")]
        running = sum(rank.running for rank in active)
        unfinished = _value(families, UNFINISHED)
        waiting = sum(rank.waiting for rank in active)
        sample = Sample(
            at=now,
            ranks=len(active),
            running=running,
            waiting=max(waiting, unfinished - running - _in_flight(running)),
            kv_used=max((rank.kv_used for rank in active), default=0.0),
            ttft_p99_s=self._ttft.p99(families),
            itl_p99_s=self._gap.p99(families),
            ended=self._ended.of(families),
            tokens=self._tokens.of(families),
        )
        self._samples.append(sample)
        decision = self._policy(self.goals, tuple(self._samples), tuple(self._attempts))
        busy = self._asked is not None or view.operation is not None or view.down is not None
        begin = decision.ranks if decision.ranks != sample.ranks and not busy else None
        return Step(sample=sample, decision=decision, begin=begin)

    def asked(self, operation_id: str, target: int, now: float) -> None:
        """A change was asked for, and runs."""
        self._asked = (operation_id, target, now, target > self._samples[-1].ranks)

    @property
    def pending(self) -> str | None:
        """The operation whose end is to be told."""
        return self._asked[0] if self._asked else None

    def ended(self, now: float, *, done: bool, target: int | None = None) -> None:
        """The change is over, or (target) was refused."""
        _, target_asked, began, grew = self._asked or ("", target or 0, now, True)
        self._asked = None
        self._attempts.append(
            Attempt(at=now, target=target_asked, done=done, took_s=now - began, grew=grew)
        )


def _in_flight(running: int) -> int:
    """Sequences on their way between head and ranks: they wait for nothing."""
    return max(2, running // 8)


def _value(families: Iterable[Any], name: str) -> int:
    for family in families:
        for sample in family.samples:
            if sample.name == name:
                return int(sample.value)
    return 0
