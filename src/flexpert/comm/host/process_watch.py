"""Notices the end of peer processes at once: one sleeping thread on their pidfds."""

from __future__ import annotations

import contextlib
import os
import select
import threading
from collections.abc import Callable

from flexpert.comm.errors import PeerUnreachable
from flexpert.comm.host.memfd import start_time


class Watcher:
    """Calls `ended(peer)` from its thread when the process of a peer has exited.

    The thread starts with the first peer in another process and sleeps in epoll; a process's end
    shows there within a millisecond.
    """

    def __init__(self, rank: int, ended: Callable[[int], None]) -> None:
        self._rank = rank
        self._ended = ended
        self._lock = threading.Lock()
        self._fds: dict[int, int] = {}  # peer → pidfd
        self._poll: select.epoll | None = None
        self._stop = -1
        self._thread: threading.Thread | None = None

    def add(self, peer: int, pid: int, started: int) -> None:
        """Raises: PeerUnreachable: it has ended already."""
        if pid == os.getpid():
            return
        try:
            fd = os.pidfd_open(pid)
        except ProcessLookupError:
            raise PeerUnreachable(f"rank {peer} (pid {pid}) is gone") from None
        try:
            if start_time(pid) != started:
                raise PeerUnreachable(f"rank {peer} (pid {pid}) is gone")
            with self._lock:
                poll = self._start()
                self._fds[peer] = fd
                poll.register(fd, select.EPOLLIN)
        except FileNotFoundError:
            os.close(fd)
            raise PeerUnreachable(f"rank {peer} (pid {pid}) is gone") from None
        except BaseException:
            os.close(fd)
            raise

    def remove(self, peer: int) -> None:
        with self._lock:
            fd = self._fds.pop(peer, None)
            if fd is not None and self._poll is not None:
                with contextlib.suppress(OSError):  # it has ended, and was unregistered
                    self._poll.unregister(fd)
                os.close(fd)

    def close(self) -> None:
        thread, self._thread = self._thread, None
        if thread is not None:
            os.eventfd_write(self._stop, 1)
            if thread is not threading.current_thread():
                thread.join()
        with self._lock:
            for fd in self._fds.values():
                os.close(fd)
            self._fds.clear()
            if self._poll is not None:
                self._poll.close()
                self._poll = None
                os.close(self._stop)

    def _start(self) -> select.epoll:
        if self._poll is None:
            self._poll = select.epoll()
            self._stop = os.eventfd(0, os.EFD_CLOEXEC)
            self._poll.register(self._stop, select.EPOLLIN)
            self._thread = threading.Thread(
                target=self._run, args=(self._poll,), name=f"watch-{self._rank}", daemon=True
            )
            self._thread.start()
        return self._poll

    def _run(self, poll: select.epoll) -> None:
        while True:
            events = poll.poll()
            ended: list[int] = []
            with self._lock:
                peers = {fd: peer for peer, fd in self._fds.items()}
                for fd, _ in events:
                    if fd == self._stop:
                        return
                    if fd in peers:
                        poll.unregister(fd)
                        ended.append(peers[fd])
            for peer in ended:
                self._ended(peer)
