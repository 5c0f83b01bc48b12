"""For all tests: without a GPU, Triton's kernels run in its interpreter, and fork servers of heads
in this process start warm; torch has one thread; nixl_ep's interface takes tensors on the CPU, but
where a test asks for the GPU; nobody kills many.
"""

import os
from collections.abc import Callable, Iterator

import pytest
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


@pytest.fixture
def in_shm() -> Callable[[], set[str]]:
    """Names in /dev/shm, without those of semaphores of Python's process pools: flexpert has none,
    and a test that runs beside this one may.
    """
    return lambda: {name for name in os.listdir("/dev/shm") if not name.startswith("sem.mp-")}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """As ranks on a shared machine run, and what --deterministic requires. Two processes of tests
    with two threads each wait most of the time for a thread that has no processor."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _warm() -> Iterator[None]:
    from support.warm import warm_fork_servers  # what it imports reads the environment

    with warm_fork_servers(not torch.cuda.is_available()):
        yield


@pytest.fixture
def cold() -> Iterator[None]:
    """Fork servers start as for users: for tests of the start itself."""
    from support.warm import warm_fork_servers

    with warm_fork_servers(False):
        yield
