"""The directory in which a head writes down what another one needs to go on: who may use it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from pathlib import Path

from flexpert.cluster.processes.early_fork_server import RANKS_SOCKET
from flexpert.errors import ConfigError

_DATABASE = "state.sqlite"
_LOCK = "lock"
_LONGEST = 100  # bytes of a socket's path; the system takes 107


class StateDirectory:
    """One head has it at a time, by a lock that ends with its process.

    ranks_wait: whether, when it was taken, there were ranks that had lost their head. They are
    held from then on: their time to wait for one is not running.

    Args:
        lock: that another head has handed over.

    Raises:
        ConfigError: another has it, others could write there, or it cannot be made.
    """

    def __init__(self, path: Path, *, lock: int | None = None) -> None:
        self.path = path.absolute()
        self.database = self.path / _DATABASE
        self._held: socket.socket | None = None
        self.ranks_socket = self.path / RANKS_SOCKET
        if len(os.fsencode(self.ranks_socket)) > _LONGEST:
            raise ConfigError(
                f"cluster.state_dir {str(path)!r} is too long for a socket in it; choose one whose "
                f"path has at most {_LONGEST - len(RANKS_SOCKET) - 1} bytes"
            )
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            there = self.path.stat()
            self._lock = _open_lock(self.path) if lock is None else lock
        except OSError as error:
            raise ConfigError(f"cluster.state_dir {str(path)!r}: {error.strerror}") from None
        try:
            self._check(there)
        except BaseException:
            os.close(self._lock)
            raise
        with contextlib.suppress(OSError):
            self._held = self.connect()
        self.ranks_wait = self._held is not None

    def _check(self, there: os.stat_result) -> None:
        if there.st_uid != os.geteuid() or there.st_mode & 0o077:
            raise ConfigError(
                f"cluster.state_dir {str(self.path)!r} is open to other users, who could take the "
                f"ranks over: chmod 700 it, and own it"
            )
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"cluster.state_dir {str(self.path)!r} is used by a head that runs; choose another "
                "directory, or stop that one"
            ) from None

    @staticmethod
    def is_held(path: Path) -> bool:
        """Whether a head has it now."""
        try:
            lock = os.open(path / _LOCK, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(lock)
        return False

    @property
    def lock(self) -> int:
        """A descriptor of it, to be handed over."""
        return self._lock

    def connect(self) -> socket.socket:
        """To the fork server of those ranks. Raises: OSError: there is none."""
        held, self._held = self._held, None
        if held is not None:
            return held
        channel = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            channel.connect(str(self.ranks_socket))
        except BaseException:
            channel.close()
            raise
        return channel

    def close(self) -> None:
        """Somebody else may have it. Idempotent."""
        if self._held is not None:
            self._held.close()
            self._held = None
        lock, self._lock = self._lock, -1
        if lock >= 0:
            os.close(lock)


def _open_lock(path: Path) -> int:
    """Raises: OSError"""
    return os.open(path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
