"""Who takes part, as the kernels know it: the links they use, and the ids that are active."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from flexpert.comm.errors import CommError
from flexpert.comm.host._kernels import ffi, lib
from flexpert.comm.host.arguments import limit_ns
from flexpert.comm.host.codes import BROKEN_LINK, MASKED, RESTARTED
from flexpert.comm.host.core import Core
from flexpert.comm.host.gateways import TwoLevelPlan, plan_gateways
from flexpert.comm.host.links import Link, NixlLink
from flexpert.comm.host.relays import Relays
from flexpert.comm.window_layout import MAX_CAPACITY


class Members:
    """Changed under `Core.exchanging` only, when nobody's rows are being read.

    active: ids of the exchanges, sorted, the own one among them.
    installed: links that the kernels know; some may have been disconnected since.
    parted: ids that were masked, and perhaps still read what they were sent.
    relays: memory of siblings, for what comes from other machines merged.
    """

    def __init__(self, core: Core) -> None:
        self._core = core
        self.active: tuple[int, ...] = ()
        self.installed: dict[int, Link] = {}
        self.parted: set[int] = set()
        self.relays = Relays(core, self.installed)
        self.begin_epoch((core.rank,), 0)

    @property
    def far(self) -> bool:
        """Whether any link leads to another machine."""
        return any(link.remote for link in self.installed.values())

    def begin_epoch(self, ids: tuple[int, ...], epoch: int) -> None:
        """ids: sorted. All links start at once, as number 0."""
        self.active = ids
        self._use_active()
        self._use_plan(self._plan())
        self._leave_shared()
        lib.fx_begin_epoch(self._core.b, epoch)

    def install(self, link: Link) -> None:
        """Hand a link to the kernels, unless they have it; masked, and not up."""
        peer, b = link.peer, self._core.b
        if self.installed.get(peer) is not link:
            self.installed[peer] = link
            self.parted.discard(peer)
            b.inbox[peer] = link.inbox.at
            b.control[peer] = link.control
            b.shared[peer] = link.shared
            b.outbox[peer] = link.outbox
            b.remote[peer] = link.remote
            b.own_gen[peer] = b.peer_gen[peer] = b.up[peer] = b.due[peer] = 0
            if isinstance(link, NixlLink):
                self.relays.export_memory(link)

    def remove(self, link: Link) -> None:
        """Take a link away from the kernels, if they have it, and mask its peer."""
        peer, b = link.peer, self._core.b
        if self.installed.get(peer) is link:
            self.relays.forget(peer)
            del self.installed[peer]
            b.inbox[peer] = b.outbox[peer] = b.control[peer] = b.shared[peer] = 0
            b.up[peer] = b.remote[peer] = b.due[peer] = 0
            self.drop([peer])
            if all(other.remote for other in self.installed.values()) and lib.fx_forget_shared(b):
                self._core.window.empty_shared()

    def drop(self, ranks: Iterable[int]) -> None:
        """Mask ranks now."""
        core = self._core
        dropped = set(ranks)
        self.parted |= dropped
        self._part(dropped.intersection(self.active))
        for peer in dropped:
            core.b.up[peer] = 0
            if core.gone(peer) in (MASKED, RESTARTED):
                core.set_gone(peer, 0)
        self.active = tuple(rank for rank in self.active if rank not in dropped)
        self._use_active()
        self._leave_shared()

    def take_in(self, ranks: Iterable[int]) -> None:
        """Unmask ranks now; those that are active stay as they are."""
        for peer in ranks:
            if peer not in self.active:
                self._part({peer})
                self.active = tuple(sorted((*self.active, peer)))
                lib.fx_unmask(self._core.b, peer)
        self._use_active()

    def open_places(self, *, again: bool = False) -> None:
        """Map the places that peers have exported since they connected, too.

        again: and those of peers that have disconnected this rank and connected it anew, while
            this rank stayed connected: they read nothing in the place they had exported before.
        """
        b = self._core.b
        b.to_open = 0
        for peer, link in self.installed.items():
            if isinstance(link, NixlLink) or (link.outbox and not again):
                continue
            place = lib.fx_exported_place(b, peer)
            if place < 0 or place == link.place:
                continue
            try:
                link.open_place(place)
            except (CommError, OSError):
                self._core.set_gone(peer, BROKEN_LINK)
                continue
            b.outbox[peer] = link.outbox
            if b.own_gen[peer]:
                lib.fx_hello(b, peer)

    def _plan(self) -> TwoLevelPlan:
        links = {peer: self.installed[peer] for peer in self.active if peer != self._core.rank}
        groups = {peer: link.address.group for peer, link in links.items()}
        return plan_gateways(
            self._core.rank,
            {**groups, self._core.rank: self._core.window.address.group},
            {peer for peer, link in links.items() if link.remote},
        )

    def _use_plan(self, plan: TwoLevelPlan) -> None:
        b = self._core.b
        for rank in range(MAX_CAPACITY):
            b.via_out[rank] = plan.out.get(rank, -1)
            b.via_in[rank] = plan.into.get(rank, -1)
        b.sibling_count = len(plan.siblings)
        for at, rank in enumerate(plan.siblings):
            b.siblings[at] = rank
        self.relays.begin_epoch(plan)
        self._two_levels = plan

    def _part(self, ranks: set[int]) -> None:
        """Within an epoch, the other ranks not knowing: what this one sends is merged no more, and
        once a sibling is masked, nothing that comes may be."""
        plan = self._two_levels
        if not ranks or not (plan.out or plan.into):
            return
        if ranks.isdisjoint(plan.siblings):
            into = {source: gateway for source, gateway in plan.into.items() if source not in ranks}
            self._use_plan(replace(plan, out={}, into=into))
        else:
            self._use_plan(TwoLevelPlan())

    def _leave_shared(self) -> None:
        """Ranks that take part no more may still read what was shared with them."""
        lib.fx_leave_shared(self._core.b, limit_ns(self._core.timeout_s))

    def _use_active(self) -> None:
        b = self._core.b
        ffi.memmove(b.is_active, bytes(MAX_CAPACITY), MAX_CAPACITY)
        for at, rank in enumerate(self.active):
            b.active[at] = rank
            b.is_active[rank] = 1
        b.active_count = len(self.active)
