"""One token of each sequence in a layer with a state: Triton's interpreter against plain torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton", reason="the GPU kernels need the package triton")

from support.state_cases import StateCase, delta_case, space_case

from flexpert.kernels.cuda.delta_rule import decode_delta_rule
from flexpert.kernels.cuda.state_space import decode_state_space
from flexpert.kernels.cuda.states import put_states, take_states

PADDING = 1  # row


def padded(case: StateCase) -> StateCase:
    """One row of it is padding."""
    sources, targets = case.sources.clone(), case.targets.clone()
    sources[PADDING] = targets[PADDING] = -1
    return StateCase(case.convolved.clone(), case.states.clone(), sources, targets)


def convolved(
    x: Tensor, weight: Tensor, bias: Tensor | None, seen: Tensor
) -> tuple[Tensor, Tensor]:
    """x: [channels], seen: [channels, width] → silu of the convolution, what it has seen then."""
    seen = torch.cat([seen[:, 1:], x[:, None]], 1)
    y = (seen * weight).sum(1)
    return F.silu(y if bias is None else y + bias), seen


def check(case: StateCase, before: StateCase, row: int, seen: Tensor, state: Tensor) -> None:
    torch.testing.assert_close(case.convolved[case.targets[row]], seen)
    torch.testing.assert_close(case.states[case.targets[row]], state, rtol=1e-4, atol=1e-5)
    for ours, old in ((case.convolved, before.convolved), (case.states, before.states)):
        untouched = torch.ones(len(old), dtype=torch.bool)
        untouched[case.targets[case.targets >= 0]] = False
        assert torch.equal(ours[untouched], old[untouched])


@pytest.mark.parametrize("width", [4, 3])
def test_the_gated_delta_rule_updates_states_where_they_are(width: int) -> None:
    torch.manual_seed(width)
    sizes = {"heads": 2, "each": 2, "key_dim": 20, "value_dim": 12, "width": width}
    x, weights, whole = delta_case(3, **sizes, dtype=torch.float32, device="cpu")
    case = padded(whole)
    out = decode_delta_rule(x, weights, case.convolved, case.states, case.sources, case.targets)
    assert out.isfinite().all()
    for row in (0, 2):
        channels = torch.cat([part[row].flatten() for part in (x.query, x.key, x.value)])
        y, seen = convolved(
            channels, weights.convolution, weights.bias, whole.convolved[whole.sources[row]]
        )
        q, k, v = y.split([40, 40, 48])
        q, k = (part.view(2, 20).repeat_interleave(2, 0) for part in (q, k))
        q, k = (part * torch.rsqrt((part * part).sum(1, keepdim=True) + 1e-6) for part in (q, k))
        decay = -weights.rate.exp() * F.softplus(x.decay[row].flatten() + weights.shift)
        state = whole.states[whole.sources[row]] * decay.exp()[:, None, None]
        known = torch.einsum("hkv,hk->hv", state, k)
        delta = (v.view(4, 12) - known) * x.beta[row].flatten().sigmoid()[:, None]
        state = state + torch.einsum("hk,hv->hkv", k, delta)
        read = torch.einsum("hkv,hk->hv", state, q) / 20**0.5
        read = F.rms_norm(read, (12,), weights.norm, weights.eps)
        expected = read * F.silu(x.gate[row].reshape(4, 12))
        torch.testing.assert_close(out[row].view(4, 12), expected, rtol=1e-4, atol=1e-5)
        check(case, whole, row, seen, state)


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
        gate, channels, step = projected[row].split([24, 24 + 24 * groups, 4])
        y, seen = convolved(
            channels, weights.convolution, weights.bias, whole.convolved[whole.sources[row]]
        )
        x, b, c = y.split([24, 12 * groups, 12 * groups])
        x = x.view(4, 6)
        b, c = (part.view(groups, 12).repeat_interleave(4 // groups, 0) for part in (b, c))
        step = F.softplus(step + weights.shift)
        state = whole.states[whole.sources[row]] * (-weights.rate.exp() * step).exp()[:, None, None]
        state = state + torch.einsum("hd,hn->hdn", x * step[:, None], b)
        read = torch.einsum("hdn,hn->hd", state, c) + x * weights.skip[:, None]
        gated = (read.flatten() * F.silu(gate)).view(groups, -1)
        expected = F.rms_norm(gated, gated.shape[1:], None, weights.eps).flatten() * weights.norm
        torch.testing.assert_close(out[row], expected, rtol=1e-4, atol=1e-5)
        check(case, whole, row, seen, state)


def test_states_come_out_of_their_slots_and_back() -> None:
    states = torch.arange(5 * 3 * 7.0).view(5, 3, 7)
    taken = take_states(states, torch.tensor([4, -1, 0]))
    assert torch.equal(taken, torch.stack([states[4], torch.zeros(3, 7), states[0]]))
    before = states.clone()
    put_states(taken + 1, states, torch.tensor([1, -1, 2]))
    assert torch.equal(states[1], taken[0] + 1)
    assert torch.equal(states[2], taken[2] + 1)
    assert torch.equal(states[[0, 3, 4]], before[[0, 3, 4]])
