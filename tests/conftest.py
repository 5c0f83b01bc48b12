"""For all tests: without a GPU, Triton's kernels run in its interpreter; nixl_ep's interface takes
tensors on the CPU, but where a test asks for the GPU; nobody kills many.
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when kernels are first imported
os.environ.setdefault("FLEXPERT_NIXL_EP_DEVICE", "cpu")

_kill = os.kill


def _kill_one(pid: int, number: int) -> None:
    """As os.kill, but 0 and negative numbers, which mean many processes, are a fault.

    A rank that is still to be forked has no pid; taken for one, it would end the test run, or all
    that the user runs.
    """
    assert pid > 0, f"kill({pid}, {number}) would signal more than one process"
    _kill(pid, number)


os.kill = _kill_one
