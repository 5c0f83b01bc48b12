"""Messages both ways between two heads, on an event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import msgspec

from flexpert.cluster.handover import messages as hand
from flexpert.forking.framing import Deframer, frame

_CHUNK = 1 << 18


async def received(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """The messages that come, until the other side has gone.

    Raises: ConnectionError, BadFrame
    """
    deframer = Deframer()
    while data := await reader.read(_CHUNK):
        for message in deframer.feed(data):
            yield message


def send(writer: asyncio.StreamWriter, message: msgspec.Struct) -> None:
    """Nothing happens if the other side has gone, as reading tells."""
    if not writer.is_closing():
        writer.write(frame(hand.encode(message)))
