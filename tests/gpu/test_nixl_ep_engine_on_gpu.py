"""An engine's captured graph through a join, a leave and a rejoin, over nixl_ep's interface.

Three ranks; on two GPUs two of them share one, on one GPU all do, under MPS.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from support.nixl_ep_plans import run_plan as run

SCRIPT = Path(__file__).parents[1] / "support" / "nixl_ep_engine.py"
run_plan = partial(run, SCRIPT)

# as models have it: hidden, choices, experts of a rank
SHAPES = [
    ("--hidden", "2048", "--topk", "8", "--experts-per-rank", "16"),
    ("--hidden", "3584", "--topk", "11", "--experts-per-rank", "12", "--num-tokens", "64"),
]


@pytest.mark.usefixtures("shared_gpu")
@pytest.mark.parametrize("shape", SHAPES, ids=["2048", "3584"])
def test_the_replay_after_the_mask_has_the_newcomer(shape: tuple[str, ...]) -> None:
    plan = [[0, 1], [0, 1, 2], [0, 2], [0, 1, 2], [1], [0, 1]]
    run_plan(plan, "--device", "cuda", *shape, device="cuda")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="a killed rank takes others of MPS down")
def test_a_newcomer_that_dies_when_it_is_unmasked_is_masked_and_its_id_used_again() -> None:
    plan = [[0, 1], [0, 1, -2], [0, 1, 2]]
    run_plan(plan, "--device", "cuda", *SHAPES[0], device="cuda")
