"""What two heads of one state directory say to each other, and a conversation between them.

All goes over the socket of the head that serves, in its state directory: `Ask` begins a takeover,
`Follow` a link on which a head that was taken over gets the tokens of the answers that its clients
still wait for, and forwards what they ask for next.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections import deque

import msgspec

from flexpert.cluster.views import ClusterEvent
from flexpert.engine.request import TokenEvent
from flexpert.forking.framing import Deframer, frame
from flexpert.version import VERSION

HEAD_SOCKET = "head.sock"  # in the state directory
_CHUNK = 1 << 18
_MOST_DESCRIPTORS = 4
_PEER = struct.Struct("3i")  # SO_PEERCRED: process, user, group


class ServiceHandedOver(Exception):  # noqa: N818
    """Another head goes on with the service: what was asked for is to be asked of that one."""


class ConversationEnded(Exception):  # noqa: N818
    """The other side has closed it."""


# ---- a takeover -------------------------------------------------------------------------------


class Ask(msgspec.Struct, frozen=True, tag="ask"):
    """The first word of a head that is to take over."""

    version: str


class HeadWelcome(msgspec.Struct, frozen=True, tag="welcome"):
    """Of the head that runs; with it comes the socket on which it listens for HTTP, if any.

    format: of the state that it writes down. settings: of the ranks, by their paths. host, port:
    of HTTP, as they were set.
    """

    version: str
    pid: int
    format: int
    settings: dict[str, object]
    host: str
    port: int


class Declined(msgspec.Struct, frozen=True, tag="declined"):
    """Nothing is handed over, and nothing has changed."""

    why: str


class Go(msgspec.Struct, frozen=True, tag="go"):
    """The new head is ready for the ranks."""


class Wait(msgspec.Struct, frozen=True, tag="wait"):
    """The running head still lives, and will hand over: so far it waits for something."""

    why: str


class Handed(msgspec.Struct, frozen=True, tag="handed"):
    """The service is the new head's; with it comes the lock of the state directory. events: the
    latest of the cluster's, of which the last has the number `latest`."""

    latest: int
    events: list[ClusterEvent]


# ---- a link that follows ----------------------------------------------------------------------


class Follow(msgspec.Struct, frozen=True, tag="follow"):
    """answers: id of each sequence that somebody waits for → how many of its tokens are there."""

    answers: dict[str, int]


class Following(msgspec.Struct, frozen=True, tag="following"):
    """The answer to `Follow`: the link is open."""


class Grown(msgspec.Struct, frozen=True, tag="grown"):
    """Of an answer that is followed."""

    event: TokenEvent


class AnswerFailed(msgspec.Struct, frozen=True, tag="failed"):
    """An answer that is followed has ended so. request: it was the request's fault."""

    id: str
    error: str
    request: bool


class CancelAnswer(msgspec.Struct, frozen=True, tag="cancel"):
    """Nobody waits for an answer any more."""

    id: str


class KeptResponse(msgspec.Struct, frozen=True, tag="kept response"):
    """A response that clients may ask for later."""

    id: str
    body: bytes
    history: bytes


class Moved(msgspec.Struct, frozen=True, tag="moved"):
    """Yet another head has taken over: what is followed, and new requests, are its own. Those that
    this link has been given are still answered."""


class Request(msgspec.Struct, frozen=True, tag="request"):
    """An HTTP request, without its body, as ASGI has it. number: of this link."""

    number: int
    method: str
    scheme: str
    http_version: str
    path: str
    raw_path: bytes
    query_string: bytes
    headers: list[tuple[bytes, bytes]]
    client: tuple[str, int] | None


class RequestBody(msgspec.Struct, frozen=True, tag="request body"):
    number: int
    data: bytes
    more: bool


class RequestGone(msgspec.Struct, frozen=True, tag="request gone"):
    """Its client has gone."""

    number: int


class AnswerStart(msgspec.Struct, frozen=True, tag="answer start"):
    number: int
    status: int
    headers: list[tuple[bytes, bytes]]


class AnswerBody(msgspec.Struct, frozen=True, tag="answer body"):
    number: int
    data: bytes
    more: bool


class AnswerEnd(msgspec.Struct, frozen=True, tag="answer end"):
    """The application is done with a request, whether or not its answer is whole."""

    number: int


OfTakeover = Ask | HeadWelcome | Declined | Go | Wait | Handed
OfFollower = Follow | CancelAnswer | Request | RequestBody | RequestGone | KeptResponse
OfFollowed = Following | Grown | AnswerFailed | Moved | AnswerStart | AnswerBody | AnswerEnd

encode = msgspec.msgpack.Encoder().encode
decode_first = msgspec.msgpack.Decoder(Ask | Follow).decode
decode_greeting = msgspec.msgpack.Decoder(Following | Declined).decode
decode_takeover = msgspec.msgpack.Decoder(OfTakeover).decode
decode_follower = msgspec.msgpack.Decoder(OfFollower).decode
decode_followed = msgspec.msgpack.Decoder(OfFollowed).decode


def peer(channel: socket.socket) -> tuple[int, int]:
    """Process and user at the other end."""
    pid, user, _ = _PEER.unpack(
        channel.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
    )
    return pid, user


def same_user(channel: socket.socket) -> bool:
    """Whether the process at its other end is of our user."""
    return peer(channel)[1] == os.geteuid()


class Conversation:
    """Messages with descriptors over a socket; each call waits, for `timeout_s` at most.

    Raises: ConversationEnded, TimeoutError, OSError, BadFrame, msgspec.MsgspecError
    """

    def __init__(self, channel: socket.socket, timeout_s: float) -> None:
        channel.settimeout(timeout_s)
        self.channel = channel
        self._deframer = Deframer()
        self._messages: deque[bytes] = deque()
        self._descriptors: list[int] = []

    def send(self, message: OfTakeover | Following, *descriptors: int) -> None:
        data = frame(encode(message))
        sent = socket.send_fds(self.channel, [data], descriptors, socket.MSG_NOSIGNAL)
        if sent < len(data):
            self.channel.sendall(data[sent:])

    def receive(self) -> bytes:
        """The next message."""
        while not self._messages:
            data, descriptors, _, _ = socket.recv_fds(
                self.channel, _CHUNK, _MOST_DESCRIPTORS, socket.MSG_CMSG_CLOEXEC
            )
            self._descriptors += descriptors
            if not data:
                raise ConversationEnded
            self._messages.extend(self._deframer.feed(data))
        return self._messages.popleft()

    def descriptor(self) -> int | None:
        """What has come with the messages so far; whoever asks owns it."""
        return self._descriptors.pop(0) if self._descriptors else None

    def shutdown(self) -> None:
        """Who waits in `receive`, in another thread, waits no more."""
        with contextlib.suppress(OSError):  # it has ended already
            self.channel.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors.clear()
        self.channel.close()


def our_ask() -> Ask:
    return Ask(VERSION)
