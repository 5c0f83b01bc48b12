"""Peers behind NIXL: what the kernels left to be sent leaves here, and what came is taken."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from flexpert.comm.errors import CommError
from flexpert.comm.host._kernels import lib
from flexpert.comm.host.codes import BROKEN_LINK, ENDED
from flexpert.comm.host.core import Core
from flexpert.comm.host.links import Link, NixlLink

if TYPE_CHECKING:
    from flexpert.comm.host import nixl

_PROBE_S = 0.01
_NAP_S = 0.00005


class Remote:
    """The agent of this buffer, and the links that go through it.

    moved: whether the last `flush` sent or got something, or left something on its way.
    """

    moved = False

    def __init__(self, core: Core, installed: Mapping[int, Link]) -> None:
        """installed: see `Members`."""
        self._core = core
        self._installed = installed
        self._endpoint: nixl.Endpoint | None = None
        self._probed = 0.0

    def endpoint(self) -> nixl.Endpoint:
        """The agent of this buffer, from the first such peer to the last."""
        core = self._core
        with core.changing:
            if self._endpoint is None:
                from flexpert.comm.host import nixl

                nonce = core.window.address.nonce.hex()
                self._endpoint = nixl.Endpoint(f"flexpert-{core.rank}-{nonce}")
            return self._endpoint

    def close_unused(self, links: Iterable[Link]) -> None:
        """links: all that there are."""
        if self._endpoint and not any(link.remote for link in links):
            self._endpoint.close()
            self._endpoint = None

    def bytes_written(self) -> dict[int, int]:
        """By peer behind NIXL, as long as it is connected: all that was written to it."""
        links = [link for link in tuple(self._installed.values()) if isinstance(link, NixlLink)]
        return {link.peer: link.bytes_written for link in links}

    def flush(self) -> bool:
        """Send what is due over NIXL, and take what has come; whether there are such peers."""
        links = [link for link in self._installed.values() if isinstance(link, NixlLink)]
        self.moved = False
        if not links or self._endpoint is None:
            return False
        core = self._core
        now = time.monotonic()
        probe = now - self._probed >= _PROBE_S
        if probe:
            self._probed = now
        for link in links:
            if core.gone(link.peer) in (ENDED, BROKEN_LINK):
                continue
            try:
                self.moved |= link.flush(core.b)
                link.check()
                if probe:
                    link.probe()
            except CommError:
                core.set_gone(link.peer, BROKEN_LINK)
        by_agent = {link.agent: link for link in links}
        for agent, message in self._endpoint.poll():
            if agent in by_agent:
                self.moved = True
                by_agent[agent].store(message)
        return True

    def send_on(self, active: Iterable[int], deadline_ns: int) -> None:
        """Until what was sent over NIXL has left: nobody may drive it once this call is over.

        No two ranks wait for each other here: who is done has all that was sent to it. A stopped
        peer must not make this rank so late that the others take it for stopped, too: once it is
        masked it is not waited for any more, neither here nor in later calls.
        """
        core = self._core
        links = [
            link
            for link in self._installed.values()
            if isinstance(link, NixlLink) and link.peer in active
        ]
        while any(not core.gone(link.peer) and link.is_sending() for link in links):
            if time.monotonic_ns() >= deadline_ns or lib.fx_is_interrupted(core.b):
                return
            self.flush()
            time.sleep(_NAP_S)
