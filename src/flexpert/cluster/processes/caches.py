"""Where libraries of the service's processes keep files: nowhere that others can write or foresee.

Importing torch makes a directory for compiled code in /tmp, under a name that every user of the
machine knows: whoever takes the name first keeps the service from starting, or gives it code to
run; and where /tmp is full, it does not start, either. flexpert compiles nothing with it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping
from pathlib import Path

VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
_NOBODY_WRITES = "/"  # it is there, and only root could put anything in it


def keep_private(environment: MutableMapping[str, str]) -> None:
    """Name a directory of this user's own for it, unless one is named."""
    if VARIABLE not in environment:
        folder = private_folder(environment, "torchinductor")
        environment[VARIABLE] = str(folder) if folder else _NOBODY_WRITES


def private_folder(environment: Mapping[str, str], name: str) -> Path | None:
    """A directory for files that are kept, in which only this user can write.

    None: there is none, as on a full disk, or others can write there.
    """
    try:
        cache = environment.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(cache, "flexpert", name)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        there = folder.stat()
    except (OSError, RuntimeError, ValueError):  # a full disk, no home, no such user
        return None
    own = there.st_uid == os.geteuid() and not there.st_mode & 0o022
    return folder if own and folder.is_absolute() else None
