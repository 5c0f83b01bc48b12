"""The memory that a rank's peers write into, see memfd.py; each connection has a place of its own
in it, see window_layout.py."""

from __future__ import annotations

import os
import secrets
from dataclasses import dataclass

import msgspec
import torch

from flexpert.comm.buffer import BufferSpec
from flexpert.comm.errors import CommError, PeerUnreachable
from flexpert.comm.host import memfd
from flexpert.comm.host._kernels import ffi, lib
from flexpert.comm.host.memfd import boot_id, start_time
from flexpert.comm.window_layout import (
    CONTROL_BYTES,
    HEADER_BYTES,
    MAGIC,
    MAGIC_AT,
    NONCE_AT,
    NONCE_BYTES,
    RANK_AT,
    SPEC_HASH_AT,
    WindowLayout,
    layout,
    spec_hash,
)

MEMFD_NAME = "flexpert-window"


class WindowAddress(msgspec.Struct, frozen=True, array_like=True):
    """What a peer needs to find a window and to know that it is the right one."""

    boot_id: str
    pid: int
    started: int  # clock ticks after boot
    fd: int
    nonce: bytes
    spec: bytes
    rank: int
    group: bytes = b""  # equal on ranks that share rows from other machines; b"": it shares none


def encode(address: WindowAddress) -> bytes:
    return msgspec.msgpack.encode(address)


def decode(address: bytes) -> WindowAddress:
    """Raises: ValueError: not an address of this backend."""
    try:
        return msgspec.msgpack.decode(address, type=WindowAddress)
    except msgspec.MsgspecError as error:
        raise ValueError(f"not an address of a host window: {error}") from error


def map_part(fd: int, offset: int, size: int) -> int:
    """Map a part of a window; own memory that nobody shares with fd -1."""
    at = int(lib.fx_map(fd, offset, size))
    if at == 0:
        error = ffi.errno
        raise CommError(f"cannot map {size} bytes of a window: {os.strerror(error)}")
    return at


def _map_to_read(fd: int, offset: int, size: int) -> int:
    at = int(lib.fx_map_to_read(fd, offset, size))
    if at == 0:
        raise CommError(f"cannot map {size} bytes of a window: {os.strerror(ffi.errno)}")
    return at


def _map_shared(fd: int, size: int) -> torch.Tensor:
    """The own shared rows, mapped for as long as any tensor of them lives."""
    at = map_part(fd, CONTROL_BYTES, size)
    mapped = ffi.gc(ffi.cast("char *", at), lambda _: lib.fx_unmap(at, size))
    return torch.frombuffer(ffi.buffer(mapped, size), dtype=torch.uint8)


@dataclass(frozen=True, slots=True)
class WindowPlace:
    """The part of the own window that one source may write: its number and where it is mapped."""

    number: int
    at: int


class HostWindow:
    """The own window: created with the control part only; it grows by a place for each peer."""

    def __init__(self, rank: int, spec: BufferSpec, group: bytes = b"") -> None:
        """group: see `WindowAddress`."""
        self.layout: WindowLayout = layout(spec)
        nonce = secrets.token_bytes(NONCE_BYTES)
        self.fd = memfd.create(MEMFD_NAME, self.layout.place_at(0))
        os.pwrite(self.fd, _header(spec_hash(spec), nonce, rank), MAGIC_AT)
        self.address = WindowAddress(
            boot_id=boot_id(),
            pid=os.getpid(),
            started=start_time(os.getpid()),
            fd=self.fd,
            nonce=nonce,
            spec=spec_hash(spec),
            rank=rank,
            group=group,
        )
        self.control = map_part(self.fd, 0, CONTROL_BYTES)
        self.shares_results = memfd.overcommits()
        """Whether results may be shared: their part is sparse, and mostly never touched."""
        if not self.shares_results:
            memfd.reserve(self.fd, CONTROL_BYTES, self.layout.shared_results_at)
        self.shared = _map_shared(self.fd, self.layout.shared_bytes)
        """uint8 [shared_bytes]; outlives the window with whoever has a tensor in it."""
        self._places: dict[int, WindowPlace] = {}
        self._next = 0

    def export_memory(self) -> WindowPlace:
        """A place that was never exported before.

        Raises: CommError: there is no memory for it.
        """
        number = self._next
        try:
            os.ftruncate(self.fd, self.layout.place_at(number + 1))
            if not memfd.overcommits():
                memfd.reserve(self.fd, self.layout.place_at(number), self.layout.place_bytes)
        except OSError as error:
            raise CommError(f"no place of a window: {error.strerror}") from error
        place = WindowPlace(
            number, map_part(self.fd, self.layout.place_at(number), self.layout.place_bytes)
        )
        self._next += 1
        self._places[number] = place
        return place

    def take_back(self, place: WindowPlace) -> None:
        """Unmap a place and give its memory back. A source that still writes writes into nothing
        that anybody reads."""
        del self._places[place.number]
        lib.fx_unmap(place.at, self.layout.place_bytes)
        lib.fx_punch(self.fd, self.layout.place_at(place.number), self.layout.place_bytes)

    def empty_shared(self) -> None:
        """Give the memory of the shared rows back, unless it is reserved; they are zeros then."""
        if self.shares_results:
            lib.fx_punch(self.fd, CONTROL_BYTES, self.layout.shared_bytes)

    def memory_bytes(self) -> int:
        """Memory the window takes now."""
        return os.fstat(self.fd).st_blocks * 512

    def close(self) -> None:
        for place in self._places.values():
            lib.fx_unmap(place.at, self.layout.place_bytes)
        self._places.clear()
        lib.fx_unmap(self.control, CONTROL_BYTES)
        self.shared = self.shared.new_empty(0)
        os.close(self.fd)


class PeerWindow:
    """A peer's window, as far as this rank may touch it: its control part, the rows that it shares
    (to read), and the place exported to this rank.

    Opening the control part never waits; the place is there once the peer has connected, too.
    """

    def __init__(self, peer: int, address: WindowAddress, spec: BufferSpec) -> None:
        """
        Raises:
            PeerUnreachable: the process is gone, out of reach, or another one has its pid.
            ValueError: the address is of another rank or spec.
        """
        self.address = address
        self.number = -1
        self.place = 0
        self._peer, self._spec = peer, spec
        self._layout = layout(spec)
        self._fd = _open(peer, address, spec)
        try:
            self.control = map_part(self._fd, 0, CONTROL_BYTES)
            self.shared = _map_to_read(self._fd, CONTROL_BYTES, self._layout.shared_bytes)
        except CommError:
            os.close(self._fd)
            raise

    def open_place(self, number: int) -> int:
        """Map the place that was exported, instead of one that was exported before; the descriptor
        is not needed any more.

        Raises: PeerUnreachable: the window is smaller than that, or its process is gone.
        """
        if self._fd < 0:
            self._fd = _open(self._peer, self.address, self._spec)
        at = self._layout.place_at(number)
        if os.fstat(self._fd).st_size < at + self._layout.place_bytes:
            raise PeerUnreachable(
                f"pid {self.address.pid} has exported a place that does not exist"
            )
        before, self.place = self.place, map_part(self._fd, at, self._layout.place_bytes)
        self.number = number
        self._close_fd()
        if before:
            lib.fx_unmap(before, self._layout.place_bytes)
        return self.place

    def close(self) -> None:
        self._close_fd()
        lib.fx_unmap(self.control, CONTROL_BYTES)
        lib.fx_unmap(self.shared, self._layout.shared_bytes)
        if self.place:
            lib.fx_unmap(self.place, self._layout.place_bytes)

    def _close_fd(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _open(peer: int, address: WindowAddress, spec: BufferSpec) -> int:
    """A descriptor of the peer's window. Never waits."""
    if address.spec != spec_hash(spec):
        raise ValueError(f"rank {peer} has a window of another spec than {spec}")
    if address.rank != peer:
        raise ValueError(f"the address given for rank {peer} is that of rank {address.rank}")
    where = f"rank {peer} (pid {address.pid})"
    if address.boot_id != boot_id():
        raise PeerUnreachable(f"{where} is on another machine, or this one was restarted")
    fd = memfd.open_of(
        where,
        "window",
        pid=address.pid,
        started=address.started,
        fd=address.fd,
        name=MEMFD_NAME,
        header=_header(address.spec, address.nonce, peer),
        header_at=MAGIC_AT,
    )
    try:
        if os.fstat(fd).st_size < layout(spec).place_at(0):
            raise PeerUnreachable(f"{where} has a window of an unexpected size")
    except BaseException:
        os.close(fd)
        raise
    return fd


def _header(spec: bytes, nonce: bytes, rank: int) -> bytes:
    header = bytearray(HEADER_BYTES)
    for at, part in (
        (MAGIC_AT, MAGIC),
        (SPEC_HASH_AT, spec),
        (NONCE_AT, nonce),
        (RANK_AT, rank.to_bytes(4, "little")),
    ):
        header[at : at + len(part)] = part
    return bytes(header)
