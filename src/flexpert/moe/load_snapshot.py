"""Counts of the tokens that chose each expert, up to a moment."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Counts = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class LoadSnapshot:
    """Sums since the process began.

    choices: [layers, experts] int64, tokens of this rank that chose an expert. compute_s: time in
    experts' products, of this rank's experts; 0: not measured, as inside of a CUDA graph.
    """

    choices: Counts
    compute_s: float = 0.0

    def since(self, earlier: LoadSnapshot) -> LoadSnapshot:
        """What has come since then."""
        return LoadSnapshot(self.choices - earlier.choices, self.compute_s - earlier.compute_s)
