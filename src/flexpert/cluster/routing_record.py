"""Loads of experts go to a file, for `flexpert bench balance` to replay."""

from __future__ import annotations

import logging
from pathlib import Path

from flexpert.errors import ConfigError
from flexpert.moe.load_snapshot import Counts
from flexpert.moe.load_trace import LoadWindow, load_line

log = logging.getLogger("flexpert")


class RoutingRecord:
    """Lines are added to what the file has.

    Raises: ConfigError: it cannot be written to.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._failed = False
        try:
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise ConfigError(
                f"cluster.record_routing: {str(path)!r} cannot be written to: {error.strerror}"
            ) from None

    def add(self, choices: Counts, seconds: float) -> None:
        """choices: [layers, experts] tokens in so many seconds."""
        window = LoadWindow(loads=choices.tolist(), seconds=round(seconds, 3))
        try:
            self._file.write(load_line(window))
        except OSError as error:  # a full disk; the service goes on
            if not self._failed:
                log.error("%s is not written to: %s", self._path, error.strerror)
            self._failed = True
        else:
            self._failed = False

    def close(self) -> None:
        self._file.close()
