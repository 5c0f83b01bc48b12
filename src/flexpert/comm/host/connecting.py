"""How peers come to be connected: by their addresses, or by meeting them through a store."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import msgspec

from flexpert.comm import rendezvous
from flexpert.comm.errors import CommError, PeerUnreachable
from flexpert.comm.host.arguments import limit_ns
from flexpert.comm.host.changes import Changes
from flexpert.comm.host.core import Core, State
from flexpert.comm.host.gateways import group_of
from flexpert.comm.host.links import Greeting, Link, NixlLink, ShmLink, choose_channel
from flexpert.comm.host.remote import Remote
from flexpert.comm.host.window import WindowAddress, decode

if TYPE_CHECKING:
    from flexpert.comm.bounded import StoreKeys


class Connector:
    """Opens links and adds them to `Changes`, masked."""

    def __init__(
        self,
        core: Core,
        changes: Changes,
        remote: Remote,
        *,
        greeting: Greeting,
        store: StoreKeys | None,
    ) -> None:
        self._core = core
        self._changes = changes
        self._remote = remote
        self._greeting = greeting
        self._store = store
        self._connecting = threading.Lock()  # one meeting at a time

    def connect(
        self, peers: Mapping[int, bytes] | Iterable[int], timeout_s: float | None
    ) -> list[int]:
        """See `Buffer.connect`. Returns: the ids of the peers, sorted."""
        core = self._core
        limit_s = core.timeout_s if timeout_s is None else timeout_s
        limit_ns(limit_s)
        core.check_open()
        ids = sorted(set(peers))
        for peer in ids:
            if not 0 <= peer < core.spec.capacity:
                raise ValueError(f"rank {peer} is outside of the capacity {core.spec.capacity}")
        with self._connecting:
            if isinstance(peers, Mapping):
                self._connect_addresses(peers)
            else:
                self._meet([peer for peer in ids if peer not in self._changes.connected()], limit_s)
        return ids

    def _connect_addresses(self, peers: Mapping[int, bytes]) -> None:
        core, changes = self._core, self._changes
        with core.changing:
            opened: list[Link] = []
            try:
                for peer, address in self._new_peers(peers).items():
                    opened.append(ShmLink(peer, address, core.window, core.spec))
            except (CommError, ValueError, OSError):
                for link in opened:
                    link.close()
                raise
            for at, link in enumerate(opened):
                try:
                    changes.add(link)
                except PeerUnreachable:
                    changes.disconnect(done.peer for done in opened[:at])
                    for rest in opened[at:]:
                        rest.close()
                    raise

    def _new_peers(self, peers: Mapping[int, bytes]) -> dict[int, WindowAddress]:
        new: dict[int, WindowAddress] = {}
        for peer, encoded in peers.items():
            if peer == self._core.rank:
                continue
            address = decode(encoded)
            known = self._changes.links.get(peer)
            if known is None:
                new[peer] = address
            elif known.address != address:
                raise ValueError(
                    f"rank {peer} is connected to pid {known.address.pid} already; "
                    "disconnect it before its id is used again"
                )
        return new

    def _meet(self, ids: list[int], limit_s: float) -> None:
        if self._store is None:
            raise ValueError(
                "ids are met through a store: give make_buffer(store=...), or connect addresses"
            )
        core = self._core
        if ids:
            rendezvous.meet(
                self._store,
                core.rank,
                ids,
                _Host(core, self._changes, self._remote, self._greeting),
                timeout_s=limit_s,
                epoch=core.epoch,
                cancelled=lambda: core.state is State.CLOSED,
            )


class _Host(rendezvous.Host):
    """How links come about when two ranks meet through a store."""

    def __init__(self, core: Core, changes: Changes, remote: Remote, greeting: Greeting) -> None:
        self._core = core
        self._changes = changes
        self._remote = remote
        self._greeting = greeting
        self._half: dict[int, Link] = {}

    def greet(self) -> bytes:
        return msgspec.msgpack.encode(self._greeting)

    def prepare(self, peer: int, greeting: bytes) -> bytes:
        self.forget(peer)
        try:
            theirs = msgspec.msgpack.decode(greeting, type=Greeting)
        except msgspec.MsgspecError as error:
            raise ValueError(f"what rank {peer} wrote is no greeting: {error}") from error
        if theirs.address.group not in (b"", group_of(theirs.machine)):
            raise ValueError(f"rank {peer} would share rows of another machine than its own")
        window, spec = self._core.window, self._core.spec
        if choose_channel(self._greeting, theirs) == "shm":
            self._half[peer] = ShmLink(peer, theirs.address, window, spec)
            return b""
        if theirs.address.spec != window.address.spec:
            raise ValueError(f"rank {peer} has a window of another spec than {spec}")
        link = NixlLink(peer, theirs.address, self._remote.endpoint(), spec)
        self._half[peer] = link
        return link.offer

    def open(self, peer: int, details: bytes) -> None:
        link = self._half[peer]
        if isinstance(link, NixlLink):
            link.open(details)
        self._changes.add(link)
        del self._half[peer]

    def forget(self, peer: int) -> None:
        link = self._half.pop(peer, None)
        if link is not None:
            link.close()
