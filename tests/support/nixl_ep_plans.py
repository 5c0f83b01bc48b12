"""Programs written for nixl_ep, run in a process for each rank through the phases of a plan."""

from __future__ import annotations

import json
import multiprocessing
import os
import runpy
import signal
import sys
from datetime import timedelta
from pathlib import Path

import torch
from torch.distributed import TCPStore

from flexpert.compat import install_nixl_ep
from flexpert.compat.nixl_ep.device_exchange import VARIABLE

LIMIT_S = 100.0

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["torch", "flexpert.compat.nixl_ep"])


def run_script(script: Path, arguments: list[str], device: str) -> None:
    """What a process of its own does: as if the script had been started after an install."""
    torch.set_num_threads(1)
    os.environ[VARIABLE] = device
    install_nixl_ep()
    sys.argv = [str(script), *arguments]
    runpy.run_path(str(script), run_name="__main__")


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


def run_plan(script: Path, plan: list[list[int]], *options: str, device: str = "cpu") -> None:
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
            process = context.Process(target=run_script, args=(script, arguments, device))
            process.start()
            running[rank] = process, killed
        for rank in list(running):
            end(rank)
    finally:
        for process, _ in running.values():
            process.kill()
            process.join()
