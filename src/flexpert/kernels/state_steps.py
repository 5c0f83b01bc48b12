"""What kernels take that compute the rows of a step in a layer that keeps a state."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class StateRows:
    """Where the rows of a step, N of S sequences, find and leave states.

    sources: [N] int64, the slot of the state before the first row of a row's sequence; -1: none.
    targets: [N] int64, the slot that the state behind a row goes to; -1: it goes nowhere. begins:
    [N] int64, that first row; starts: [S + 1] int64, that of each sequence, and N. Both None: each
    row is a sequence, and those without slots are padding.
    """

    sources: Tensor
    targets: Tensor
    begins: Tensor | None = None
    starts: Tensor | None = None


@dataclass(frozen=True, slots=True)
class DeltaInputs:
    """Projections of B rows, each with a last dimension that is contiguous; H heads of keys share
    their keys with R heads of values each.

    query, key: [B, H, key_dim]. value, gate: [B, H, R, value_dim]; beta, decay: [B, H, R]. All of
    one dtype.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    gate: Tensor
    beta: Tensor
    decay: Tensor


@dataclass(frozen=True, slots=True)
class DeltaWeights:
    """convolution: [channels, width] contiguous, of queries, keys and values of all heads in turn;
    bias: [channels] or None. rate, shift: [H · R], the logarithm of the decay's rate and what is
    added to `DeltaInputs.decay`. norm: [value_dim]; eps: its epsilon."""

    convolution: Tensor
    bias: Tensor | None
    rate: Tensor
    shift: Tensor
    norm: Tensor
    eps: float


@dataclass(frozen=True, slots=True)
class StateSpaceWeights:
    """convolution: [channels, width] contiguous, of the heads' inputs, of B and of C of all groups;
    bias: [channels] or None. rate, shift, skip: [heads]: the logarithm of the decay's rate, what is
    added to the step, and D. norm: [heads · head_dim]; eps: its epsilon; normed: channels that are
    normed together."""

    convolution: Tensor
    bias: Tensor | None
    rate: Tensor
    shift: Tensor
    skip: Tensor
    norm: Tensor
    eps: float
    normed: int
