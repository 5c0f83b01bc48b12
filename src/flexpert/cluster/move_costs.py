"""What moving experts has cost so far, by what ranks measured (pure)."""

from __future__ import annotations

from dataclasses import dataclass

_WEIGHT = 0.3  # of the latest

ASSUMED_BYTES_PER_S = 1e9


@dataclass(slots=True)
class MoveCosts:
    """move_s: of a rank's time, for each expert that it loads while it serves; 0: none was
    measured. pause_s: of a switch between the same ranks."""

    move_s: float = 0.0
    pause_s: float = 0.0

    def moved(self, experts: int, seconds: float) -> None:
        """A rank has loaded some, which took it so long without what it was held back."""
        if experts > 0 and seconds >= 0:
            self.move_s = _mean(self.move_s, seconds / experts)

    def paused(self, seconds: float) -> None:
        self.pause_s = _mean(self.pause_s, seconds)

    def of_move(self, expert_bytes: int) -> float:
        """Seconds; assumed, as long as none was measured."""
        return self.move_s or expert_bytes / ASSUMED_BYTES_PER_S


def _mean(before: float, latest: float) -> float:
    return (1 - _WEIGHT) * before + _WEIGHT * latest if before else latest
