"""A ZeroMQ socket with CURVE on an asyncio loop: the head's, and an agent's.

The descriptor of a ZeroMQ socket only tells that something may have changed, once; so after each
call it is looked again.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
from collections.abc import Callable, Sequence

import zmq
from zmq.utils.monitor import recv_monitor_message

from flexpert.cluster.hosts.cluster_token import ClusterKeys
from flexpert.errors import ConfigError

MOST_BYTES = 2**20
"""Of a message: what a rank and the head tell each other travels in smaller pieces."""
PIECE = 2**16
_MOST_QUEUED = 1000  # messages that one peer may leave unread: 64 MiB
_BACKLOG = 4096  # of connections that wait to be accepted; who finds it full tries after a second
_RECONNECT_MS = (200, 2000)  # at first, at most
_HANDSHAKE_S = 5.0  # a connection that has not shown its key by then is closed
_LINGER_MS = 200  # for what was sent last, once a socket is closed
_END_S = 1.0
MOST_STRANGERS = 256
"""Connections that are younger than that: more are closed at once, for descriptors are few."""
_DOMAIN = b"flexpert"
_ZAP = "inproc://zeromq.zap.01"
_REFUSED = (
    zmq.Event.HANDSHAKE_FAILED_AUTH
    | zmq.Event.HANDSHAKE_FAILED_PROTOCOL
    | zmq.Event.HANDSHAKE_FAILED_NO_DETAIL
)


class NotSentError(Exception):
    """The peer is gone, or has left too much unread."""


class _Loop:
    """Calls `ready` while something can be received from a socket."""

    def __init__(self, socket: zmq.Socket[bytes], ready: Callable[[], None]) -> None:
        self._socket = socket
        self._ready = ready
        self._loop = asyncio.get_running_loop()
        self._fd = int(socket.getsockopt(zmq.FD))
        self._loop.add_reader(self._fd, self.look)
        self._looks = False
        self._loop.call_soon(self.look)

    def look(self) -> None:
        self._looks = False
        while not self._socket.closed and int(self._socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
            self._ready()

    def look_soon(self) -> None:
        if not self._looks:
            self._looks = True
            self._loop.call_soon(self.look)

    def close(self) -> None:
        if not self._socket.closed:
            self._loop.remove_reader(self._fd)
            self._socket.close(linger=_LINGER_MS)


def _end_monitor(monitored: zmq.Socket[bytes], events: _Loop) -> None:
    """In this order: ZeroMQ waits until an event is taken, and for ever if nobody is left to."""
    with contextlib.suppress(zmq.ZMQError):
        monitored.disable_monitor()
    events.close()


def _end_context(context: zmq.Context[zmq.Socket[bytes]]) -> None:
    """Wait until what was sent last has left.

    Not for ever: a socket of ZeroMQ 4.3.5 that is closed while somebody shows it a key does not
    always end. Its context's threads sleep then, and end with the process.
    """
    ends = threading.Thread(target=context.term, name="zmq-end", daemon=True)
    ends.start()
    ends.join(_END_S)


class _Strangers:
    """The connections of a listening socket that may not have shown their keys yet.

    ZeroMQ accepts whatever comes and closes it after `_HANDSHAKE_S`; meanwhile each has one of
    this process's descriptors, which its clients need.
    """

    def __init__(self, listener: zmq.Socket[bytes], on_crowd: Callable[[], None]) -> None:
        """on_crowd(): one was closed because there are too many."""
        self._on_crowd = on_crowd
        self._port = 0
        self._since: dict[int, float] = {}  # by descriptor, in the order in which they came
        self._loop = asyncio.get_running_loop()
        self._listener = listener
        self._monitor = listener.get_monitor_socket(zmq.Event.ACCEPTED | zmq.Event.DISCONNECTED)
        self._events = _Loop(self._monitor, self._note)

    def listening(self, address: str) -> None:
        self._port = int(address.rpartition(":")[2])

    def close(self) -> None:
        _end_monitor(self._listener, self._events)

    def _note(self) -> None:
        event = recv_monitor_message(self._monitor, flags=zmq.NOBLOCK)
        descriptor, now = int(event["value"]), self._loop.time()
        self._since.pop(descriptor, None)
        if event["event"] == zmq.Event.DISCONNECTED:
            return
        while self._since and now - next(iter(self._since.values())) > _HANDSHAKE_S:
            del self._since[next(iter(self._since))]
        self._since[descriptor] = now
        if len(self._since) > MOST_STRANGERS:
            self._shut(descriptor)
            self._on_crowd()

    def _shut(self, descriptor: int) -> None:
        """End a connection of ZeroMQ's, which closes the descriptor then; by now it may be
        another's."""
        with (
            contextlib.suppress(OSError),
            socket.socket(fileno=os.dup(descriptor)) as connection,
        ):
            if connection.getsockname()[1] == self._port:
                connection.shutdown(socket.SHUT_RDWR)


class CurveListener:
    """The head's end: whoever has the agents' key can talk to it, and nobody else.

    address: where it listens, with the port that was taken.
    on_message(peer, message): a peer is known by bytes that the socket chose.
    on_refused(): somebody had another key. on_crowd(): there are more than `MOST_STRANGERS`.
    """

    def __init__(
        self,
        address: str,
        keys: ClusterKeys,
        on_message: Callable[[bytes, bytes], None],
        on_refused: Callable[[], None],
        on_crowd: Callable[[], None],
    ) -> None:
        """Raises: ConfigError: it cannot listen there."""
        self._on_message = on_message
        self._on_refused = on_refused
        self._agents = zmq.utils.z85.decode(keys.agents.public)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=1)
        self._zap = self._context.socket(zmq.REP)
        self._zap.bind(_ZAP)
        self._socket = _configured(self._context.socket(zmq.ROUTER))
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.setsockopt(zmq.BACKLOG, _BACKLOG)
        self._socket.setsockopt(zmq.IPV6, int("[" in address))
        self._socket.setsockopt(zmq.CURVE_SERVER, 1)
        self._socket.setsockopt(zmq.CURVE_SECRETKEY, keys.head.secret)
        self._socket.setsockopt(zmq.ZAP_DOMAIN, _DOMAIN)
        self._socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
        self._strangers = _Strangers(self._socket, on_crowd)
        try:
            self._socket.bind(address)
        except zmq.ZMQError as error:
            self._strangers.close()
            self._zap.close(linger=0)
            self._socket.close(linger=0)
            self._context.term()
            raise ConfigError(
                f"cannot listen on {address}: {error.strerror}; --join-listen takes an address of "
                "this machine and a free port, as tcp://0.0.0.0:7000"
            ) from None
        self.address = self._socket.getsockopt_string(zmq.LAST_ENDPOINT).rstrip("\0")
        self._strangers.listening(self.address)
        self._zap_loop = _Loop(self._zap, self._authenticate)
        self._loop = _Loop(self._socket, self._receive)

    def send(self, peer: bytes, message: bytes) -> None:
        """Raises: NotSentError"""
        try:
            self._socket.send_multipart([peer, message], flags=zmq.NOBLOCK)
        except zmq.ZMQError as error:
            raise NotSentError(error.strerror) from None
        self._loop.look_soon()

    def close(self) -> None:
        """Idempotent."""
        if not self._socket.closed:
            self._strangers.close()
            self._loop.close()
            self._zap_loop.close()
            _end_context(self._context)

    def _receive(self) -> None:
        parts = self._socket.recv_multipart(flags=zmq.NOBLOCK)
        if len(parts) == 2:
            self._on_message(parts[0], parts[1])

    def _authenticate(self) -> None:
        """ZAP (rfc.zeromq.org/spec/27)."""
        parts = self._zap.recv_multipart(flags=zmq.NOBLOCK)
        known = len(parts) == 7 and parts[5] == b"CURVE" and parts[6] == self._agents
        status = [b"200", b"OK"] if known else [b"400", b"another key"]
        number = parts[1] if len(parts) > 1 else b""
        self._zap.send_multipart([b"1.0", number, *status, b"", b""])
        self._zap_loop.look_soon()
        if not known:
            self._on_refused()


class CurveClient:
    """An agent's end.

    on_message(message); on_refused(): the head does not take the key, or is none.
    """

    def __init__(
        self,
        address: str,
        keys: ClusterKeys,
        on_message: Callable[[bytes], None],
        on_refused: Callable[[], None],
    ) -> None:
        """Raises: ConfigError: not an address."""
        self._on_message = on_message
        self._on_refused = on_refused
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=1)
        self._socket = _configured(self._context.socket(zmq.DEALER))
        self._socket.setsockopt(zmq.IPV6, 1)
        self._socket.setsockopt(zmq.CURVE_SERVERKEY, keys.head.public)
        self._socket.setsockopt(zmq.CURVE_PUBLICKEY, keys.agents.public)
        self._socket.setsockopt(zmq.CURVE_SECRETKEY, keys.agents.secret)
        self._monitor = self._socket.get_monitor_socket(_REFUSED)
        try:
            self._socket.connect(address)
        except zmq.ZMQError as error:
            self._socket.disable_monitor()
            self._monitor.close(linger=0)
            self._socket.close(linger=0)
            self._context.term()
            raise ConfigError(
                f"{address!r} is no address to join: {error.strerror}; write tcp://HOST:PORT "
                "as the head prints it"
            ) from None
        self._monitored = _Loop(self._monitor, self._note)
        self._loop = _Loop(self._socket, self._receive)

    def send(self, message: bytes) -> None:
        """Raises: NotSentError"""
        try:
            self._socket.send(message, flags=zmq.NOBLOCK)
        except zmq.ZMQError as error:
            raise NotSentError(error.strerror) from None
        self._loop.look_soon()

    def close(self) -> None:
        """Idempotent; what was sent last has a moment to leave."""
        if not self._socket.closed:
            _end_monitor(self._socket, self._monitored)
            self._loop.close()
            _end_context(self._context)

    def _receive(self) -> None:
        self._on_message(self._socket.recv(flags=zmq.NOBLOCK))

    def _note(self) -> None:
        recv_monitor_message(self._monitor, flags=zmq.NOBLOCK)
        self._on_refused()


def pieces(data: bytes) -> Sequence[bytes]:
    """At most `PIECE` bytes each."""
    return [data[at : at + PIECE] for at in range(0, len(data), PIECE)]


def _configured(socket: zmq.Socket[bytes]) -> zmq.Socket[bytes]:
    socket.setsockopt(zmq.MAXMSGSIZE, MOST_BYTES)
    socket.setsockopt(zmq.SNDHWM, _MOST_QUEUED)
    socket.setsockopt(zmq.RCVHWM, _MOST_QUEUED)
    socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
    socket.setsockopt(zmq.HANDSHAKE_IVL, int(1000 * _HANDSHAKE_S))
    socket.setsockopt(zmq.RECONNECT_IVL, _RECONNECT_MS[0])
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, _RECONNECT_MS[1])
    return socket
