"""An engine's ranks come and go under its captured graph, over nixl_ep's interface.

On a CPU and in Triton's interpreter the graph's calls are made again instead; tests/gpu replays it.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from support.nixl_ep_plans import run_plan as run

SCRIPT = Path(__file__).parents[1] / "support" / "nixl_ep_engine.py"
run_plan = partial(run, SCRIPT)

# a third rank joins, one leaves, and its id comes back
PLAN = [[0, 1], [0, 1, 2], [0, 2], [0, 1, 2]]
# a newcomer dies just when it is unmasked; the next one under its id does not
DEADLY = [[0, 1], [0, 1, -2], [0, 1, 2]]
SMALL = ("--num-tokens", "2", "--hidden", "128", "--topk", "2", "--experts-per-rank", "1")


@pytest.mark.slow
@pytest.mark.parametrize("plan", [PLAN, DEADLY], ids=["rejoin", "death"])
def test_ranks_join_leave_and_rejoin(plan: list[list[int]]) -> None:
    run_plan(plan)


@pytest.mark.slow
@pytest.mark.timeout(400)  # alone it takes half a minute, but waits here do not sleep
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: nothing is interpreted")
@pytest.mark.parametrize("plan", [PLAN, DEADLY], ids=["rejoin", "death"])
def test_the_same_with_the_kernels_of_a_gpu_in_the_interpreter(plan: list[list[int]]) -> None:
    pytest.importorskip("triton", reason="Triton is not installed: pip install flexpert[cuda]")
    run_plan(plan, *SMALL, device="cuda")
