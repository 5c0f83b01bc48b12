"""One token of each sequence in a layer with a state: Triton's interpreter against plain torch."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="the GPU kernels need the package triton")

from support.state_cases import StateCase, delta_case, delta_result, space_case, space_result

from flexpert.kernels.cuda.delta_rule import decode_delta_rule
from flexpert.kernels.cuda.state_space import decode_state_space
from flexpert.kernels.cuda.states import put_states, take_states

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
    out = decode_delta_rule(x, weights, case.convolved, case.states, case.sources, case.targets)
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
    out = decode_state_space(
        projected, weights, case.convolved, case.states, case.sources, case.targets
    )
    assert out.isfinite().all()
    for row in (0, 2):
        result, seen, state = space_result(projected, weights, whole, row)
        torch.testing.assert_close(out[row], result, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(case.convolved[case.targets[row]], seen)
        torch.testing.assert_close(case.states[case.targets[row]], state, rtol=1e-4, atol=1e-5)
    check_untouched(case, whole)


def test_states_come_out_of_their_slots_and_back() -> None:
    states = torch.arange(5 * 3 * 7.0).view(5, 3, 7)
    taken = take_states(states, torch.tensor([4, -1, 0]))
    assert torch.equal(taken, torch.stack([states[4], torch.zeros(3, 7), states[0]]))
    before = states.clone()
    put_states(taken + 1, states, torch.tensor([1, -1, 2]))
    assert torch.equal(states[1], taken[0] + 1)
    assert torch.equal(states[2], taken[2] + 1)
    assert torch.equal(states[[0, 3, 4]], before[[0, 3, 4]])
