"""Metrics in Prometheus' text format, version 0.0.4.

As prometheus_client writes it, byte for byte, at half the time: a series is written again at every
scrape, and all of it but the value is what it was.
"""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client.core import Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import CollectorRegistry
from prometheus_client.samples import Sample
from prometheus_client.utils import floatToGoString

_MOST_KEPT = 16384  # series; labels come and go with ranks
_MOST_PLAIN = 1e6  # from there on Go writes an exponent


class MetricsText:
    """Keeps what stands before the value of each series."""

    def __init__(self) -> None:
        self._begins: dict[tuple[str, ...], str] = {}
        self._heads: dict[tuple[str, str, str], str] = {}

    def of(self, families: Iterable[Metric]) -> bytes:
        """All of them, in their order."""
        if len(self._begins) > _MOST_KEPT:
            self._begins.clear()
        parts: list[str] = []
        for family in families:
            created = family.name + "_created"
            at_the_end: list[str] = []
            parts.append(self._head(family.name, family.type, family.documentation))
            for sample in family.samples:
                line = self._begin(sample) + _value(sample.value)
                (at_the_end if sample.name == created else parts).append(line)
            if at_the_end:
                parts.append(self._head(created, "gauge", family.documentation))
                parts += at_the_end
        return "".join(parts).encode()

    def _head(self, name: str, kind: str, documentation: str) -> str:
        key = (name, kind, documentation)
        if key not in self._heads:
            empty = Metric(name, documentation, kind)
            self._heads[key] = generate_latest(_Collected(empty)).decode()
        return self._heads[key]

    def _begin(self, sample: Sample) -> str:
        key = (sample.name, *sample.labels.keys(), *sample.labels.values())
        found = self._begins.get(key)
        if found is None:
            alone = Metric(sample.name, "", "unknown")
            alone.samples = [sample._replace(value=0.0)]
            line = generate_latest(_Collected(alone)).decode().splitlines()[-1]
            found = self._begins[key] = line.removesuffix("0.0")
        return found


class _Collected(CollectorRegistry):
    """One family."""

    def __init__(self, family: Metric) -> None:
        super().__init__()
        self._family = family

    def collect(self) -> Iterable[Metric]:
        return (self._family,)


def _value(value: float) -> str:
    if -_MOST_PLAIN < value < _MOST_PLAIN:
        return f"{float(value)!r}\n"
    return f"{floatToGoString(value)}\n"  # type: ignore[no-untyped-call]
