"""What a rank tells of the load of experts: looked at by the step loop, told by another thread."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from flexpert.engine.rank_protocol import Contradiction, RouterLoad
from flexpert.moe.load_snapshot import Counts, LoadSnapshot

EVERY_S = 1.0  # looking at a GPU's counts waits for it, which the end of a step does anyway

_PAIRS = np.dtype("<u4")


def encode_load(load: LoadSnapshot) -> RouterLoad:
    """load: what has come since the report before."""
    flat = load.choices.ravel()
    chosen = np.flatnonzero(flat)
    pairs = np.stack([chosen, np.minimum(flat[chosen], 2**32 - 1)], axis=1)
    return RouterLoad(pairs.astype(_PAIRS).tobytes(), load.compute_s)


def decode_load(load: RouterLoad, layers: int, experts: int) -> Counts:
    """[layers, experts] int64, tokens that chose each. Raises: Contradiction: it cannot be."""
    if len(load.choices) % 8 or not 0 <= load.compute_s < float("inf"):
        raise Contradiction("it tells of a load that is none")
    pairs: npt.NDArray[np.uint32] = np.frombuffer(load.choices, dtype=_PAIRS).reshape(-1, 2)
    if pairs.size and int(pairs[:, 0].max()) >= layers * experts:
        raise Contradiction("it tells of the load of an expert that there is not")
    flat = np.zeros(layers * experts, dtype=np.int64)
    np.add.at(flat, pairs[:, 0].astype(np.int64), pairs[:, 1].astype(np.int64))
    return flat.reshape(layers, experts)


class RoutingReport:
    """begin, look: of the step loop; take: of the thread that tells."""

    def __init__(self, loads: Callable[[], LoadSnapshot | None]) -> None:
        self._loads = loads
        self._next = 0.0
        self._begun = False
        self._seen: LoadSnapshot | None = None
        self._told: LoadSnapshot | None = None

    def begin(self) -> None:
        """The first epoch begins: what was computed to warm up does not count."""
        if not self._begun:
            self._begun = True
            self._told = self._seen = self._loads()

    def look(self, now: float) -> None:
        """After a step; most often does nothing."""
        if now >= self._next and self._begun:
            self._next = now + EVERY_S
            self._seen = self._loads()

    def take(self) -> RouterLoad | None:
        """What has come since it was asked last; None: nothing."""
        seen, told = self._seen, self._told
        if seen is told or seen is None:
            return None
        self._told = seen
        return encode_load(seen.since(told) if told else seen)
