"""A script that knows nothing of flexpert runs unchanged: joins, leaves, kills, rejoins, holes."""

from __future__ import annotations

import json
import multiprocessing
import os
import runpy
import signal
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch.distributed import TCPStore

from flexpert.compat import install_nixl_ep
from flexpert.compat.nixl_ep.device_exchange import VARIABLE

SCRIPT = Path(__file__).parents[1] / "support" / "nixl_ep_script.py"
LIMIT_S = 100.0

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["torch", "flexpert.compat.nixl_ep"])


def run_script(arguments: list[str], device: str) -> None:
    """What a process of its own does: as if the script had been started after an install."""
    torch.set_num_threads(1)
    os.environ[VARIABLE] = device
    install_nixl_ep()
    sys.argv = [str(SCRIPT), *arguments]
    runpy.run_path(str(SCRIPT), run_name="__main__")


def lives(plan: list[list[int]]) -> list[tuple[int, int, bool]]:
    """(rank, first phase, whether it is killed) of each process that a plan needs, in order."""
    begun: dict[int, int] = {}
    found = []
    for number, phase in enumerate([*plan, []]):
        here = {abs(rank) for rank in phase}
        for rank in [rank for rank in begun if rank not in here]:
            found.append((rank, begun.pop(rank), False))
        for rank in here:
            begun.setdefault(rank, number)
        for rank in [-rank for rank in phase if rank < 0]:
            found.append((rank, begun.pop(rank), True))
    return sorted(found, key=lambda life: life[1])


def run_plan(plan: list[list[int]], *options: str, device: str = "cpu") -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=LIMIT_S))
    common = ["--port", str(store.port), "--plan", json.dumps(plan), *options]
    running: dict[int, tuple[multiprocessing.process.BaseProcess, bool]] = {}

    def end(rank: int) -> None:
        process, killed = running[rank]
        process.join(LIMIT_S)
        assert process.exitcode == (-signal.SIGKILL if killed else 0), f"rank {rank}"
        del running[rank]

    try:
        for rank, first, killed in lives(plan):
            if rank in running:  # an id is used again when its process has exited
                end(rank)
            arguments = ["--rank", str(rank), "--start-phase", str(first), *common]
            process = context.Process(target=run_script, args=(arguments, device))
            process.start()
            running[rank] = process, killed
        for rank in list(running):
            end(rank)
    finally:
        for process, _ in running.values():
            process.kill()
            process.join()


def test_which_processes_a_plan_needs() -> None:
    assert lives([[0, 1], [0, -1], [0, 1]]) == [(1, 0, True), (0, 0, False), (1, 2, False)]


@pytest.mark.slow
@pytest.mark.parametrize("die", ["dispatch", "combine"])
def test_a_rank_is_killed_and_comes_back_under_its_id(die: str) -> None:
    run_plan([[0, 1], [0, 1, 2, 3], [0, 1, -2, 3], [0, 3], [0, 2, 3]], "--die", die)


@pytest.mark.slow
def test_holes_from_the_start_and_a_rank_0_that_leaves() -> None:
    run_plan([[0, 2], [2, 4], [1, 2, 4], [0, 1]])


@pytest.mark.slow
def test_up_and_down_again_with_the_same_ids() -> None:
    run_plan([[1], [0, 1, 2], [1], [0, 1, 2], [0, -1, 2], [0, 2]])


SMALL = ("--num-tokens", "2", "--hidden", "128", "--topk", "2", "--experts-per-rank", "1")


@pytest.mark.slow
@pytest.mark.timeout(400)  # alone it takes 15 s, but waits here do not sleep
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: nothing is interpreted")
@pytest.mark.parametrize("die", ["dispatch", "combine"])
def test_the_same_with_the_kernels_of_a_gpu_in_the_interpreter(die: str) -> None:
    pytest.importorskip("triton", reason="Triton is not installed: pip install flexpert[cuda]")
    run_plan([[0, 2], [0, -1, 2], [1, 2]], "--die", die, *SMALL, device="cuda")


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no NVIDIA GPU")
@pytest.mark.parametrize("die", ["dispatch", "combine"])
def test_the_same_on_a_gpu(die: str) -> None:
    plan = [[0, 1], [0, 1, 2, 3], [0, 1, -2, 3], [0, 3], [0, 2, 3]]
    run_plan(plan, "--die", die, "--device", "cuda", device="cuda")
