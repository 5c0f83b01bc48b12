"""The memory a rank lends to its peers: a memfd, found through /proc/<pid>/fd.

No name in a file system and no socket: when the last process that maps a window ends, by whatever
signal, the window is gone. A peer that has opened it keeps it alive, so that nobody's write hits
unmapped memory when a rank dies. Each connection has a place of its own in it, see layout.py.

A window is proven by the nonce in its header: a process that got a dead rank's pid cannot have it.
The kernel lets a process open it if it may look into the owner (same user, same pid namespace).
"""

from __future__ import annotations

import fcntl
import os
import secrets
from dataclasses import dataclass
from pathlib import Path

import msgspec

from flexpert.comm.buffer import BufferSpec
from flexpert.comm.errors import CommError, PeerUnreachable
from flexpert.comm.host._kernels import ffi, lib
from flexpert.comm.layout import (
    CONTROL_BYTES,
    HEADER_BYTES,
    MAGIC,
    MAGIC_AT,
    NONCE_AT,
    NONCE_BYTES,
    RANK_AT,
    SPEC_HASH_AT,
    Layout,
    layout,
    spec_hash,
)

MEMFD_NAME = "flexpert-window"
MFD_NOEXEC_SEAL = 0x8  # not in Python's os yet; Linux 6.3


class Address(msgspec.Struct, frozen=True, array_like=True):
    """What a peer needs to find a window and to know that it is the right one."""

    boot_id: str
    pid: int
    started: int  # clock ticks after boot
    fd: int
    nonce: bytes
    spec: bytes
    rank: int


def encode(address: Address) -> bytes:
    return msgspec.msgpack.encode(address)


def decode(address: bytes) -> Address:
    """Raises: ValueError: not an address of this backend."""
    try:
        return msgspec.msgpack.decode(address, type=Address)
    except msgspec.MsgspecError as error:
        raise ValueError(f"not an address of a host window: {error}") from error


def boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def start_time(pid: int) -> int:
    """Clock ticks after boot at which a process started; with the pid it names the process."""
    stat = Path(f"/proc/{pid}/stat").read_text()
    return int(stat[stat.rindex(")") + 2 :].split()[19])


def map_part(fd: int, offset: int, size: int) -> int:
    """Map a part of a window; own memory that nobody shares with fd -1."""
    at = int(lib.fx_map(fd, offset, size))
    if at == 0:
        error = ffi.errno
        raise CommError(f"cannot map {size} bytes of a window: {os.strerror(error)}")
    return at


@dataclass(frozen=True, slots=True)
class Place:
    """The part of the own window that one source may write: its number and where it is mapped."""

    number: int
    at: int


class Window:
    """The own window: created with the control part only; it grows by a place for each peer."""

    def __init__(self, rank: int, spec: BufferSpec) -> None:
        self.layout: Layout = layout(spec)
        nonce = secrets.token_bytes(NONCE_BYTES)
        self.fd = _create(CONTROL_BYTES)
        os.pwrite(self.fd, _header(spec_hash(spec), nonce, rank), MAGIC_AT)
        self.address = Address(
            boot_id=boot_id(),
            pid=os.getpid(),
            started=start_time(os.getpid()),
            fd=self.fd,
            nonce=nonce,
            spec=spec_hash(spec),
            rank=rank,
        )
        self.control = map_part(self.fd, 0, CONTROL_BYTES)
        self._places: dict[int, Place] = {}
        self._next = 0

    def lend(self) -> Place:
        """A place that was never lent before."""
        number = self._next
        os.ftruncate(self.fd, self.layout.place_at(number + 1))
        place = Place(
            number, map_part(self.fd, self.layout.place_at(number), self.layout.place_bytes)
        )
        self._next += 1
        self._places[number] = place
        return place

    def take_back(self, place: Place) -> None:
        """Unmap a place and give its memory back. A source that still writes writes into nothing
        that anybody reads."""
        del self._places[place.number]
        lib.fx_unmap(place.at, self.layout.place_bytes)
        lib.fx_punch(self.fd, self.layout.place_at(place.number), self.layout.place_bytes)

    def memory_bytes(self) -> int:
        """Memory the window takes now."""
        return os.fstat(self.fd).st_blocks * 512

    def close(self) -> None:
        for place in self._places.values():
            lib.fx_unmap(place.at, self.layout.place_bytes)
        self._places.clear()
        lib.fx_unmap(self.control, CONTROL_BYTES)
        os.close(self.fd)


class PeerWindow:
    """A peer's window, as far as this rank may touch it: its control part and the place lent to it.

    Opening the control part never waits; the place is there once the peer has connected, too.
    """

    def __init__(self, peer: int, address: Address, spec: BufferSpec) -> None:
        """
        Raises:
            PeerUnreachable: the process is gone, out of reach, or another one has its pid.
            ValueError: the address is of another rank or spec.
        """
        self.address = address
        self.place = 0
        self._fd = _open(peer, address, spec)
        try:
            self.control = map_part(self._fd, 0, CONTROL_BYTES)
        except CommError:
            os.close(self._fd)
            raise
        self._layout = layout(spec)

    def open_place(self, number: int) -> int:
        """Map the place that was lent; its descriptor is not needed any more.

        Raises: PeerUnreachable: the window is smaller than that.
        """
        at = self._layout.place_at(number)
        if os.fstat(self._fd).st_size < at + self._layout.place_bytes:
            raise PeerUnreachable(f"pid {self.address.pid} has lent a place that does not exist")
        self.place = map_part(self._fd, at, self._layout.place_bytes)
        self._close_fd()
        return self.place

    def close(self) -> None:
        self._close_fd()
        lib.fx_unmap(self.control, CONTROL_BYTES)
        if self.place:
            lib.fx_unmap(self.place, self._layout.place_bytes)

    def _close_fd(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _open(peer: int, address: Address, spec: BufferSpec) -> int:
    """A descriptor of the peer's window. Never waits."""
    if address.spec != spec_hash(spec):
        raise ValueError(f"rank {peer} has a window of another spec than {spec}")
    if address.rank != peer:
        raise ValueError(f"the address given for rank {peer} is that of rank {address.rank}")
    where = f"rank {peer} (pid {address.pid})"
    if address.boot_id != boot_id():
        raise PeerUnreachable(f"{where} is on another machine, or this one was restarted")
    try:
        if start_time(address.pid) != address.started:
            raise PeerUnreachable(f"{where} is gone; its pid belongs to another process")
        path = f"/proc/{address.pid}/fd/{address.fd}"
        # before opening: with a recycled descriptor, opening alone could have effects
        if not os.readlink(path).startswith(f"/memfd:{MEMFD_NAME}"):
            raise PeerUnreachable(f"{where} has closed its window")
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise PeerUnreachable(f"{where} cannot be reached: {error.strerror}") from error
    try:
        if os.pread(fd, HEADER_BYTES, MAGIC_AT) != _header(address.spec, address.nonce, peer):
            raise PeerUnreachable(f"{where} has closed its window; another one took its place")
        if os.fstat(fd).st_size < CONTROL_BYTES:
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


def _create(size: int) -> int:
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        fd = os.memfd_create(MEMFD_NAME, flags | MFD_NOEXEC_SEAL)
    except OSError:  # kernels before 6.3
        fd = os.memfd_create(MEMFD_NAME, flags)
    try:
        os.ftruncate(fd, size)
        # a peer that could shrink the file could kill this process with SIGBUS
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
    except OSError:
        os.close(fd)
        raise
    return fd
