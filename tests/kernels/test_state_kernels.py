"""One token of each sequence in a layer with a state: Triton's interpreter against plain torch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

pytest.importorskip("triton", reason="the GPU kernels need the package triton")

from support.state_cases import StateCase, delta_case, delta_result, space_case, space_result

from flexpert.kernels.cuda.delta_rule import gated_delta_rule
from flexpert.kernels.cuda.state_space import state_space
from flexpert.kernels.cuda.states import put_states, take_states
from flexpert.kernels.state_steps import StateRows

PADDING = 1  # row


def padded(case: StateCase) -> StateCase:
    """One row of it is padding."""
    sources, targets = case.sources.clone(), case.targets.clone()
    sources[PADDING] = targets[PADDING] = -1
    return StateCase(case.convolved.clone(), case.states.clone(), sources, targets)


def check_untouched(case: StateCase, before: StateCase) -> None:
    """Only slots that a row of it writes have changed."""
    for ours, old in ((case.convolved, before.convolved), (case.states, before.states)):
        others = torch.ones(len(old), dtype=torch.bool)
        others[case.targets[case.targets >= 0]] = False
        assert torch.equal(ours[others], old[others])


@pytest.mark.parametrize("width", [4, 3])
def test_the_gated_delta_rule_updates_states_where_they_are(width: int) -> None:
    torch.manual_seed(width)
    sizes = {"heads": 2, "each": 2, "key_dim": 20, "value_dim": 12, "width": width}
    x, weights, whole = delta_case(3, **sizes, dtype=torch.float32, device="cpu")
    case = padded(whole)
    out = gated_delta_rule(x, weights, case.convolved, case.states, case.rows)
    assert out.isfinite().all()
    for row in (0, 2):
        result, seen, state = delta_result(x, weights, whole, row)
        torch.testing.assert_close(out[row], result, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(case.convolved[case.targets[row]], seen)
        torch.testing.assert_close(case.states[case.targets[row]], state, rtol=1e-4, atol=1e-5)
    check_untouched(case, whole)


@pytest.mark.parametrize("groups", [1, 2])
def test_mamba_2_updates_states_where_they_are(groups: int) -> None:
    torch.manual_seed(groups)
    sizes = {"heads": 4, "head_dim": 6, "groups": groups, "size": 12}
    projected, weights, whole = space_case(3, **sizes, dtype=torch.float32, device="cpu")
    case = padded(whole)
    out = state_space(projected, weights, case.convolved, case.states, case.rows)
    assert out.isfinite().all()
    for row in (0, 2):
        result, seen, state = space_result(projected, weights, whole, row)
        torch.testing.assert_close(out[row], result, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(case.convolved[case.targets[row]], seen)
        torch.testing.assert_close(case.states[case.targets[row]], state, rtol=1e-4, atol=1e-5)
    check_untouched(case, whole)


SOURCES, BEGINS, STARTS = [-1] * 5 + [3] * 2 + [4], [0] * 5 + [5] * 2 + [7], [0, 5, 7, 8]
"""A prompt of five tokens, two more of one behind a state, and a sequence that decodes."""
TARGETS = [-1, 9, -1, -1, 10, -1, 11, 12]
"""A state within the first one is kept."""


def check_prompts(
    case: StateCase,
    before: StateCase,
    out: torch.Tensor,
    result_of: Callable[[StateCase, int], tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
) -> None:
    """Rows one after the other are what each gives alone."""
    for row, (begin, target) in enumerate(zip(BEGINS, TARGETS, strict=True)):
        if row == begin:
            alone = before.alone(SOURCES[row])
        result, seen, state = result_of(alone, row)
        alone.convolved[0], alone.states[0] = seen, state
        torch.testing.assert_close(out[row], result, rtol=1e-4, atol=1e-5)
        if target >= 0:
            torch.testing.assert_close(case.convolved[target], seen)
            torch.testing.assert_close(case.states[target], state, rtol=1e-4, atol=1e-5)
    assert torch.equal(case.states[:9], before.states[:9])
    assert torch.equal(case.convolved[:9], before.convolved[:9])


def prompt_rows() -> StateRows:
    return StateRows(*map(torch.tensor, (SOURCES, TARGETS, BEGINS, STARTS)))


def test_prompts_go_through_the_gated_delta_rule_token_by_token() -> None:
    torch.manual_seed(0)
    sizes = {"heads": 1, "each": 2, "key_dim": 20, "value_dim": 12}
    x, weights, before = delta_case(8, **sizes, dtype=torch.float32, device="cpu")
    case = before.clone()
    out = gated_delta_rule(x, weights, case.convolved, case.states, prompt_rows())
    check_prompts(case, before, out, lambda alone, row: delta_result(x, weights, alone, row))


def test_prompts_go_through_mamba_2_token_by_token() -> None:
    torch.manual_seed(0)
    sizes = {"heads": 2, "head_dim": 6, "groups": 1, "size": 12}
    x, weights, before = space_case(8, **sizes, dtype=torch.float32, device="cpu")
    case = before.clone()
    out = state_space(x, weights, case.convolved, case.states, prompt_rows())
    check_prompts(case, before, out, lambda alone, row: space_result(x, weights, alone, row))


def test_states_come_out_of_their_slots_and_back() -> None:
    states = torch.arange(5 * 3 * 7.0).view(5, 3, 7)
    taken = take_states(states, torch.tensor([4, -1, 0]))
    assert torch.equal(taken, torch.stack([states[4], torch.zeros(3, 7), states[0]]))
    before = states.clone()
    put_states(taken + 1, states, torch.tensor([1, -1, 2]))
    assert torch.equal(states[1], taken[0] + 1)
    assert torch.equal(states[2], taken[2] + 1)
    assert torch.equal(states[[0, 3, 4]], before[[0, 3, 4]])
