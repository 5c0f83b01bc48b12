"""What an exchange can fail with. Each error names the peer, the phase, the epoch and the limit.

`flexpert.comm` stands alone, so these do not derive from `flexpert.errors`; the engine turns them
into evidence for the coordinator.
"""

from __future__ import annotations


class CommError(Exception):
    """Base of all errors of the exchange."""


class RankTimeout(CommError):  # noqa: N818
    """Peers did not write in time.

    Attributes:
        ranks: the ids that were waited for in vain.
        phase: "vote", "dispatch" or "combine".
        epoch: the epoch of the exchange.
        limit_s: the time limit, seconds.
    """

    def __init__(self, ranks: tuple[int, ...], phase: str, epoch: int, limit_s: float) -> None:
        names = ", ".join(map(str, ranks))
        super().__init__(
            f"rank {names} did not answer in {phase} (epoch {epoch}, limit {limit_s:.1f} s)"
        )
        self.ranks = ranks
        self.phase = phase
        self.epoch = epoch
        self.limit_s = limit_s


class Interrupted(CommError):  # noqa: N818
    """A wait was ended by `Buffer.interrupt`, from another thread of this process."""


class PeerUnreachable(CommError):  # noqa: N818
    """A peer's window cannot be opened: the process is gone, or it is on another machine."""


class StaleEpoch(CommError):  # noqa: N818
    """A call or a handle belongs to an epoch that is over."""
