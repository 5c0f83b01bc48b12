"""A script that knows nothing of flexpert runs unchanged: joins, leaves, kills, rejoins, holes."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from support.nixl_ep_plans import lives
from support.nixl_ep_plans import run_plan as run

SCRIPT = Path(__file__).parents[1] / "support" / "nixl_ep_script.py"
run_plan = partial(run, SCRIPT)


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
