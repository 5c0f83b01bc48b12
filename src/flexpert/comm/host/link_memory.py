"""The memory of a rank's links to other machines: one memfd, so that ranks of the same machine may
map what came for all of them, and what they answer together."""

from __future__ import annotations

import os
import secrets

from flexpert.comm.errors import CommError
from flexpert.comm.host import memfd
from flexpert.comm.host._kernels import ffi, lib
from flexpert.comm.window_layout import MAGIC, MAGIC_AT, NONCE_BYTES, PAGE, align

_NAME = "flexpert-links"


class LinkMemory:
    """Parts are taken and given back; no part of the file is ever taken twice.

    nonce: what tells it from all others.
    """

    def __init__(self) -> None:
        self.nonce = secrets.token_bytes(NONCE_BYTES)
        self.fd = memfd.create(_NAME, PAGE)
        os.pwrite(self.fd, MAGIC + self.nonce, MAGIC_AT)
        self._end = PAGE

    def take(self, size: int) -> tuple[int, int]:
        """A part of zeros: where it lies in the file, and where it is mapped.

        Raises: CommError: no memory.
        """
        offset, room = self._end, align(size, PAGE)
        try:
            os.ftruncate(self.fd, offset + room)
            if not memfd.overcommits():
                memfd.reserve(self.fd, offset, room)
        except OSError as error:
            raise CommError(f"no memory for {size} bytes of a link: {error.strerror}") from error
        at = int(lib.fx_map(self.fd, offset, room))
        if at == 0:
            raise CommError(f"cannot map {size} bytes of a link: {os.strerror(ffi.errno)}")
        self._end += room
        return offset, at

    def give_back(self, offset: int, at: int, size: int) -> None:
        """Unmap a part and give its memory back."""
        lib.fx_unmap(at, align(size, PAGE))
        self.empty(offset, size)

    def empty(self, offset: int, size: int) -> None:
        """Give the memory of a part back, and leave it mapped."""
        lib.fx_punch(self.fd, offset, align(size, PAGE))

    def close(self) -> None:
        """Parts that are still mapped stay so."""
        os.close(self.fd)


def open_link_memory(peer: int, *, pid: int, started: int, fd: int, nonce: bytes) -> int:
    """A descriptor of a peer's `LinkMemory`. Never waits.

    Raises: PeerUnreachable: the process is gone, or has closed it.
    """
    return memfd.open_of(
        f"rank {peer} (pid {pid})",
        "memory of links",
        pid=pid,
        started=started,
        fd=fd,
        name=_NAME,
        header=MAGIC + nonce,
        header_at=MAGIC_AT,
    )
