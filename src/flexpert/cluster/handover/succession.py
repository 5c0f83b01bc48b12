"""A head's part in takeovers: it may be asked for its service, and follows who has got it."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections.abc import Callable, Mapping
from typing import Protocol

from flexpert.cluster import state_store
from flexpert.cluster.handover import messages as hand
from flexpert.cluster.handover.followed import App, FollowedLink
from flexpert.cluster.handover.follower import Follower
from flexpert.cluster.handover.handing_over import HandingOver
from flexpert.cluster.handover.head_socket import HeadSocket
from flexpert.cluster.head_state import HeadState, settings_of_ranks
from flexpert.cluster.journal import TokenStream
from flexpert.cluster.views import ClusterEvent
from flexpert.config import Config
from flexpert.errors import FlexpertError
from flexpert.version import VERSION

log = logging.getLogger("flexpert")

_LAST_WORDS_S = 1.0  # for those that follow to be told how their answers have ended


class Served(Protocol):
    """The head."""

    @property
    def changing(self) -> str | None: ...

    def refusal(self) -> str | None: ...

    def freeze(self) -> tuple[Mapping[TokenStream, int], int, list[ClusterEvent]]:
        """Nothing of the service is touched from now on. Returns the unfinished answers that
        somebody reads here, with how many tokens of each have come, the number of the latest event,
        and the latest events."""
        ...

    def adopt(self, sequence_id: str) -> TokenStream | None: ...


class Succession:
    """handed: set once another head has the service; successor: its process. listener: of HTTP, set
    by whoever has it. on_handed: called then.
    """

    def __init__(self, config: Config, head: Served) -> None:
        self._config = config
        self._head = head
        self.handed = asyncio.Event()
        self.successor = 0
        self.listener: socket.socket | None = None
        self.on_handed: list[Callable[[], None]] = []
        self._app: App | None = None
        self._keep: Callable[[hand.KeptResponse], None] = lambda response: None
        self._kept: list[hand.KeptResponse] = []  # until there is an application
        self._app_there = asyncio.Event()
        self._state: HeadState | None = None
        self._socket: HeadSocket | None = None
        self.on_ask = HandingOver(self).on_ask
        self._links: set[FollowedLink] = set()
        self._follower: Follower | None = None

    def open(self, state: HeadState) -> None:
        """Others may ask from now on. Raises: OSError"""
        self._state = state
        self._socket = HeadSocket(state.directory.path, self.on_ask, self.on_follow)

    def serve_app(
        self, app: App, keep: Callable[[hand.KeptResponse], None] = lambda response: None
    ) -> None:
        """Requests are answered by this ASGI application. keep: what clients may ask it for."""
        self._app, self._keep = app, keep
        for response in self._kept:
            keep(response)
        self._kept.clear()
        self._app_there.set()

    async def application(self) -> App:
        """When it is there."""
        await self._app_there.wait()
        assert self._app is not None
        return self._app

    @property
    def follower(self) -> Follower:
        """Once it is handed over."""
        assert self._follower is not None
        return self._follower

    @property
    def waits(self) -> bool:
        """After the handing over: whether anything is still to be answered here."""
        return bool(self._follower) or self.waits_for_links

    @property
    def waits_for_links(self) -> bool:
        """Whether requests that were forwarded here are being answered."""
        return any(link.busy for link in self._links)

    async def close(self, error: FlexpertError, *, remove: bool) -> None:
        """Who still waits gets this error. remove: no head goes on. Idempotent."""
        if self._socket is not None:
            self._socket.close(remove=remove)
            deadline = time.monotonic() + _LAST_WORDS_S
            while any(link.busy or link.follows for link in self._links):
                if time.monotonic() > deadline or self.handed.is_set():
                    break
                await asyncio.sleep(0.01)
            await self._socket.end()
        if self._follower is not None:
            await self._follower.close(error)

    # ---- a takeover -----------------------------------------------------------------------------

    @property
    def changing(self) -> str | None:
        return self._head.changing

    def refusal(self) -> str | None:
        return self._head.refusal()

    def welcome(self) -> tuple[hand.HeadWelcome, list[int]]:
        server = self._config.server
        welcome = hand.HeadWelcome(
            VERSION,
            os.getpid(),
            state_store.FORMAT,
            settings_of_ranks(self._config),
            server.host,
            server.port,
        )
        return welcome, [] if self.listener is None else [self.listener.fileno()]

    async def let_go(self) -> tuple[hand.Handed, list[int]]:
        state = self._state
        assert state is not None
        assert self._socket is not None
        answers, latest, events = self._head.freeze()
        moved = {name for link in self._links for name in link.follows}
        own = {stream: n for stream, n in answers.items() if stream.id not in moved}
        patience_s = self._config.cluster.orphan_timeout
        self._follower = Follower(state.directory.path, own, patience_s)
        self.handed.set()
        for tell in self.on_handed:
            tell()
        self._socket.close(remove=False)
        await asyncio.to_thread(state.finish)
        return hand.Handed(latest, events), [state.directory.lock]

    def has_let_go(self, pid: int) -> None:
        assert self._state is not None
        self.successor = pid
        self._state.close(remove=False)
        self.follower.start()
        self.move_links()
        log.warning("the head of process %d has taken the ranks and requests over", pid)

    def move_links(self) -> None:
        """Who followed this head is to follow the other."""
        for link in self._links:
            link.move()

    async def on_follow(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, follow: hand.Follow
    ) -> None:
        link = FollowedLink(self, reader, writer)
        self._links.add(link)
        try:
            await link.serve(follow)
        finally:
            self._links.discard(link)

    def keep(self, response: hand.KeptResponse) -> None:
        """See `followed.Adopter`."""
        if self._app is None:
            self._kept.append(response)
        else:
            self._keep(response)

    def adopt(self, sequence_id: str) -> TokenStream | None:
        """See `followed.Adopter`."""
        return self._head.adopt(sequence_id)
