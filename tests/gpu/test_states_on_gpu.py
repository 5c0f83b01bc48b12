"""Kernels of layers that keep a state of each sequence, on a GPU, against torch."""

from __future__ import annotations

import pytest
import torch
from support.state_cases import delta_case, delta_result, space_case, space_result

from flexpert.kernels.cuda.delta_rule import gated_delta_rule
from flexpert.kernels.cuda.state_space import state_space
from flexpert.kernels.state_steps import StateRows


@pytest.mark.parametrize("rows", [1, 3, 64])
def test_kernels_update_states_as_torch_does(rows: int) -> None:
    """At Qwen3-Next's and Granite-4's sizes, in bf16."""
    torch.manual_seed(rows)
    inputs, of_rule, before = delta_case(rows)
    case = before.clone()
    out = gated_delta_rule(inputs, of_rule, case.convolved, case.states, case.rows)
    for row in range(rows):
        result, _, state = delta_result(inputs, of_rule, before, row)
        assert relative(out[row], result) < 2e-2
        assert relative(case.states[case.targets[row]], state) < 1e-2
    projected, of_space, before = space_case(rows)
    case = before.clone()
    out = state_space(projected, of_space, case.convolved, case.states, case.rows)
    for row in range(rows):
        result, _, state = space_result(projected, of_space, before, row)
        assert relative(out[row], result) < 2e-2
        assert relative(case.states[case.targets[row]], state) < 1e-2


def test_kernels_take_the_tokens_of_prompts_as_torch_does() -> None:
    """One that begins and one behind a state; as before."""
    torch.manual_seed(0)
    starts = torch.tensor([0, 200, 300], device="cuda")
    begins = starts[:-1].repeat_interleave(starts.diff())
    sources = torch.where(begins == 0, -1, 3)
    targets = torch.full_like(begins, -1)
    targets[150], targets[199], targets[299] = 5, 6, 7
    rows = StateRows(sources, targets, begins, starts)
    inputs, of_rule, ruled = delta_case(300, slots=8)
    projected, of_space, spaced = space_case(300, slots=8)
    for before, ours, result_of in (
        (
            ruled,
            lambda case: gated_delta_rule(inputs, of_rule, case.convolved, case.states, rows),
            lambda alone, row: delta_result(inputs, of_rule, alone, row),
        ),
        (
            spaced,
            lambda case: state_space(projected, of_space, case.convolved, case.states, rows),
            lambda alone, row: space_result(projected, of_space, alone, row),
        ),
    ):
        case = before.clone()
        out = ours(case)
        for begin, end in ((0, 200), (200, 300)):
            alone = before.alone(int(sources[begin]))
            for row in range(begin, end):
                result, alone.convolved[0], alone.states[0] = result_of(alone, row)
                assert relative(out[row], result) < 2e-2
                if (slot := int(targets[row])) >= 0:
                    assert relative(case.states[slot], alone.states[0]) < 1e-2
                    assert torch.equal(case.convolved[slot], alone.convolved[0])


def relative(ours: torch.Tensor, expected: torch.Tensor) -> float:
    return float((ours.float() - expected).norm() / expected.norm())
