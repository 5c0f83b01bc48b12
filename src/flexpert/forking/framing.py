"""Messages on a byte stream: the protocol's version, the length, then the message (pure).

Little-endian: two bytes of version, four of length. Every message says its version, so that a head
and a rank or agent of another version never take each other's words for something else: the first
message is refused, and both versions are named.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from flexpert.errors import FlexpertError

Piece = bytes | bytearray  # of a message

# What head, ranks, agents and the fork server say to each other; one more with every change of it
# after which they would not understand each other.
PROTOCOL = 3

_HEADER = struct.Struct("<HI")
MOST_BYTES = 2**30  # of a message; the length's upper bits are free for what may come


class BadFrame(FlexpertError):  # noqa: N818
    """What came is no message; nothing that follows on this connection can be trusted."""


class WrongProtocol(BadFrame):
    """Another version of the protocol is spoken there."""


def check_protocol(theirs: int) -> None:
    """Raises: WrongProtocol: it is not ours; with both versions."""
    if theirs != PROTOCOL:
        raise WrongProtocol(
            f"protocol version {theirs} is spoken there, and version {PROTOCOL} here: run the same "
            "version of flexpert on both sides"
        )


def frame(message: bytes) -> bytes:
    """A message as it travels.

    Raises: BadFrame: it is too long to be sent.
    """
    return header(len(message)) + message


def header(length: int) -> bytes:
    """What goes before a message of so many bytes.

    Raises: BadFrame: it is too long to be sent.
    """
    if length > MOST_BYTES:
        raise BadFrame(f"a message of {length} bytes exceeds the {MOST_BYTES} that travel")
    return _HEADER.pack(PROTOCOL, length)


class Deframer:
    """Puts messages together from the pieces in which they arrive.

    limit: bytes of the longest message that is taken. Of a message no more is kept than has
    arrived, so a length alone costs nothing.
    """

    def __init__(self, limit: int = MOST_BYTES) -> None:
        self._limit = limit
        self._held = bytearray()

    def feed(self, data: bytes | memoryview) -> Iterator[bytes]:
        """The messages that `data` completes; to be read to the end. From the first one on `data`
        may be used for something else.

        Raises: BadFrame: one is announced that is longer than the limit, or of another version.
        """
        held = self._held
        held += data
        at = 0
        while len(held) - at >= _HEADER.size:
            version, length = _HEADER.unpack_from(held, at)
            check_protocol(version)
            if length > self._limit:
                raise BadFrame(f"a message of {length} bytes is announced; {self._limit} may come")
            end = at + _HEADER.size + length
            if len(held) < end:
                break
            yield bytes(held[at + _HEADER.size : end])
            at = end
        del held[:at]
