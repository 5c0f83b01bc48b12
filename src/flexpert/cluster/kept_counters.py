"""Counters and histograms that go on where another head's have ended. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import msgspec
from prometheus_client.core import Metric

_COUNTED = ("counter", "histogram")
_PER_RANK = "flexpert_rank_"  # counted by the ranks' processes, which live on

Key = tuple[str, tuple[tuple[str, str], ...]]


class KeptSample(msgspec.Struct, frozen=True, array_like=True):
    """One series; labels: name → value."""

    family: str
    name: str
    labels: dict[str, str]
    value: float

    @property
    def key(self) -> Key:
        return self.name, tuple(sorted(self.labels.items()))


def _counts(family: Metric) -> bool:
    return family.type in _COUNTED and not family.name.startswith(_PER_RANK)


def kept(families: Iterable[Metric]) -> list[KeptSample]:
    """What another head must know; series that are 0 are not worth it."""
    return [
        KeptSample(family.name, sample.name, dict(sample.labels), sample.value)
        for family in families
        if _counts(family)
        for sample in family.samples
        if sample.value and not sample.name.endswith("_created")
    ]


def continued(families: Iterable[Metric], before: Iterable[KeptSample]) -> Iterator[Metric]:
    """Each counter with what it had counted before, series included that have not come again."""
    left: dict[str, dict[Key, KeptSample]] = {}
    for one in before:
        left.setdefault(one.family, {})[one.key] = one
    for family in families:
        earlier = left.get(family.name)
        if not earlier or not _counts(family):
            yield family
            continue
        whole = Metric(family.name, family.documentation, family.type)
        for sample in family.samples:
            key = sample.name, tuple(sorted(sample.labels.items()))
            found = earlier.pop(key, None)
            value = sample.value + (found.value if found else 0.0)
            whole.add_sample(sample.name, sample.labels, value)
        for one in earlier.values():
            whole.add_sample(one.name, one.labels, one.value)
        yield whole
