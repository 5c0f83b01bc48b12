"""How much each expert of each layer has to do: what all of placement means by loads (pure)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

# [layers][experts], not negative, in any unit: tokens of a window, or their mean per second
ExpertLoads = Sequence[Sequence[float]] | NDArray[np.float64]


def load_array(loads: ExpertLoads, layers: int, experts: int) -> NDArray[np.float64]:
    """[layers, experts] float64.

    Raises:
        ValueError: another shape, or a number that is negative or not finite.
    """
    try:
        array = np.asarray(loads, dtype=np.float64)
    except (TypeError, ValueError):
        raise ValueError("loads are numbers, as many in each layer") from None
    if array.shape != (layers, experts):
        raise ValueError(f"loads have shape {array.shape}, not ({layers}, {experts})")
    if not np.isfinite(array).all() or (array < 0).any():
        raise ValueError("loads must be finite and not negative")
    return array
