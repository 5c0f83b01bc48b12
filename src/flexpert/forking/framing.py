"""Messages on a byte stream: four bytes of length, then the message (pure)."""

from __future__ import annotations

from collections.abc import Iterator

from flexpert.errors import FlexpertError

Piece = bytes | bytearray  # of a message

_HEADER = 4
MOST_BYTES = 2**30  # of a message; the length's upper bits are free for what may come


class BadFrame(FlexpertError):  # noqa: N818
    """What came is no message; nothing that follows on this connection can be trusted."""


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
    return length.to_bytes(_HEADER, "little")


class Deframer:
    """Puts messages together from the pieces in which they arrive.

    limit: bytes of the longest message that is taken. Of a message no more is kept than has
    arrived, so a length alone costs nothing.
    """

    def __init__(self, limit: int = MOST_BYTES) -> None:
        self._limit = limit
        self._held = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The messages that `data` completes; to be read to the end.

        Raises: BadFrame: one is announced that is longer than the limit.
        """
        held = self._held
        held += data
        at = 0
        while len(held) - at >= _HEADER:
            length = int.from_bytes(held[at : at + _HEADER], "little")
            if length > self._limit:
                raise BadFrame(f"a message of {length} bytes is announced; {self._limit} may come")
            end = at + _HEADER + length
            if len(held) < end:
                break
            yield bytes(held[at + _HEADER : end])
            at = end
        del held[:at]
