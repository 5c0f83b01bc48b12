"""The head's ranks on other hosts: which ids they may have, and who starts and ends them."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Protocol

from flexpert.cluster.hosts.agent import model_digest
from flexpert.cluster.hosts.cluster_token import cluster_keys
from flexpert.cluster.hosts.host_sessions import HostSessions
from flexpert.cluster.processes.early_fork_server import for_hosts
from flexpert.cluster.views import HostView
from flexpert.config import Config
from flexpert.models.source import ModelSource


class HostsOwner(Protocol):
    """The head, as far as ranks on other hosts need it."""

    def ids_in_use(self) -> frozenset[int]:
        """Ids that no rank from outside may have."""

    def busy(self) -> bool:
        """Whether a change could not begin now."""

    def begin_operation(
        self, *, join: tuple[int, ...] = (), remove: tuple[int, ...] = ()
    ) -> object:
        """Raises: OperationConflict, OperationRefused"""

    def rank_left_host(self, rank: int, status: int, why: str) -> None:
        """Its process is gone, or given up."""


class HostRanks:
    """Used on the head's event loop. Nobody can join until `listen`."""

    def __init__(self, config: Config, owner: HostsOwner) -> None:
        """Raises: ConfigError: hosts may join, and there is no token or none that can be used."""
        self._config = config
        self._owner = owner
        self._keys = cluster_keys(config.cluster)
        self._sessions: HostSessions | None = None

    def listen(self, source: ModelSource, tell: Callable[[str], None]) -> None:
        """Let hosts join, if the settings say so. Raises: ConfigError: it cannot listen there."""
        cluster = self._config.cluster
        if cluster.join_listen is None or self._keys is None:
            return
        self._sessions = HostSessions(
            cluster.join_listen,
            self._keys,
            self,
            settings=for_hosts(self._config),
            digest=model_digest(source),
            timeout_s=cluster.host_timeout,
        )
        tell(f"hosts join at {self._sessions.address}")

    def __contains__(self, rank: int) -> bool:
        return self._sessions is not None and rank in self._sessions

    @property
    def ids(self) -> frozenset[int]:
        """Ids that hosts have, or have been promised."""
        return self._sessions.ids if self._sessions else frozenset()

    def views(self) -> list[HostView]:
        return self._sessions.views() if self._sessions else []

    def spawn(self, rank: int, verdicts: bytes, end: socket.socket) -> None:
        """Have a rank's host start it; see `HostSessions.spawn`."""
        assert self._sessions is not None
        self._sessions.spawn(rank, verdicts, end)

    def kill(self, rank: int) -> None:
        """Give a rank up: whatever its host still says is not heard."""
        assert self._sessions is not None
        self._sessions.kill(rank)

    def close(self) -> None:
        """Idempotent."""
        if self._sessions:
            self._sessions.close()

    # ---- what sessions need ------------------------------------------------------------------

    def free_id(self, wanted: int) -> int | None:
        """An id for a rank from outside, the wanted one if it is free; the highest, since
        processes of this host take the lowest. None: there is none."""
        free = set(range(self._config.cluster.max_ranks)) - self._owner.ids_in_use() - self.ids
        if wanted >= 0:
            return wanted if wanted in free else None
        return max(free, default=None)

    def busy(self) -> bool:
        """Whether a change could not begin now."""
        return self._owner.busy()

    def begin_operation(
        self, *, join: tuple[int, ...] = (), remove: tuple[int, ...] = ()
    ) -> object:
        """Raises: OperationConflict, OperationRefused"""
        return self._owner.begin_operation(join=join, remove=remove)

    def rank_left_host(self, rank: int, status: int, why: str) -> None:
        """The process of a rank from outside is gone, or given up."""
        self._owner.rank_left_host(rank, status, why)
