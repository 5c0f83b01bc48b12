"""What commands write: reports into files that are named, and what they print."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn, TextIO

from flexpert.errors import ConfigError, FlexpertError

EXIT_FAILURE = 1

_PROBE = bytes(4096)  # what a full disk has no room for
# of a write to standard output; what is written elsewhere is caught where it is
_OF_OUTPUT = (errno.EPIPE, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


# ---- files ------------------------------------------------------------------------------------


def check_outputs(*files: Path | None) -> None:
    """Before long work begins: these can be written, as far as can be known. Changes none of them.

    Raises: ConfigError
    """
    for file in files:
        if file is None:
            continue
        folder = file.absolute().parent
        if not folder.is_dir():
            raise ConfigError(f"cannot write {file}: there is no folder {file.parent}")
        try:
            _try(file)
        except (OSError, ValueError) as error:
            raise ConfigError(f"cannot write {file}: {_why(error)}") from None


def _try(file: Path) -> None:
    """Raises: OSError, ValueError"""
    try:
        mode = file.stat().st_mode
    except FileNotFoundError:
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            os.write(descriptor, _PROBE)
        finally:
            os.close(descriptor)
            file.unlink()
        return
    if not stat.S_ISFIFO(mode):  # to open that is to wait for who reads it
        os.close(os.open(file, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC))


def write_output(file: Path, data: bytes) -> None:
    """All of it; a file that this has begun does not stay in parts.

    Raises: FlexpertError
    """
    new = not file.exists()
    try:
        file.write_bytes(data)
    except OSError as error:
        if new:
            file.unlink(missing_ok=True)
        raise FlexpertError(f"cannot write {file}: {_why(error)}") from None


def show_report(report: object, text: object, *, as_json: bool, output: Path | None) -> None:
    """Print a report, and write it to a file if one is named.

    Args:
        report: what msgspec encodes.
        text: the same for people, as rich prints it.
        as_json: print JSON instead of `text`.
        output: gets the JSON in any case.

    Raises: FlexpertError: the file cannot be written.
    """
    if not as_json:
        from rich.console import Console

        Console(file=sys.stdout).print(text, highlight=False, soft_wrap=True)
    write_report(report, as_json=as_json, output=output)


def write_report(report: object, *, as_json: bool, output: Path | None) -> None:
    """The part of `show_report` that concerns JSON."""
    if not as_json and output is None:
        return
    import msgspec

    encoded = msgspec.json.format(msgspec.json.encode(report), indent=2)
    if as_json:
        print(encoded.decode())
    if output is not None:
        write_output(output, encoded)


def _why(error: OSError | ValueError) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


# ---- what is printed --------------------------------------------------------------------------


@contextlib.contextmanager
def printing() -> Iterator[None]:
    """Around a whole command: output that cannot be written ends it without a traceback.

    A reader that has seen enough (`| head -1`) is no error to talk about; a full disk is. Both are
    exit status 1. Where nobody reads stderr, that is no reason to end.
    """
    _open_missing()
    leaving: SystemExit | None = None
    try:
        yield
    except SystemExit as error:
        leaving = error
    except BaseException as error:
        if (why := _of_output(error)) is None:
            raise
        _give_up(why)
    try:
        sys.stdout.flush()
    except OSError as error:
        _give_up(error)
    _silence(sys.stderr)
    if leaving is not None:
        raise leaving


def _open_missing() -> None:
    """Descriptors 0 to 2 are there, or the next file or socket would be taken for one of them; and
    what is not in the encoding of the terminal is printed as well as can be."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest that is free
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if number == 0 else "w"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _of_output(error: BaseException) -> OSError | None:
    if isinstance(error, BaseExceptionGroup):
        return next(filter(None, map(_of_output, error.exceptions)), None)
    if isinstance(error, OSError) and error.filename is None and error.errno in _OF_OUTPUT:
        return error
    return None


def _give_up(error: OSError) -> NoReturn:
    if error.errno != errno.EPIPE:
        with contextlib.suppress(OSError):
            print(f"flexpert: cannot write the output: {error.strerror}", file=sys.stderr)
    _silence(sys.stdout)
    _silence(sys.stderr)
    sys.exit(EXIT_FAILURE)


def _silence(stream: TextIO) -> None:
    """If it cannot be written: what is left of it goes nowhere, so that Python's own flush at the
    end has nothing to say."""
    try:
        stream.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
        with contextlib.suppress(OSError):
            stream.flush()
