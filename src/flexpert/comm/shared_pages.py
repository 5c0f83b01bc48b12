"""Pages of this machine that a process lets others map by an address, until either ends.

An address names the process that has them, by number and start, and what they begin with: it never
means the memory of another.
"""

from __future__ import annotations

import mmap
import os
import secrets

import msgspec

from flexpert.comm.errors import PeerUnreachable
from flexpert.comm.host import memfd

HEADER = 4096  # bytes before what is shared, so that that is aligned
_NAME = "flexpert-exported"
_NONCE_BYTES = 16


class PagesAddress(msgspec.Struct, frozen=True, array_like=True):
    """Of `size` bytes behind the header."""

    boot_id: str
    pid: int
    started: int
    fd: int
    nonce: bytes
    size: int


def create_pages(size: int) -> tuple[bytes, mmap.mmap, int]:
    """The address of new ones, the mapping with its header, and its descriptor.

    Pages are taken on first use, unless the kernel promises no more than it has: then one that is
    missing at first use would end the process.

    Raises: OSError: there is no memory.
    """
    fd = memfd.create(_NAME, HEADER + size)
    try:
        if not memfd.overcommits():
            memfd.reserve(fd, 0, HEADER + size)
        nonce = secrets.token_bytes(_NONCE_BYTES)
        os.pwrite(fd, nonce, 0)
        pid = os.getpid()
        address = PagesAddress(memfd.boot_id(), pid, memfd.start_time(pid), fd, nonce, size)
        mapped = mmap.mmap(fd, HEADER + size)
    except OSError:
        os.close(fd)
        raise
    return msgspec.msgpack.encode(address), mapped, fd


def open_pages(address: bytes, *, writable: bool = False) -> tuple[int, mmap.mmap, int]:
    """How many bytes, the mapping with its header, and its descriptor.

    Raises:
        PeerUnreachable: its process is gone or on another machine.
        ValueError: not an address.
    """
    try:
        there = msgspec.msgpack.decode(address, type=PagesAddress)
    except msgspec.MsgspecError as error:
        raise ValueError(f"not an address of exported memory: {error}") from error
    who = f"pid {there.pid}"
    if there.boot_id != memfd.boot_id():
        raise PeerUnreachable(f"{who} is on another machine, or this one was restarted")
    fd = memfd.open_of(
        who,
        "memory",
        pid=there.pid,
        started=there.started,
        fd=there.fd,
        name=_NAME,
        header=there.nonce,
        header_at=0,
    )
    try:
        if os.fstat(fd).st_size < HEADER + there.size:
            raise PeerUnreachable(f"{who} exports less than it says")
        access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ
        return there.size, mmap.mmap(fd, HEADER + there.size, access=access), fd
    except BaseException:
        os.close(fd)
        raise
