"""Small text files that a user names: read whole, within bounds, whatever they turn out to be."""

from __future__ import annotations

import os
import select
import stat
import time
from pathlib import Path

from flexpert.errors import ConfigError

_LIMIT_S = 5.0  # for who writes into a pipe


def read_text(file: Path, what: str, *, most: int) -> str:
    """The text of a file, a pipe (`<(command)`) or a device.

    Args:
        what: "the settings file", say, for the messages.
        most: bytes; larger ones are refused before they are read on.

    Raises: ConfigError
    """
    try:
        # a pipe that nobody writes into must not keep us
        descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            data = _read(descriptor, most + 1)
            pipe = not stat.S_ISREG(os.fstat(descriptor).st_mode)
        finally:
            os.close(descriptor)
    except TimeoutError:
        raise ConfigError(
            f"cannot read {what} {file}: it did not end within {_LIMIT_S:g} s"
        ) from None
    except OSError as error:
        raise ConfigError(f"cannot read {what} {file}: {error.strerror}") from None
    except ValueError as error:  # NUL in its name
        raise ConfigError(f"cannot read {what} {str(file)!r}: {error}") from None
    if len(data) > most:
        raise ConfigError(f"{what} {file} is larger than {most >> 10} KiB, so it is none")
    if pipe and not data:
        raise ConfigError(f"{what} {file} is a pipe or device that nothing comes out of")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{what} {file} is not text in UTF-8 (byte {error.start}: {error.reason})"
        ) from None


def is_open_to_others(status: os.stat_result) -> bool:
    """Whether others than this process' user may use a file with a secret.

    Its group may read it if the file is root's and this process is not: so Kubernetes (fsGroup) and
    systemd (LoadCredential) hand secrets to a service that does not run as root.
    """
    if not stat.S_ISREG(status.st_mode):
        return False
    handed = status.st_uid == 0 and os.geteuid() != 0
    refused = stat.S_IRWXO | (stat.S_IWGRP | stat.S_IXGRP if handed else stat.S_IRWXG)
    return bool(status.st_mode & refused)


def shown(text: object) -> str:
    """Some words of what a user wrote, fit for one line of a message."""
    short = str(text)
    short = short if len(short) <= 60 else f"{short[:50]}… ({len(short)} characters)"
    return short if short.isprintable() else repr(short)


def _read(descriptor: int, most: int) -> bytes:
    deadline = time.monotonic() + _LIMIT_S
    data = bytearray()
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    while len(data) < most:
        try:
            piece = os.read(descriptor, most - len(data))
        except BlockingIOError:
            left_s = deadline - time.monotonic()
            if left_s <= 0 or not poll.poll(left_s * 1e3):
                raise TimeoutError from None
            continue
        if not piece:
            break
        data += piece
    return bytes(data)
