"""What is forked from a process that has opened a model can compute in several threads at once."""

from __future__ import annotations

import subprocess
import sys

_CHILDREN = """
import os, sys, threading
import torch
torch.set_num_threads(4)
from flexpert.cluster.processes.model_opening import open_model
open_model(b'{"model": {"model": "tiny"}}')
x = torch.ones(200_000)
x.sum()
broken = 0
for _ in range(8):
    pid = os.fork()
    if pid == 0:
        errors, together = [], threading.Barrier(16)
        def run():
            together.wait()
            try:
                x.sum()
            except RuntimeError as error:
                errors.append(error)
        threads = [threading.Thread(target=run) for _ in range(16)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        os._exit(len(errors))
    broken += os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != 0
print(broken)
"""


def test_a_child_s_first_operations_may_come_from_several_threads_at_once() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _CHILDREN], capture_output=True, text=True, timeout=100
    )
    assert done.stdout.strip() == "0", done.stderr
