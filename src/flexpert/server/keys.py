"""Bearer keys from the settings, the environment or a file; never shown, never logged."""

from __future__ import annotations

import contextlib
import hmac
import logging
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import SecretStr

from flexpert.config import ServerConfig
from flexpert.errors import ConfigError
from flexpert.reading import is_open_to_others, read_text

log = logging.getLogger("flexpert.server")

# A key file is a line; whoever names a log or a checkpoint by mistake is told, not waited for.
_LONGEST_FILE = 64 * 2**10


@dataclass(frozen=True, slots=True)
class BearerKeys:
    """What opens the API and the control API; None: open to everybody."""

    api: bytes | None = field(default=None, repr=False)
    control: bytes | None = field(default=None, repr=False)


def read_keys(config: ServerConfig) -> BearerKeys:
    """The keys that the settings name. Without a control key the API's opens both.

    Raises:
        ConfigError: a file cannot be read, or holds no key.
    """
    api = _key("api_key", config.api_key, config.api_key_file)
    control = _key("control_key", config.control_key, config.control_key_file)
    return BearerKeys(api, control if control is not None else api)


def is_right(given: bytes, key: bytes) -> bool:
    """In constant time: how long a refusal takes must not tell how much of a key was right."""
    return hmac.compare_digest(given, key)


def _key(name: str, given: SecretStr | None, file: Path | None) -> bytes | None:
    if file is not None:
        return _from_file(name, file)
    return None if given is None else given.get_secret_value().encode()


def _from_file(name: str, file: Path) -> bytes:
    what = f"server.{name}_file {str(file)!r}"
    # as other files that a user names: a pipe that nobody writes into must not keep us
    lines = read_text(file, f"server.{name}_file", most=_LONGEST_FILE).splitlines()
    key = lines[0].strip() if lines else ""
    if not key or "\0" in key:
        raise ConfigError(f"{what} has no key in its first line")
    with contextlib.suppress(OSError):  # it may be gone by now
        warn_if_open(file, f"server.{name}_file {str(file)!r}")
    return key.encode()


def warn_if_open(file: Path, what: str) -> None:
    """Log it if others may read a secret. Raises: OSError"""
    if is_open_to_others(file.stat()):
        log.warning("%s can be read by others on this machine; chmod 600 it", what)
