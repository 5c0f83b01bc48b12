"""The head's ends of its connections to child processes.

Each child has a socket pair of its own, made here and handed over at its fork: there is no name to
connect to and nothing to prove. A child may still go wrong, so that what comes from one is read a
piece at a time, bounded and checked, and a child that cannot be understood is cut off: its
connection is closed and its owner told, and nobody else notices.
"""

from __future__ import annotations

import asyncio
import collections
import logging
import socket
from collections.abc import Callable, Sequence

import msgspec

from flexpert.engine import rank_protocol as msg
from flexpert.forking.framing import BadFrame, Deframer, Piece, frame, header

log = logging.getLogger("flexpert")

_CHUNK = 1 << 18
_MOST_RECEIVED = 64 * 2**20  # bytes of a message from a child
_MOST_UNSENT = 256 * 2**20  # bytes that wait for a child that does not read


class ChildLink:
    """One connection, on the event loop.

    on_message(message) may raise: the connection is closed then, like after a message that is none.
    on_end(why): the connection has ended by itself: closed by the child ("" then), or cut off
    because the child cannot be understood or does not read. Not called after `close`.
    """

    def __init__(
        self,
        on_message: Callable[[bytes], None],
        on_end: Callable[[str], None],
        *,
        most_received: int = _MOST_RECEIVED,
        most_unsent: int = _MOST_UNSENT,
    ) -> None:
        """Raises: OSError: there are no descriptors left."""
        self._on_message = on_message
        self._on_end = on_end
        self._deframer = Deframer(most_received)
        self._received = memoryview(bytearray(_CHUNK))
        self._most_unsent = most_unsent
        self._unsent: collections.deque[memoryview] = collections.deque()
        self._unsent_bytes = 0
        self._loop = asyncio.get_running_loop()
        self._socket, self._theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.setblocking(False)
        self._open = True
        self._loop.add_reader(self._socket, self._readable)

    @property
    def child_end(self) -> socket.socket:
        """What the child gets; whoever hands it over closes it here."""
        return self._theirs

    def send(self, message: bytes) -> None:
        """Queue a message; one for a child that is gone is dropped, its end is told elsewhere."""
        if not self._open:
            return
        self._send(memoryview(frame(message)))

    def send_pieces(self, pieces: Sequence[Piece]) -> None:
        """As `send`, of one message that has come in pieces: nothing is copied, and each is let go
        as soon as it is sent.
        """
        length = sum(map(len, pieces))
        for data in (header(length), *pieces):
            if self._open and data:
                self._send(memoryview(data))

    def _send(self, data: memoryview) -> None:
        if not self._unsent:
            try:
                data = data[self._socket.send(data, socket.MSG_NOSIGNAL) :]
            except BlockingIOError:
                pass
            except OSError:
                return  # it is gone, as reading tells
            if not data:
                return
            self._loop.add_writer(self._socket, self._writable)
        self._unsent.append(data)
        self._unsent_bytes += len(data)
        if self._unsent_bytes > self._most_unsent:
            self._end(f"leaves {self._unsent_bytes} bytes of what it is told unread")

    def close(self) -> None:
        """Idempotent."""
        if self._open:
            self._open = False
            self._loop.remove_reader(self._socket)
            self._loop.remove_writer(self._socket)
            self._socket.close()
            self._theirs.close()
            self._unsent.clear()

    def drain(self) -> None:
        """The child is gone: what it said before is heard now."""
        while self._open and self._readable():
            pass

    def _end(self, why: str) -> None:
        self.close()
        self._on_end(why)

    def _readable(self) -> bool:
        """One piece, so that a child that talks much does not keep the loop from the others.

        Returns whether there was one.
        """
        try:
            size = self._socket.recv_into(self._received)
        except BlockingIOError:
            return False
        except OSError:
            size = 0
        if not size:
            self._end("")
            return False
        try:
            for message in self._deframer.feed(self._received[:size]):
                self._on_message(message)
                if not self._open:
                    return False
        except (BadFrame, msgspec.MsgspecError) as error:
            self._end(f"says what cannot be understood: {error}")
        except msg.Contradiction as error:
            self._end(f"contradicts itself: {error}")
        except Exception as error:
            log.exception("a message of a child process could not be handled")
            self._end(f"says what cannot be handled: {type(error).__name__}: {error}")
        return self._open

    def _writable(self) -> None:
        while self._unsent:
            data = self._unsent[0]
            try:
                sent = self._socket.send(data, socket.MSG_NOSIGNAL)
            except BlockingIOError:
                return
            except OSError:  # it is gone, as reading tells
                self._unsent.clear()
                break
            self._unsent_bytes -= sent
            if sent < len(data):
                self._unsent[0] = data[sent:]
                return
            self._unsent.popleft()
        self._unsent_bytes = 0
        self._loop.remove_writer(self._socket)


class Transport:
    """Carries commands to ranks and brings their reports.

    on_report(rank, report): may raise; the rank is cut off then.
    on_cut_off(rank, why): a rank cannot be understood; nothing is heard from it any more.
    on_disconnected(rank): a rank has closed its connection, as the system does at once when it
    kills a process.
    """

    def __init__(
        self,
        on_report: Callable[[int, msg.Report], None],
        on_cut_off: Callable[[int, str], None],
        on_disconnected: Callable[[int], None],
    ) -> None:
        self._on_report = on_report
        self._on_cut_off = on_cut_off
        self._on_disconnected = on_disconnected
        self._links: dict[int, ChildLink] = {}

    def open(self, rank: int) -> socket.socket:
        """A connection for a rank that is to be started. Returns the rank's end.

        Raises: OSError: there are no descriptors left.
        """

        def ended(why: str) -> None:
            if why:
                self._on_cut_off(rank, why)
            else:
                self._on_disconnected(rank)

        def received(message: bytes) -> None:
            self._on_report(rank, msg.decode_report(message))

        self.forget(rank)
        link = self._links[rank] = ChildLink(received, ended)
        return link.child_end

    def send(self, rank: int, command: msg.Command) -> None:
        """Queue a command; one for a rank that is gone is dropped, its end is told elsewhere."""
        link = self._links.get(rank)
        if link is not None:
            link.send(msg.encode(command))

    def drain(self, rank: int) -> None:
        """The rank's process is gone: what it said before is heard now."""
        if rank in self._links:
            self._links[rank].drain()

    def forget(self, rank: int) -> None:
        """The rank's process is gone, or was never started."""
        link = self._links.pop(rank, None)
        if link is not None:
            link.close()

    def close(self) -> None:
        for rank in list(self._links):
            self.forget(rank)
