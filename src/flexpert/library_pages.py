"""Pages of libraries that a process has read, and may never read again: they go back.

The initialisers of torch's libraries alone run through some 70 MiB of them. A page that is needed
again comes from the system's cache of files, sixteen at a time, without a read of the disk.
"""

from __future__ import annotations

import ctypes
import re
from dataclasses import dataclass

_MAPPING = re.compile(
    r"^(?P<begin>[0-9a-f]+)-(?P<end>[0-9a-f]+) (?P<may>\S+) \S+ \S+ (?P<inode>\d+) *(?P<path>.*)$"
)
_MADV_DONTNEED = 4


@dataclass(slots=True)
class _Mapping:
    """anonymous: KiB of it that are this process' own, because something was written there."""

    begin: int
    end: int
    may: str
    path: str
    anonymous: int = 0


def give_back() -> None:
    """Take the pages of libraries that are as their files have them out of this process.

    Without effect where the system does not say what is mapped.
    """
    try:
        with open("/proc/self/smaps") as smaps:
            found = unchanged(smaps.read())
    except OSError:
        return
    advise = ctypes.CDLL(None).madvise
    advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for begin, size in found:
        advise(begin, size, _MADV_DONTNEED)


def unchanged(smaps: str) -> list[tuple[int, int]]:
    """Begin and bytes of the parts of libraries that cannot be written here and never were: nothing
    is lost with their pages (UCX writes its hooks into libc's code). A library is a file of which
    code is mapped.

    smaps: what is mapped, as proc(5) says it.
    """
    mappings = _mappings(smaps)
    libraries = {each.path for each in mappings if "x" in each.may}
    return [
        (each.begin, each.end - each.begin)
        for each in mappings
        if each.path in libraries and "w" not in each.may and not each.anonymous
    ]


def _mappings(smaps: str) -> list[_Mapping]:
    """Those of files that are not shared."""
    found: list[_Mapping] = []
    of_file = False
    for line in smaps.splitlines():
        if header := _MAPPING.match(line):
            of_file = header["inode"] != "0" and header["may"].endswith("p")
            if of_file:
                begin, end = int(header["begin"], 16), int(header["end"], 16)
                found.append(_Mapping(begin, end, header["may"], header["path"]))
        elif of_file and line.startswith("Anonymous:"):
            found[-1].anonymous = int(line.split()[1])
    return found
