"""Who is connected and who is to take part; noted at any time, in force between two exchanges.

Changes are noted under `Core.changing`. They take effect when no exchange is under way: at once if
that is now, else at the beginning of the next one. So nothing is unmapped under a reader.
"""

from __future__ import annotations

from collections.abc import Iterable

from flexpert.comm.errors import CommError
from flexpert.comm.host._kernels import ffi, lib
from flexpert.comm.host.codes import (
    BROKEN_LINK,
    ENDED,
    LINK_SHIFT,
    MASKED,
    MOST_LINK,
    RESTARTED,
    WHY,
)
from flexpert.comm.host.core import Core, State
from flexpert.comm.host.links import Link, ShmLink
from flexpert.comm.host.members import Members
from flexpert.comm.host.process_watch import Watcher
from flexpert.comm.host.remote import Remote

_MAX_EPOCH = 0xFFFFFFFF


class Changes:
    """links: of connected peers; changed by `add` and `disconnect`."""

    def __init__(self, core: Core, members: Members, remote: Remote) -> None:
        self._core = core
        self._members = members
        self._remote = remote
        self.links: dict[int, Link] = {}
        self._departed: list[Link] = []  # no longer connected, perhaps still installed
        self._wishes: dict[int, bool] = {}  # unmask (True) or mask
        self._watcher = Watcher(core.rank, lambda peer: core.set_gone(peer, ENDED))

    @property
    def _changed(self) -> bool:
        """Something is noted that is to take effect before the next exchange, or vote."""
        return bool(self._core.b.changed)

    @_changed.setter
    def _changed(self, changed: bool) -> None:
        self._core.b.changed = changed

    # ---- how it will be ---------------------------------------------------------------------

    def connected(self) -> tuple[int, ...]:
        core = self._core
        with core.changing:
            return tuple(sorted((core.rank, *self.links)))

    def active(self) -> tuple[int, ...]:
        with self._core.changing:
            if not self._wishes:
                return self._members.active
            active = set(self._members.active)
            for peer, unmask in self._wishes.items():
                (active.add if unmask else active.discard)(peer)
            return tuple(sorted(active))

    def lost(self) -> dict[int, str]:
        with self._core.changing:
            gone = {peer: self._core.gone(peer) for peer in sorted(self.links)}
        return {peer: WHY[why] for peer, why in gone.items() if why in (ENDED, BROKEN_LINK)}

    def is_remote(self, peer: int) -> bool:
        """Raises: KeyError: not connected."""
        with self._core.changing:
            return self.links[peer].remote

    def number(self, peer: int) -> int | None:
        """See `HostBuffer.link`."""
        b = self._core.b
        with self._core.changing:
            if self.links[peer] is not self._members.installed.get(peer) or not b.up[peer]:
                return None
            return (int(b.session[peer]) >> LINK_SHIFT) & MOST_LINK

    def nonce(self, peer: int) -> bytes:
        """Raises: KeyError: not connected."""
        with self._core.changing:
            return self.links[peer].address.nonce

    # ---- what is noted ----------------------------------------------------------------------

    def add(self, link: Link) -> None:
        """A new link; masked. Raises: PeerUnreachable: the process has exited meanwhile."""
        core = self._core
        with core.changing:
            core.check_open()
            core.set_gone(link.peer, 0)
            if isinstance(link, ShmLink):
                self._watcher.add(link.peer, link.address.pid, link.address.started)
            self.links[link.peer] = link
            self._wishes.pop(link.peer, None)
            if link.peer in self._members.active:  # its predecessor left, but an exchange goes on
                self._wishes[link.peer] = False
            self._changed = True
            if isinstance(link, ShmLink):
                nonce = link.address.nonce
                lib.fx_export_place(core.b, link.peer, link.inbox.number, nonce)
        self.apply_now()
        with core.changing, core.signalling:  # in this order, as everywhere
            if self._members.installed.get(link.peer) is link:
                lib.fx_ring_peer(core.b, link.peer)

    def disconnect(self, ids: Iterable[int]) -> None:
        core = self._core
        with core.changing:
            for peer in sorted(set(ids)):
                link = self.links.pop(peer, None)
                if link is None:
                    continue
                self._watcher.remove(peer)
                if isinstance(link, ShmLink):
                    lib.fx_export_place(core.b, peer, -1, ffi.NULL)
                self._departed.append(link)
                self._wishes[peer] = False
                self._changed = True
                core.set_gone(peer, MASKED)
        self.apply_now()

    def grow(self, capacity: int) -> None:
        core = self._core
        with core.changing:
            core.check_open()
            if capacity < core.spec.capacity:
                raise ValueError(
                    f"capacity is {core.spec.capacity}; it cannot shrink to {capacity}"
                )
            core.resize(capacity)

    def shrink(self, capacity: int) -> None:
        core = self._core
        with core.changing:
            core.check_open()
            if not core.rank < capacity <= core.spec.capacity:
                raise ValueError(
                    f"capacity is {core.spec.capacity} and rank {core.rank} must stay below it; "
                    f"it cannot shrink to {capacity}"
                )
            core.resize(capacity)
            self.disconnect([peer for peer in self.links if peer >= capacity])

    def wish(self, ids: Iterable[int], *, unmask: bool) -> None:
        """unmask: or mask."""
        core = self._core
        with core.changing:
            core.check_open()
            desired = sorted(set(ids))
            for peer in desired:
                if unmask and peer != core.rank and peer not in self.links:
                    raise ValueError(f"rank {peer} is not connected")
                if not unmask and peer == core.rank:
                    raise ValueError(f"rank {peer} is this rank; it cannot mask itself")
            now = self.active()
            for peer in desired:
                if peer == core.rank or (peer in now) == unmask or peer not in self.links:
                    continue
                self._wishes[peer] = unmask
                self._changed = True
                if unmask and core.gone(peer) in (MASKED, RESTARTED):
                    core.set_gone(peer, 0)
                elif not unmask and not core.gone(peer):
                    core.set_gone(peer, MASKED)
        self.apply_now()

    # ---- what takes effect ------------------------------------------------------------------

    def set_active(self, ids: Iterable[int], epoch: int) -> None:
        core, members = self._core, self._members
        with core.exchanging, core.changing:
            core.check_open()
            desired = tuple(sorted(set(ids)))
            if core.rank not in desired:
                raise ValueError(f"rank {core.rank} is not among the active ids {desired}")
            for peer in desired:
                if peer != core.rank and peer not in self.links:
                    raise ValueError(f"rank {peer} is not connected")
            if not core.epoch < epoch <= _MAX_EPOCH:
                raise ValueError(f"epoch {epoch} does not follow epoch {core.epoch}")
            # a peer may still be reading what an unfinished exchange sent: see kernels.c
            core.must_vote |= core.state is not State.BETWEEN
            core.must_vote |= not members.parted.isdisjoint(desired)
            core.state = State.BETWEEN
            core.received = None
            core.posted = False
            core.b.ballot_bytes = -1
            self._wishes.clear()
            self._apply()
            for peer in desired:
                if core.gone(peer) in (MASKED, RESTARTED):
                    core.set_gone(peer, 0)
            core.epoch = epoch
            core.sequence = 0
            members.begin_epoch(desired, epoch)
            lib.fx_resume(core.b)

    def begin(self, otherwise: str) -> None:
        """Between two exchanges: let changes take effect."""
        core = self._core
        core.check_whole()
        if core.state is not State.BETWEEN:
            raise CommError(f"{otherwise} (epoch {core.epoch})")
        if self._changed:
            self.apply_now()
        lib.fx_greet(core.b)

    def apply_now(self) -> None:
        """Apply changes if no exchange and no vote is under way; else the next one will."""
        core = self._core
        if core.exchanging.acquire(blocking=False):
            try:
                # an interrupted epoch is over, whatever was posted in it
                over = core.state is State.BROKEN or bool(lib.fx_is_interrupted(core.b))
                between = core.state in (State.BETWEEN, State.BROKEN)
                if between and (over or not core.posted):
                    with core.changing:
                        self._apply()
            finally:
                core.exchanging.release()

    def _apply(self) -> None:
        """Make the kernels know what was changed. Nobody's rows are being read."""
        members = self._members
        self._changed = False
        for link in self._departed:
            members.remove(link)
            link.close()
        if self._departed:
            self._core.received = None
            self._departed.clear()
            self._remote.close_unused(self.links.values())
        for link in self.links.values():
            members.install(link)
        members.open_places(again=True)
        wishes, self._wishes = self._wishes, {}
        members.drop([peer for peer, unmask in wishes.items() if not unmask])
        members.take_in([peer for peer, unmask in wishes.items() if unmask])
        self._remote.flush()

    def close_links(self) -> None:
        """Of a buffer that has ended."""
        for link in [*self.links.values(), *self._departed]:
            link.close()
        self._members.relays.close()
        self.links.clear()
        self._members.installed.clear()
        self._departed.clear()
        self._remote.close_unused(())

    def stop_watching(self) -> None:
        """Without locks: the watching thread may be waiting for one."""
        self._watcher.close()
