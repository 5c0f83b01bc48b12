"""One safetensors file: its header, and its bytes, read in parallel by many threads.

Bytes are read through the page cache, never around it. The ranks of a host read the same files:
each needs all dense weights, and one that is restarted reads what its predecessor read. With
O_DIRECT nothing would stay for them. It would gain nothing either: read into aligned memory and
copied to its place, a file costs a copy as it does from the page cache. (2 and 8 threads, pieces
of 3 MiB, ext4 on a virtual disk, three times each: O_DIRECT 1.3 to 1.9 GB/s; through the page
cache 1.2 to 3.7, asked what is cached first and WILLNEED for the rest 1.7 to 3.8. From the page
cache: 30 to 45.)

What the page cache lacks is announced to the kernel in one piece (WILLNEED), so that a disk gets
large requests however small its read-ahead is set.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import threading
import weakref
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from flexpert.errors import ModelError
from flexpert.models.finite import AT_ONCE, find_not_finite, not_finite
from flexpert.models.tensor_header import PREFIX, TensorEntry, header_size, parse_header

_UNSUPPORTED: Final = {errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS}


class CheckpointFile:
    """A safetensors file whose header was read and checked. Thread-safe.

    The file is opened for its bytes at the first read, in the process that reads, or by `hold`:
    the header may have been read before a fork, and by one that never reads on. From then on it is
    that file, also if another one is put in its place.

    tensors: by name.
    """

    def __init__(self, path: Path) -> None:
        """Raises: ModelError: it cannot be read, or its header does not describe it."""
        self.path = path
        self._lock = threading.Lock()
        self._descriptor: int | None = None
        self._mapping: Tensor | None = None
        self._tells_cached = hasattr(os, "RWF_NOWAIT")
        try:
            descriptor = _open(path)
            try:
                opened = os.fstat(descriptor)
                if not stat.S_ISREG(opened.st_mode):
                    raise ModelError(f"{path} is not a file")
                self._identity = _identity(opened)
                self._bytes = opened.st_size
                self.tensors = _read_header(descriptor, opened.st_size)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise self._unreadable(error) from error
        except (ValueError, MemoryError) as error:
            raise ModelError(
                f"{path} is damaged or incomplete ({error}); download it again"
            ) from error

    def hold(self) -> None:
        """Open it for its bytes now: forks of this process go on with it, whatever has its path by
        then. Raises: ModelError: it is not the one any more whose header was read."""
        with contextlib.suppress(OSError):  # whoever reads opens it
            self._open_descriptor()

    def check_unchanged(self) -> None:
        """Refuse a file that is not as it was when it was opened at first: ranks must not mix two
        versions.

        Raises: ModelError
        """
        held = self._descriptor
        try:
            found = os.stat(self.path) if held is None else os.fstat(held)
        except OSError as error:
            raise ModelError(f"cannot read {self.path}: {error.strerror}; put it back") from error
        self._check_same(found)

    def read(self, begin: int, into: memoryview, floats: torch.dtype | None = None) -> None:
        """Fill `into`, contiguous bytes, with those of the file from byte `begin` on.

        floats: they are numbers of this dtype, and all have to be finite; None: they are just
        bytes.

        Raises: ModelError: the file cannot be read, ends before, or has numbers that are not
            finite.
        """
        step = AT_ONCE if floats is not None else max(1, len(into))
        cached = True  # as far as it is known
        try:
            descriptor = self._open_descriptor()
            for at in range(0, len(into), step):
                piece = into[at : at + step]
                done = self._read_cached(descriptor, begin + at, piece) if cached else 0
                if cached and done < len(piece):
                    cached = False
                    self._announce(descriptor, begin + at + done, len(into) - at - done)
                self._read_rest(descriptor, begin + at, piece, done)
                if floats is not None:
                    self._check_finite(begin + at, piece, floats)
        except OSError as error:
            raise self._unreadable(error) from error

    def announce(self, begin: int, nbytes: int) -> None:
        """These bytes will be read soon. Raises: ModelError: the file cannot be opened."""
        try:
            self._announce(self._open_descriptor(), begin, nbytes)
        except OSError as error:
            raise self._unreadable(error) from error

    def check_finite(self, begin: int, numbers: Tensor) -> None:
        """numbers: what the file has from byte `begin` on, on the host and contiguous.

        Raises: ModelError: names the tensor with one that is not finite.
        """
        found = find_not_finite(numbers)
        if found is None:
            return
        flat = numbers.view(-1)
        at = begin + found * flat.element_size()
        name, entry = next(
            (name, entry)
            for name, entry in self.tensors.items()
            if entry.begin <= at < entry.begin + entry.nbytes
        )
        number = (at - entry.begin) // flat.element_size()
        raise not_finite(f"{self.path}: {name}", entry.shape, number, float(flat[found]))

    def _check_finite(self, begin: int, piece: memoryview, floats: torch.dtype) -> None:
        self.check_finite(begin, torch.frombuffer(piece, dtype=floats))

    def _announce(self, descriptor: int, begin: int, nbytes: int) -> None:
        os.posix_fadvise(descriptor, begin, nbytes, os.POSIX_FADV_WILLNEED)

    def _read_rest(self, descriptor: int, begin: int, into: memoryview, done: int) -> None:
        """Raises: OSError; ModelError: the file ends before."""
        while done < len(into):
            read = os.preadv(descriptor, [into[done:]], begin + done)
            if not read:
                raise ModelError(
                    f"{self.path} is damaged: it ends at byte {begin + done}; download it again"
                )
            done += read

    def mapped(self, begin: int, nbytes: int) -> Tensor:
        """[nbytes] uint8: bytes of the file in the page cache, read when they are used.

        All processes that map them share them; what one writes only it sees.

        Raises: ModelError: the file cannot be read.
        """
        try:
            descriptor = self._open_descriptor()
            with self._lock:
                if self._mapping is None:
                    self._mapping = torch.from_file(
                        f"/proc/self/fd/{descriptor}",  # whatever has the path by now
                        shared=False,
                        size=self._bytes,
                        dtype=torch.uint8,
                    )
        except OSError as error:
            raise self._unreadable(error) from error
        except (RuntimeError, MemoryError) as error:
            raise ModelError(f"{self.path} cannot be mapped ({error})") from error
        return self._mapping[begin : begin + nbytes]

    def _read_cached(self, descriptor: int, begin: int, into: memoryview) -> int:
        """Read what the page cache has of it, from `begin` on. Returns: how many bytes."""
        if not self._tells_cached:
            return 0
        try:
            return os.preadv(descriptor, [into], begin, os.RWF_NOWAIT)
        except BlockingIOError:
            return 0
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
            self._tells_cached = False  # not in this file system
            return 0

    def _open_descriptor(self) -> int:
        with self._lock:
            if self._descriptor is None:
                descriptor = _open(self.path)
                try:
                    self._check_same(os.fstat(descriptor))
                except BaseException:
                    os.close(descriptor)
                    raise
                weakref.finalize(self, os.close, descriptor)
                self._descriptor = descriptor
            return self._descriptor

    def _check_same(self, found: os.stat_result) -> None:
        if _identity(found) != self._identity:
            raise ModelError(
                f"{self.path} changed since the service opened it; put it back, or restart the "
                "service to serve the new one"
            )

    def _unreadable(self, error: OSError) -> ModelError:
        return ModelError(f"cannot read {self.path}: {error.strerror or error}")


def _open(path: Path) -> int:
    # whoever should write into a pipe must not keep us
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)


def _read_header(descriptor: int, file_bytes: int) -> dict[str, TensorEntry]:
    """Raises: ValueError"""
    size = header_size(os.pread(descriptor, PREFIX, 0), file_bytes)
    header = os.pread(descriptor, size, PREFIX)
    if len(header) < size:
        raise ValueError("it ends within its header")
    return parse_header(header, file_bytes)


def _identity(found: os.stat_result) -> tuple[int, ...]:
    """(device, inode, bytes, time of the last change): the same for an untouched file only."""
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
