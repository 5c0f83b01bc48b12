"""Where two nixl_ep ranks find each other.

nixl_ep exchanges what its ranks need to know through a torch store, and waits in there without a
limit of ours. So two ranks first meet at the door (comm/rendezvous.py): both are alive, and both
want to connect now. Then they go through it, under keys that no other pair of processes has: what
a dead rank left behind is never read.

Ranks that were given no common store meet in that of the lower id: memory that is found as windows
are (shared_store.py). It is open to processes of the same user on the same machine, and ends with
them.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import msgspec

from flexpert.comm import rendezvous
from flexpert.comm.buffer import BufferSpec
from flexpert.comm.host import memfd
from flexpert.comm.nixl_ep.shared_store import SharedStore, Under
from flexpert.comm.window_layout import spec_hash

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]


class NixlEpAddress(msgspec.Struct, frozen=True, array_like=True):
    """What a peer needs to connect.

    control: address of the HostBuffer. spec, slots: must be equal. The rest: of the store's memfd.
    """

    control: bytes
    spec: bytes
    slots: int
    pid: int
    started: int
    fd: int
    name: str

    def encode(self) -> bytes:
        return msgspec.msgpack.encode(self)


def decode(peer: int, encoded: bytes, spec: BufferSpec, slots: int) -> NixlEpAddress:
    """Raises: ValueError: no address of a nixl_ep rank, or one of other sizes."""
    try:
        address = msgspec.msgpack.decode(encoded, type=NixlEpAddress)
    except msgspec.MsgspecError as error:
        raise ValueError(f"the address of rank {peer} is none of a nixl_ep rank") from error
    if address.spec != spec_hash(spec) or address.slots != slots:
        raise ValueError(f"rank {peer} has a buffer of other sizes than {spec}, {slots} slots")
    return address


class MeetingPlace:
    """Memory of this rank: a store for those who come to it."""

    def __init__(self) -> None:
        self._name = f"flexpert-nixl-ep-{secrets.token_hex(8)}"
        self._fd = memfd.create(self._name, 0)
        self.store = SharedStore(self._fd)

    def address(self, control: bytes, spec: BufferSpec, slots: int) -> NixlEpAddress:
        pid = os.getpid()
        started = memfd.start_time(pid)
        return NixlEpAddress(control, spec_hash(spec), slots, pid, started, self._fd, self._name)

    def close(self) -> None:
        self.store.close()


@contextmanager
def store_of(peer: int, address: NixlEpAddress) -> Iterator[SharedStore]:
    """The store of a peer's `MeetingPlace`. Raises: PeerUnreachable: the process is gone."""
    store = SharedStore(
        memfd.open_of(
            f"rank {peer}",
            "store",
            pid=address.pid,
            started=address.started,
            fd=address.fd,
            name=address.name,
            header=b"",
            header_at=0,
        )
    )
    try:
        yield store
    finally:
        store.close()


def pair_store(store: Store | SharedStore, what: str, one: bytes, other: bytes) -> Under:
    """Keys of a pair of processes, named by their nonces, for one thing that they do."""
    low, high = sorted((one.hex(), other.hex()))
    return Under(f"flexpert/nixl_ep/{what}/{low}-{high}", store)


class _Visitor(rendezvous.Host):
    """At the door there is nothing to say."""

    def greet(self) -> bytes:
        return b""

    def prepare(self, peer: int, greeting: bytes) -> bytes:
        return b""

    def open(self, peer: int, details: bytes) -> None:
        pass

    def forget(self, peer: int) -> None:
        pass


def at_the_door(
    store: Under,
    rank: int,
    peer: int,
    *,
    timeout_s: float,
    epoch: int,
    cancelled: Callable[[], bool],
) -> None:
    """Wait until the peer wants to connect, too.

    Raises: RankTimeout, CommError: as `rendezvous.meet`.
    """
    rendezvous.meet(
        store, rank, [peer], _Visitor(), timeout_s=timeout_s, epoch=epoch, cancelled=cancelled
    )
