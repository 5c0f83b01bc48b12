"""Which experts the survivors of a loss hold, and how every expert is held again (pure)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain

from flexpert.moe.expert_loads import ExpertLoads
from flexpert.moe.placement import Placement, copies_of, cover, keep, replan

_LEAST_REPLICAS = 2  # of each expert, if there is room for that: see `replan`

Fits = Callable[[Placement], bool]


@dataclass(frozen=True, slots=True)
class ExpertRecovery:
    """The rules of one service.

    experts: logical experts of each of `layers`. redundant: replicas asked for beyond one of each.
    degrade: after a loss serve without the experts that nobody holds, until they are loaded.
    slots: of a rank in each layer, which more ranks fill with further replicas; 0: they hold fewer.
    """

    experts: int
    layers: int
    redundant: int = 0
    degrade: bool = False
    slots: int = 0

    def redundant_on(self, ranks: int) -> int:
        """Replicas beyond one of each expert that so many ranks are to hold."""
        return max(self.redundant, self.slots * ranks - self.experts)

    def whole(
        self,
        previous: Placement | None,
        ranks: Iterable[int],
        fits: Fits,
        *,
        machines: Mapping[int, str] | None = None,
    ) -> Placement | None:
        """The placement of all experts on `ranks` that loads the fewest of those that fit.

        After a loss redundancy is not restored, and is given up for room. None: none fits.
        """
        return next(filter(fits, self._choices(previous, frozenset(ranks), machines)), None)

    def spread(
        self,
        previous: Placement | None,
        ranks: Iterable[int],
        fits: Fits,
        *,
        machines: Mapping[int, str] | None = None,
        loads: ExpertLoads | None = None,
    ) -> Placement:
        """All experts and the redundancy asked for, balanced on `ranks`.

        The one that loads the fewest, unless only another fits; what fits nowhere is for the caller
        to find out. machines: rank → its machine, loads: of each expert of each layer, see
        `replan`.
        """
        ids = frozenset(ranks)
        for redundant in dict.fromkeys((self.redundant_on(len(ids)), self.redundant)):
            fewest = self._replan(previous, ids, redundant, machines, loads)
            if fits(fewest):
                return fewest
            # where history gave some ranks the larger share of every layer, a fresh start is fairer
            fresh = self._replan(None, ids, redundant, machines, loads)
            if fits(fresh):
                return fresh
        return fewest

    def after_loss(
        self,
        previous: Placement | None,
        survivors: Iterable[int],
        fits: Fits,
        *,
        machines: Mapping[int, str] | None = None,
    ) -> Placement | None:
        """What the survivors enter the next epoch with; None: they cannot serve.

        fits: whether each rank has the memory for what it would hold. machines: rank → its
        machine; they count only where newcomers are among the survivors (see `cover`).
        """
        ranks = frozenset(survivors)
        if self.degrade and previous and ranks <= set(previous.ranks):
            return keep(previous, ranks)  # less than they hold already: it fits
        whole = self.whole(previous, ranks, fits, machines=machines)
        return keep(previous, ranks) if whole is None and self.degrade and previous else whole

    def under_replicated(self, placement: Placement, ranks: int) -> int:
        """How many experts, over all layers, fewer ranks hold than asked for among `ranks`; those
        that nobody holds are not among them.

        Which ones have more replicas than others is decided by their load: of each only as many are
        asked for as all can have, and of all together as many as there shall be.
        """
        wanted = sum(copies_of(self.experts, self.redundant_on(ranks), ranks))
        least = min(_LEAST_REPLICAS, wanted // self.experts)
        lacking = 0
        for layer in placement.layers:
            held = Counter(chain.from_iterable(layer.values()))
            thin = sum(count < least for count in held.values())
            lost = self.experts - len(held)
            lacking += max(thin, min(len(held), wanted - least * lost - held.total()))
        return lacking

    def _choices(
        self,
        previous: Placement | None,
        ranks: frozenset[int],
        machines: Mapping[int, str] | None,
    ) -> Iterator[Placement]:
        if previous and ranks <= set(previous.ranks):
            yield cover(previous, ranks)
        else:
            yield self._replan(previous, ranks, self.redundant_on(len(ranks)), machines)
            if self.slots:
                yield self._replan(previous, ranks, self.redundant, machines)
        yield self._replan(previous, ranks, 0)
        yield self._replan(None, ranks, 0)

    def _replan(
        self,
        previous: Placement | None,
        ranks: frozenset[int],
        redundant: int,
        machines: Mapping[int, str] | None = None,
        loads: ExpertLoads | None = None,
    ) -> Placement:
        return replan(
            previous,
            ranks,
            experts=self.experts,
            layers=self.layers,
            redundant=redundant,
            machines=machines,
            loads=loads,
        )
