"""What the service says on its terminal: a line that cannot be written is no reason to end it."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from typing import TextIO


def say(line: str) -> None:
    """To standard output; lost where the disk is full or nobody reads."""
    _write(sys.stdout, line)


def complain(line: str) -> None:
    """The same to standard error."""
    _write(sys.stderr, line)


def _write(stream: TextIO, line: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        try:
            descriptor = stream.fileno()
        except OSError:  # somebody collects it in memory
            print(line, file=stream, flush=True)
            return
        # past Python's buffer: what is left in there would fail the next line, and the exit
        stream.flush()
        encoding = stream.encoding or "utf-8"
        os.write(descriptor, f"{line}\n".encode(encoding, "backslashreplace"))


class LogHandler(logging.StreamHandler[TextIO]):
    """To standard error. Python's own would answer a full disk with a traceback a line."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)
