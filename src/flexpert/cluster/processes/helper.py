"""A child process that is no rank: for work that must not hold up the head's loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from flexpert.cluster.processes.launcher import LocalLauncher
from flexpert.cluster.processes.transport import ChildLink
from flexpert.forking.framing import Piece

OnMessage = Callable[[bytes], None]
OnEnd = Callable[[str], None]


class Helper(Protocol):
    """What its owner needs of one."""

    def send_pieces(self, pieces: Sequence[Piece]) -> None: ...
    def kill(self) -> None: ...


class ForkedHelper:
    """A helper forked by the fork server.

    Args:
        entry, spec: see `fork_server.Fork`.
        on_message: may raise; the helper is killed then.
        on_end: told once, when the process is gone or could not be started, with the reason.

    Raises:
        OSError: there are no descriptors left.
    """

    def __init__(
        self,
        launcher: LocalLauncher,
        entry: str,
        spec: bytes,
        on_message: OnMessage,
        on_end: OnEnd,
    ) -> None:
        self._launcher = launcher
        self._on_end = on_end
        self._why = ""
        self._link = ChildLink(on_message, self._cut_off)
        self._number = launcher.fork(entry, spec, self._link.child_end, self._exited)

    def send_pieces(self, pieces: Sequence[Piece]) -> None:
        """One message. Dropped if it is gone, of which on_end tells."""
        self._link.send_pieces(pieces)

    def kill(self) -> None:
        """SIGKILL; on_end is still told."""
        self._launcher.kill(self._number)

    def _cut_off(self, why: str) -> None:
        if why:
            self._why = why
            self.kill()

    def _exited(self, status: int, why: str) -> None:
        self._link.drain()
        self._link.close()
        ended = f"signal {-status}" if status < 0 else f"exit status {status}"
        self._on_end(why or self._why or ended)
