#!/usr/bin/env bash
# In a child of a fork, the first operations of several threads fail with "Invalid thread pool!".
#
# Versions    torch 2.13.0 (CPU build), Python 3.11; seen with torch 2.11.0 for CUDA 13.0, too.
# Expected    a process that has used torch and forks, and whose child then computes in several
#             threads, gets right results: one thread alone does, torch has a handler for forks, and
#             DataLoader's workers live from it.
# Seen        where the parent has set a number of threads, and the first operations of the child are
#             in several threads at once, many of these raise "pool INTERNAL ASSERT FAILED …
#             Invalid thread pool!": the first one that comes renews the pool it got from its parent,
#             and the others find none meanwhile. After one operation in one thread all is well.
#             What helps is to call torch.set_num_threads right after the fork, in
#             os.register_at_fork(after_in_child=…).
#
# Runs in a temporary folder; PYTHON=… takes an interpreter that has such a torch already. Exits
# with 0 if it is seen, 1 if it is not.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
if [ -z "${PYTHON:-}" ]; then
    python3 -m venv "$folder/venv"
    "$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.0
    PYTHON=$folder/venv/bin/python
fi
cat > "$folder/run.py" <<'PY'
import os
import sys
import threading

import torch

CHILDREN, THREADS = 40, 16
torch.set_num_threads(4)
x = torch.ones(200_000)
x.sum()


def failed(renews: bool) -> int:
    """Of so many children, those in which an operation of a thread fails."""
    count = 0
    for _ in range(CHILDREN):
        pid = os.fork()
        if pid == 0:
            if renews:
                torch.set_num_threads(torch.get_num_threads())
            errors, together = [], threading.Barrier(THREADS)

            def run() -> None:
                together.wait()
                try:
                    assert x.sum().item() == len(x)
                except RuntimeError as error:
                    errors.append(str(error))

            threads = [threading.Thread(target=run) for _ in range(THREADS)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            os._exit(bool(errors) and all("Invalid thread pool" in error for error in errors))
        count += os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != 0
    return count


print("torch", torch.__version__)
plain, renewed = failed(False), failed(True)
print(f"children in which an operation failed: {plain} of {CHILDREN}")
print(f"with torch.set_num_threads right after the fork: {renewed} of {CHILDREN}")
sys.exit(0 if plain > 0 and renewed == 0 else 1)
PY
"$PYTHON" "$folder/run.py"
