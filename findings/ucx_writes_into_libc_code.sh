#!/usr/bin/env bash
# A NIXL agent with the backend UCX writes into the machine code of libc.
#
# Versions    nixl-cu13 1.5.1 with its own UCX, without a GPU; Python 3.11, x86-64 Linux.
# Expected    code of a shared library stays what its file has: pages of it are shared by all
#             processes, and a process that gives them back (MADV_DONTNEED), compares them with the
#             file or maps the file over them loses nothing.
# Seen        when the first agent is made, the first instructions of functions of libc that change
#             mappings are overwritten by jumps into UCX (its memory hooks). The pages are this
#             process' own from then on, and giving them back would silently take the hooks away:
#             UCX would use registered memory that is not there any more. Nothing tells it but
#             "Anonymous" above 0 kB for a mapping of code in /proc/self/smaps. With
#             UCX_MEM_EVENTS=n the code stays as it is.
#
# Runs in a temporary folder. Exits with 0 if it is seen, 1 if it is not.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-deps nixl-cu13==1.5.1
"$folder/venv/bin/pip" install --quiet numpy==2.4.0 torch==2.13.0
cat > "$folder/run.py" <<'PY'
import ctypes
import re
import sys
from pathlib import Path

NAMES = ("mmap", "munmap", "mremap", "madvise", "shmat", "shmdt", "brk", "getpid", "strlen")
libc = ctypes.CDLL(None)


def code() -> dict[str, bytes]:
    """The first 16 bytes of each function."""
    return {
        name: ctypes.string_at(ctypes.cast(getattr(libc, name), ctypes.c_void_p).value, 16)
        for name in NAMES
    }


def own_kib() -> int:
    """KiB of libc's code that are this process' own."""
    found = re.findall(
        r"^\S+ r-x\S* .*/libc[.-]\S*\n(?:\w+: .*\n)*?Anonymous:\s+(\d+) kB",
        Path("/proc/self/smaps").read_text(),
        re.MULTILINE,
    )
    return sum(map(int, found))


from nixl_cu13._api import nixl_agent, nixl_agent_config  # noqa: E402

before = code()
print("own code of libc after the import:", own_kib(), "KiB")
agent = nixl_agent("one", nixl_agent_config(backends=["UCX"]))
after = code()
print("own code of libc with an agent:", own_kib(), "KiB")
changed = [name for name in NAMES if before[name] != after[name]]
print("functions with other code:", ", ".join(changed) or "none")
sys.exit(0 if "munmap" in changed and own_kib() > 0 else 1)
PY
echo "as it comes"
"$folder/venv/bin/python" "$folder/run.py"
echo "with UCX_MEM_EVENTS=n"
if UCX_MEM_EVENTS=n "$folder/venv/bin/python" "$folder/run.py"; then
    exit 1
fi
