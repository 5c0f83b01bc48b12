"""A file that is there while this host's rank serves: for probes, and for scripts that wait."""

from __future__ import annotations

import logging
from pathlib import Path

from flexpert.errors import ConfigError

log = logging.getLogger("flexpert")


class ReadyFile:
    """path: None: there is none, and nothing is done."""

    def __init__(self, path: Path | None) -> None:
        """What an earlier process has left is removed. Raises: ConfigError: it cannot be made."""
        self._path = path
        if path is None:
            return
        try:
            path.touch()
            path.unlink()
        except OSError as error:
            raise ConfigError(f"--ready-file {path} cannot be written: {error.strerror}") from None

    def show(self, serves: bool) -> None:
        if self._path is None:
            return
        try:
            if serves:
                self._path.touch()
            else:
                self._path.unlink(missing_ok=True)
        except OSError as error:
            log.error("the file %s cannot be changed: %s", self._path, error.strerror)
