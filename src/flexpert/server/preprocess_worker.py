"""The process in which bodies are parsed and tokenised: one at a time, within bounds.

It gives way to ranks and head where they want the processor, and says so when a body has left it
large, so that another one takes its place at the size of the fork server.
"""

from __future__ import annotations

import contextlib
import os
import resource
import socket
from typing import Any, Protocol

import psutil

from flexpert import library_pages
from flexpert.cluster.processes.child_connection import Connection, ConnectionEnded
from flexpert.frontend.token_ids import token_text
from flexpert.server.preprocessing import (
    PreprocessReply,
    decode_spec,
    decode_task,
    encode,
    preprocess,
)

ENTRY = f"{__name__}:preprocess_main"

MOST_MEMORY = 2 * 2**30  # bytes beyond what it has at the start
MOST_KEPT = 256 * 2**20  # bytes that it may have grown by when it takes the next body


class PreprocessSource(Protocol):
    """A model's, of which only the tokenizer is used."""

    def tokenizer(self) -> Any: ...


def preprocess_main(spec: bytes, end: socket.socket, source: PreprocessSource) -> int:
    """Serve until the head closes the connection. spec: `Spec`."""
    settings = decode_spec(spec)
    limits = settings.limits
    connection = Connection(end)
    text = token_text(None if limits.skip_tokenizer else source.tokenizer())
    process = psutil.Process()
    os.nice(settings.niceness)
    before = process.memory_info()
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = before.vms + MOST_MEMORY
    if hard == resource.RLIM_INFINITY or most < hard:
        resource.setrlimit(resource.RLIMIT_AS, (most, hard))
    with contextlib.suppress(ConnectionEnded):
        library_pages.give_back()
        connection.send(b"")  # ready
        while True:
            outcome = preprocess(decode_task(connection.receive()), text, limits)
            worn = process.memory_info().rss > before.rss + MOST_KEPT
            connection.send(encode(PreprocessReply(outcome, worn)))
    connection.close()
    return 0
