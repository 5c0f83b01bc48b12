"""Pages of libraries go back, and what was written into a library's memory stays."""

from __future__ import annotations

import subprocess
import sys

from flexpert import library_pages

PROGRAM = """
import ctypes, re
from pathlib import Path
from flexpert import library_pages

def resident():
    return int(re.search(r"RssFile:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

libc = ctypes.CDLL(None)
libc.srand(5)
expected = [libc.rand() for _ in range(3)]
libc.srand(5)  # a library's own memory
before = resident()
library_pages.give_back()
after = resident()
assert after < before / 2, (before, after)
assert [libc.rand() for _ in range(3)] == expected
import json
assert json.loads("[1]") == [1]
own = library_pages.unchanged(Path("/proc/self/smaps").read_text())
here = ctypes.cast(libc.madvise, ctypes.c_void_p).value
assert any(begin <= here < begin + size for begin, size in own), (here, own)
"""

SMAPS = """\
7f0000000000-7f0000002000 r-xp 00000000 fe:00 11 /lib/one.so
Anonymous:             0 kB
7f0000002000-7f0000003000 r-xp 00002000 fe:00 11 /lib/one.so
Anonymous:             4 kB
7f0000003000-7f0000004000 rw-p 00003000 fe:00 11 /lib/one.so
Anonymous:             0 kB
7f0000004000-7f0000005000 r--p 00000000 fe:00 12 /data/weights.safetensors
Anonymous:             0 kB
7f0000005000-7f0000006000 r-xs 00000000 00:01 13 /memfd:shared (deleted)
Anonymous:             0 kB
7f0000006000-7f0000007000 r--p 00004000 fe:00 11 /lib/one.so
Anonymous:             0 kB
7f0000007000-7f0000008000 r-xp 00000000 00:00 0 [vdso]
Anonymous:             0 kB
"""


def test_a_process_goes_on_without_them() -> None:
    """In one of its own: UCX, which other tests load, writes into libc's code, madvise's too."""
    subprocess.run([sys.executable, "-c", PROGRAM], check=True, timeout=60)


def test_only_what_is_as_in_the_file_of_a_library_is_given_back() -> None:
    """The second mapping is as UCX leaves libc's, when it has written its hooks there."""
    given = library_pages.unchanged(SMAPS)
    first, last = 0x7F0000000000, 0x7F0000006000
    assert given == [(first, 0x2000), (last, 0x1000)]
