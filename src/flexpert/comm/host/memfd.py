"""Memory that another process of this machine may map: a memfd, found through /proc/<pid>/fd.

No name in a file system and no socket: when the last process that maps it ends, by whatever signal,
the memory is gone; and who has mapped it keeps it, so that nobody reads or writes unmapped memory
when a rank dies. It is proven by a header, which the caller makes unforgeable with a nonce: a
process that got a dead rank's pid cannot have it. The kernel lets a process open it if it may look
into the owner (same user, same pid namespace).
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from flexpert.comm.errors import PeerUnreachable

MFD_NOEXEC_SEAL = 0x8  # not in Python's os yet; Linux 6.3


def boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def start_time(pid: int) -> int:
    """Clock ticks after boot at which a process started; with the pid it names the process."""
    stat = Path(f"/proc/{pid}/stat").read_text()
    return int(stat[stat.rindex(")") + 2 :].split()[19])


def create(name: str, size: int) -> int:
    """A new descriptor of `size` bytes that can grow but not shrink."""
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        fd = os.memfd_create(name, flags | MFD_NOEXEC_SEAL)
    except OSError:  # kernels before 6.3
        fd = os.memfd_create(name, flags)
    try:
        os.ftruncate(fd, size)
        # a peer that could shrink the file could kill this process with SIGBUS
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
    except OSError:
        os.close(fd)
        raise
    return fd


def reserve(fd: int, offset: int, size: int) -> None:
    """Take the pages of a part now: later, one that the kernel has no memory for would end the
    process that touches it (SIGBUS).

    Raises: OSError: there is none.
    """
    try:
        os.posix_fallocate(fd, offset, size)
    except OSError as error:
        what = f"no memory for {size} bytes of shared memory: {error.strerror}"
        raise OSError(error.errno, what) from None


def overcommits() -> bool:
    """Whether the kernel promises memory that it may not have (vm.overcommit_memory not 2).

    Where it does, what it cannot keep ends a process by its OOM killer, reserved or not.
    """
    try:
        return Path("/proc/sys/vm/overcommit_memory").read_text().strip() != "2"
    except OSError:
        return True


def open_of(
    who: str,
    what: str,
    *,
    pid: int,
    started: int,
    fd: int,
    name: str,
    header: bytes,
    header_at: int,
) -> int:
    """A descriptor of another process's memfd, readable and writable. Never waits.

    Args:
        who, what: for error messages: whose it is, and what ("window").
        pid, started, fd: the process and its descriptor; started as `start_time` gives it.
        name: given to `create`.
        header: the bytes that must stand at header_at.

    Raises:
        PeerUnreachable: the process is gone, out of reach, or has something else there.
    """
    try:
        if start_time(pid) != started:
            raise PeerUnreachable(f"{who} is gone; its pid belongs to another process")
        path = f"/proc/{pid}/fd/{fd}"
        # before opening: with a recycled descriptor, opening alone could have effects
        if not os.readlink(path).startswith(f"/memfd:{name}"):
            raise PeerUnreachable(f"{who} has closed its {what}")
        mine = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise PeerUnreachable(f"{who} cannot be reached: {error.strerror}") from error
    try:
        if os.pread(mine, len(header), header_at) != header:
            raise PeerUnreachable(f"{who} has closed its {what}; another one took its place")
    except BaseException:
        os.close(mine)
        raise
    return mine
