"""The head's ranks on other hosts: which ids they may have, and who starts and ends them.

An agent has come by itself (`flexpert join`), or was started through Ray for a rank that the
coordinator has asked for; the latter are the head's own: one that is lost is started again.
"""

from __future__ import annotations

import asyncio
import secrets
import socket
from collections.abc import Callable, Sequence
from typing import Protocol

from flexpert.cluster.hosts.agent_protocol import FreeMemory
from flexpert.cluster.hosts.cluster_token import cluster_keys, keys_of, read_token
from flexpert.cluster.hosts.host_sessions import HostSessions
from flexpert.cluster.hosts.ray_ranks import RayRanks
from flexpert.cluster.processes.early_fork_server import for_hosts
from flexpert.cluster.saved_state import SavedHost
from flexpert.cluster.served_model import ServedModel
from flexpert.cluster.views import HostView
from flexpert.config import Config


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

    def is_member(self, rank: int) -> bool:
        """Whether it is of the current epoch."""

    def rank_left_host(self, rank: int, status: int, why: str, *, ours: bool) -> None:
        """Its process is gone, or given up. ours: it may be started again from here."""

    def save_hosts(self, records: list[SavedHost]) -> None:
        """Hosts that have a rank, for another head."""


class HostRanks:
    """Used on the head's event loop. Nobody can join until `listen`."""

    def __init__(self, config: Config, owner: HostsOwner) -> None:
        """Raises: ConfigError: hosts may join, and there is no token or none that can be used; or
        Ray is to start ranks, and is not installed."""
        self._config = config
        self._owner = owner
        self._keys = cluster_keys(config.cluster)
        self._sessions: HostSessions | None = None
        self._ray: RayRanks | None = None
        self._tickets: dict[int, bytes] = {}  # of ranks that Ray starts
        if config.cluster.launcher == "ray":
            token = read_token(config.cluster.cluster_token_file) or secrets.token_urlsafe(32)
            self._keys = keys_of(token)
            self._ray = RayRanks(config, self, token)

    @property
    def expected(self) -> bool:
        """Whether hosts may join, which are told of the model."""
        return self._ray is not None or self._config.cluster.join_listen is not None

    @property
    def starts_all(self) -> bool:
        """Whether no rank is a process of this host: Ray starts them."""
        return self._ray is not None

    async def connect(self, tell: Callable[[str], None]) -> None:
        """To Ray, if ranks are started through it. Raises: ConfigError: it is not there."""
        if self._ray is not None:
            tell(f"connecting to Ray ({self._config.cluster.ray_address})")
            await self._ray.connect()

    async def check_room(self, newcomers: int) -> None:
        """Raises: OperationRefused: Ray has no room for so many more ranks."""
        if self._ray is not None:
            await self._ray.check_room(newcomers)

    async def listen(
        self, model: ServedModel, tell: Callable[[str], None], known: Sequence[SavedHost] = ()
    ) -> None:
        """Let hosts join, if the settings say so.

        known: hosts of the head before; their ranks are lost unless `attach` finds them in time.

        Raises: ConfigError: it cannot listen there.
        """
        cluster, address = self._config.cluster, self._config.cluster.join_listen
        if address is None and self._ray is not None:
            address = self._ray.own_address
        if address is None or self._keys is None:
            return
        self._sessions = HostSessions(
            address,
            self._keys,
            self,
            settings=for_hosts(self._config),
            model=model.description,
            timeout_s=cluster.host_timeout,
            orphan_s=cluster.orphan_timeout if cluster.state_dir else 0.0,
            known=known,
        )
        if self._ray is not None:
            self._ray.join_at(self._sessions.address)
        if self._ray is None:
            waits = "" if cluster.ranks else "waiting for hosts: "
            tell(f"{waits}hosts join with: flexpert join {self._sessions.address}")

    def __contains__(self, rank: int) -> bool:
        """Whether the rank's process is, or is to be, one of another host."""
        there = self._sessions is not None and rank in self._sessions
        return there or self._ray is not None

    @property
    def ids(self) -> frozenset[int]:
        """Ids that hosts have, or have been promised."""
        return self._sessions.ids if self._sessions else frozenset()

    @property
    def draining(self) -> frozenset[int]:
        """Ids whose hosts have asked to leave."""
        return self._sessions.draining if self._sessions else frozenset()

    def free_memory(self) -> dict[int, FreeMemory]:
        """On the hosts of those that were told to join, by rank."""
        return self._sessions.free_memory() if self._sessions else {}

    def views(self) -> list[HostView]:
        return self._sessions.views() if self._sessions else []

    def spawn(self, rank: int, verdicts: bytes, end: socket.socket) -> None:
        """Have a rank's host start it, or Ray find one that does; see `HostSessions.spawn`."""
        assert self._sessions is not None
        if self._ray is None or rank in self._sessions:
            self._sessions.spawn(rank, verdicts, end)
            return
        ticket = self._tickets[rank] = self._ray.start(rank)
        self._sessions.expect(ticket, rank, verdicts, end)

    def attach(self, rank: int, end: socket.socket) -> None:
        """Give a rank of the head before a new connection; see `HostSessions.attach`."""
        assert self._sessions is not None
        self._sessions.attach(rank, end)

    def kill(self, rank: int) -> None:
        """Give a rank up: whatever its host still says is not heard."""
        assert self._sessions is not None
        if (ticket := self._tickets.get(rank)) is not None:
            loop = asyncio.get_running_loop()
            loop.call_soon(self._sessions.give_up, ticket, "it was terminated")
        else:
            self._sessions.kill(rank)

    def leave(self) -> None:
        """Hosts are left to another head."""
        if self._sessions:
            self._sessions.leave()

    async def close(self) -> None:
        """Idempotent."""
        if self._sessions:
            self._sessions.close()
        if self._ray:
            await self._ray.close()

    # ---- what Ray needs ----------------------------------------------------------------------

    def agent_ended(self, ticket: bytes, why: str) -> None:
        """There is no agent with this ticket, or none any more."""
        if self._sessions:
            self._sessions.give_up(ticket, why)

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

    def is_member(self, rank: int) -> bool:
        """Whether the rank is of the current epoch."""
        return self._owner.is_member(rank)

    def save_hosts(self, records: list[SavedHost]) -> None:
        """Hosts that have a rank, for another head."""
        self._owner.save_hosts(records)

    def rank_left_host(self, rank: int, status: int, why: str) -> None:
        """The process of a rank from outside is gone, or given up."""
        ticket = self._tickets.pop(rank, None)
        if ticket is not None and self._ray is not None:
            self._ray.stop(ticket)
        self._owner.rank_left_host(rank, status, why, ours=ticket is not None)
