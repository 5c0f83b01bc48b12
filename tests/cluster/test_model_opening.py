"""What is forked from a process that has opened a model can compute in several threads at once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.checkpoints import make_checkpoint

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


_ONE_CHILD = """
import os, signal, sys
import torch
torch.set_num_threads(4)
from flexpert.cluster.processes.model_opening import open_model
open_model(sys.argv[1].encode())
pid = os.fork()
if pid == 0:
    signal.alarm(20)
    torch.nn.functional.linear(torch.ones(300, 300), torch.ones(300, 300))
    os._exit(0)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


@pytest.mark.parametrize("family", ["qwen3_next", "deepseek_v3"])
def test_what_is_tried_to_open_a_model_leaves_no_threads_that_a_fork_would_wait_for(
    family: str, tmp_path: Path
) -> None:
    model = {"model": str(make_checkpoint(family, tmp_path)), "skip_tokenizer_init": True}
    done = subprocess.run(
        [sys.executable, "-c", _ONE_CHILD, json.dumps({"model": model})],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.stdout.strip() == "0", done.stderr
