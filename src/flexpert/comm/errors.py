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
        phase: "vote", "dispatch", "combine", "connect" or "agree".
        epoch: the epoch of the exchange, or the one to agree on.
        limit_s: the time limit, seconds.
    """

    def __init__(self, ranks: tuple[int, ...], phase: str, epoch: int, limit_s: float) -> None:
        super().__init__(
            f"rank {_names(ranks)} did not answer in {phase} (epoch {epoch}, limit {limit_s:.1f} s)"
        )
        self.ranks = ranks
        self.phase = phase
        self.epoch = epoch
        self.limit_s = limit_s


class RankLost(CommError):  # noqa: N818
    """Peers that were waited for will not write any more: their process or link is gone, or they
    were masked meanwhile. It is known at once, without waiting for the limit.

    Attributes:
        ranks: the ids that are lost.
        phase: "vote", "dispatch" or "combine".
        epoch: the epoch of the exchange.
        why: id → one of "process exited", "link broken", "masked".
    """

    def __init__(self, ranks: tuple[int, ...], phase: str, epoch: int, why: dict[int, str]) -> None:
        reasons = ", ".join(f"rank {rank}: {why[rank]}" for rank in ranks)
        super().__init__(f"lost in {phase} (epoch {epoch}): {reasons}")
        self.ranks = ranks
        self.phase = phase
        self.epoch = epoch
        self.why = why


class Evicted(CommError):  # noqa: N818
    """The others agreed on a view without this rank; it must not exchange with them any more.

    Attributes:
        rank: the own id.
        epoch: the epoch that was agreed without it.
        ranks: the ids of that epoch.
    """

    def __init__(self, rank: int, epoch: int, ranks: tuple[int, ...]) -> None:
        super().__init__(
            f"rank {rank} was evicted: epoch {epoch} is rank {_names(ranks)}; "
            "close the buffer and join again as a newcomer"
        )
        self.rank = rank
        self.epoch = epoch
        self.ranks = ranks


class Interrupted(CommError):  # noqa: N818
    """A wait was ended by `Buffer.interrupt`, from another thread of this process."""


class PeerUnreachable(CommError):  # noqa: N818
    """A peer's window cannot be opened: the process is gone, or no channel leads there."""


class ChannelDown(PeerUnreachable):
    """This process cannot use the channel to a peer now, say because its network device is down;
    nothing is known of the peer."""


class StaleEpoch(CommError):  # noqa: N818
    """A call or a handle belongs to an epoch that is over."""


def _names(ranks: tuple[int, ...]) -> str:
    return ", ".join(map(str, ranks)) or "(nobody)"
