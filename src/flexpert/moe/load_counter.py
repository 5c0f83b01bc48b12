"""How many tokens chose each expert, counted at their home, where the router's choices are.

So counts do not depend on where experts are, and no change of that touches them: the sum over the
ranks is what an expert has to compute, wherever it is.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from flexpert.moe.load_snapshot import Counts, LoadSnapshot


class HostLoadCounter:
    """Of a rank on a CPU; used by the thread of its steps."""

    def __init__(self, layers: int, experts: int) -> None:
        self.compute_s = 0.0
        self._choices: Counts = np.zeros((layers, experts), dtype=np.int64)
        self._experts = experts

    def count(self, layer: int, expert_ids: Tensor, *, holes: bool) -> None:
        """expert_ids: [tokens, k] int. holes: some may be -1."""
        ids = expert_ids.numpy().ravel()
        if holes:
            ids = ids[ids >= 0]
        self._choices[layer] += np.bincount(ids, minlength=self._experts)

    def address(self, layer: int) -> int:
        """Of the counts of a layer, [experts] int64, to which C adds."""
        return int(self._choices[layer].ctypes.data)

    def snapshot(self) -> LoadSnapshot:
        return LoadSnapshot(self._choices.copy(), self.compute_s)


class DeviceLoadCounter:
    """Of a GPU rank, in memory of a fixed place: a captured graph counts as well.

    What is counted of padding goes to an entry that nobody reads.
    """

    def __init__(self, layers: int, experts: int, device: torch.device) -> None:
        self._choices = torch.zeros((layers, 1 + experts), dtype=torch.int32, device=device)
        self._one = torch.ones(1, dtype=torch.int32, device=device)
        # of 32 bits, which a busy expert fills in days: they are taken over before
        self._taken: Counts = np.zeros((layers, experts), dtype=np.int64)
        self._last: Counts = np.zeros((layers, experts), dtype=np.int64)

    def count(self, layer: int, expert_ids: Tensor) -> None:
        """expert_ids: [T, k] int on the device; -1: none."""
        ids = expert_ids.reshape(-1).long() + 1
        self._choices[layer].scatter_add_(0, ids, self._one.expand(ids.shape[0]))

    def snapshot(self) -> LoadSnapshot:
        """Waits for the device: to be asked where that has nothing to do."""
        now = self._choices[:, 1:].cpu().numpy().astype(np.int64)
        self._taken += (now - self._last) % (1 << 32)
        self._last = now
        return LoadSnapshot(self._taken.copy())
