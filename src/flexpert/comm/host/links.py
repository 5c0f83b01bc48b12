"""The two kinds of links to a peer, and how a pair agrees on one.

A link has an inbox (the place in the own window that the peer writes) and an outbox (where this
rank writes for the peer). Over shared memory the outbox is the place in the peer's window. Over
NIXL it is own memory; what is written there is sent with `NixlLink.flush`, and what arrives is put
into the inbox by `NixlLink.store`, so that the kernels see no difference.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Literal

import msgspec

from flexpert.comm.buffer import BufferSpec, Channel
from flexpert.comm.host._kernels import ffi
from flexpert.comm.host.memfd import boot_id
from flexpert.comm.host.window import HostWindow, PeerWindow, WindowAddress, WindowPlace
from flexpert.comm.window_layout import (
    COMBINE_FLAG_AT,
    DISPATCH_FLAG_AT,
    HELLO_AT,
    LINE,
    ROWS_AT,
    VOTES_AT,
    align,
    layout,
)

if TYPE_CHECKING:
    from flexpert.comm.host import nixl

# as in kernels.c
DUE_HELLO, DUE_VOTE, DUE_DISPATCH, DUE_COMBINE = 1, 2, 4, 8

_LINES = frozenset(range(HELLO_AT, COMBINE_FLAG_AT + 1, LINE))
_OFFSET_BYTES = 2


class Greeting(msgspec.Struct, frozen=True, array_like=True):
    """What a rank tells every peer that it meets through a store."""

    machine: str
    channel: Channel
    address: WindowAddress


def this_machine() -> str:
    """Equal on two processes that can open each other's windows."""
    return f"{boot_id()}/{os.readlink('/proc/self/ns/pid')}/{os.getuid()}"


def choose_channel(own: Greeting, theirs: Greeting) -> Literal["shm", "nixl"]:
    """The same on both sides. Raises: ValueError: they insist on different ones."""
    asked = {own.channel, theirs.channel} - {"auto"}
    if len(asked) > 1:
        raise ValueError(
            f"rank {own.address.rank} wants channel {own.channel!r}, rank {theirs.address.rank} "
            f"{theirs.channel!r}: give both the same, or 'auto'"
        )
    if asked:
        return "shm" if "shm" in asked else "nixl"
    return "shm" if own.machine == theirs.machine else "nixl"


class ShmLink:
    """A peer on this machine."""

    remote = False

    def __init__(
        self, peer: int, address: WindowAddress, window: HostWindow, spec: BufferSpec
    ) -> None:
        """Raises: PeerUnreachable, ValueError: see `PeerWindow`."""
        self.peer = peer
        self.address = address
        self._own = window
        self._theirs = PeerWindow(peer, address, spec)
        try:
            self.inbox = window.export_memory()
        except BaseException:
            self._theirs.close()
            raise

    @property
    def control(self) -> int:
        return self._theirs.control

    @property
    def shared(self) -> int:
        """Where the rows that the peer shares are mapped."""
        return self._theirs.shared

    @property
    def outbox(self) -> int:
        """0 until `open_place`."""
        return self._theirs.place

    @property
    def place(self) -> int:
        """Its number; -1 until `open_place`."""
        return self._theirs.number

    def open_place(self, number: int) -> None:
        """Raises: PeerUnreachable: there is no such place."""
        self._theirs.open_place(number)

    def close(self) -> None:
        self._own.take_back(self.inbox)
        self._theirs.close()


class NixlLink:
    """A peer on another machine, or one that is to be treated so."""

    remote = True
    control = shared = 0

    def __init__(
        self, peer: int, address: WindowAddress, endpoint: nixl.Endpoint, spec: BufferSpec
    ) -> None:
        """Raises: CommError: no memory for it."""
        self.peer = peer
        self.address = address
        self._layout = layout(spec)
        self._link = endpoint.link(self._layout.place_bytes, clear=ROWS_AT)
        self.memory = endpoint.memory
        self.inbox = WindowPlace(-1, self._link.inbox)
        self.outbox = self._link.outbox

    @property
    def offer(self) -> bytes:
        """What the peer needs to write into the inbox."""
        return self._link.offer

    @property
    def inbox_offset(self) -> int:
        """In `memory`, of the place that the peer writes."""
        return self._link.inbox_offset

    @property
    def outbox_offset(self) -> int:
        """In `memory`."""
        return self._link.outbox_offset

    @property
    def bytes_written(self) -> int:
        """To the peer so far, messages included."""
        return self._link.bytes_written

    @property
    def agent(self) -> str:
        """Name of the peer's agent; "" until it is open."""
        return self._link.peer

    def open(self, offer: bytes) -> None:
        """Raises: PeerUnreachable: its agent cannot be reached."""
        self._link.open(offer)

    def flush(self, b: object) -> bool:
        """Send what the kernels have written into the outbox since the last call; whether that was
        anything.

        Raises: LinkBroken
        """
        link, peer = self._link, self.peer
        due: int = b.due[peer]  # type: ignore[attr-defined]
        if not due:
            return False
        b.due[peer] = 0  # type: ignore[attr-defined]
        if due & DUE_HELLO:
            link.notify(self._message(HELLO_AT))
        if due & DUE_VOTE:
            link.notify(self._message(VOTES_AT + b.ballot_line * LINE))  # type: ignore[attr-defined]
        if due & DUE_DISPATCH:
            rows = b.wire_rows[peer]  # type: ignore[attr-defined]
            stride = self._layout.meta_bytes + align(b.payload_bytes, LINE)  # type: ignore[attr-defined]
            self._send(link, ROWS_AT, rows * stride, DISPATCH_FLAG_AT)
        if due & DUE_COMBINE:
            rows = b.from_results[peer]  # type: ignore[attr-defined]
            size = rows * self._layout.result_stride
            self._send(link, self._layout.results_at, size, COMBINE_FLAG_AT)
        return True

    def _send(self, link: nixl.NixlEndpointLink, offset: int, size: int, flag_at: int) -> None:
        if size:
            link.write(offset, size, self._message(flag_at))
        else:
            link.notify(self._message(flag_at))

    def _message(self, at: int) -> bytes:
        line = bytes(ffi.buffer(ffi.cast("char *", self.outbox + at), LINE))
        return at.to_bytes(_OFFSET_BYTES, "little") + line

    def store(self, message: bytes) -> bool:
        """Put a line that has arrived where the kernels look for it; False if it is none."""
        at = int.from_bytes(message[:_OFFSET_BYTES], "little")
        if at not in _LINES or len(message) != _OFFSET_BYTES + LINE:
            return False
        ffi.memmove(ffi.cast("char *", self.inbox.at + at), message[_OFFSET_BYTES:], LINE)
        return True

    def check(self) -> None:
        """Raises: LinkBroken: a transfer failed."""
        self._link.check()

    def is_sending(self) -> bool:
        """Whether something flushed has not left yet."""
        return self._link.is_sending()

    def probe(self) -> None:
        """Makes a dead peer show. Raises: LinkBroken"""
        self._link.probe()

    def close(self) -> None:
        self._link.close()


Link = ShmLink | NixlLink
