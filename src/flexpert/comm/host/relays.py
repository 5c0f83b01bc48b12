"""Memory of siblings, i.e. ranks on the same machine: what the gateway of a sender on another
machine has got for all of them, and what they leave for it to answer (see kernels.c).

Each rank tells in the control part of its window where the memory of its links lies, for each peer
behind NIXL: a line with the offsets of inbox and outbox, the nonces of the peer and of the memory,
and its descriptor. A line is written before the rank takes part in an epoch with that peer, and
read once something of the sibling has come in that epoch.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass

from flexpert.comm.errors import CommError, PeerUnreachable, RankLost
from flexpert.comm.host._kernels import ffi, lib
from flexpert.comm.host.codes import BROKEN_LINK, DISPATCH, PHASES, WHY
from flexpert.comm.host.core import Core
from flexpert.comm.host.gateways import TwoLevelPlan
from flexpert.comm.host.link_memory import open_link_memory
from flexpert.comm.host.links import Link, NixlLink
from flexpert.comm.window_layout import LINE, LINK_MEMORY_AT, MAX_CAPACITY, PAGE

_LINE = struct.Struct("<qq16s16si")  # offsets of inbox and outbox (0: no link), nonces, descriptor


@dataclass(frozen=True, slots=True)
class _Mapping:
    line: bytes  # that it was made from
    inbox: bool  # or the outbox
    at: int


class Relays:
    """Used under `Core.exchanging`; opened lazily, closed when a link goes."""

    def __init__(self, core: Core, installed: Mapping[int, Link]) -> None:
        """installed: see `Members`."""
        self._core = core
        self._installed = installed
        self._plan = TwoLevelPlan()
        self._closed: set[int] = set()  # sources whose relays are not open in this epoch yet
        self._mappings: dict[tuple[int, int], _Mapping] = {}  # by sibling and source

    def begin_epoch(self, plan: TwoLevelPlan) -> None:
        self._plan = plan
        self._closed = set(plan.into)

    def export_memory(self, link: NixlLink) -> None:
        """Tell siblings where the memory of an own link lies."""
        memory = link.memory
        line = _LINE.pack(
            link.inbox_offset, link.outbox_offset, link.address.nonce, memory.nonce, memory.fd
        )
        self._write_line(link.peer, line)

    def forget(self, peer: int) -> None:
        """A link goes: nobody's rows are being read here."""
        if isinstance(self._installed.get(peer), NixlLink):
            self._write_line(peer, bytes(_LINE.size))
        for sibling, source in [pair for pair in self._mappings if peer in pair]:
            self._unmap(sibling, source)

    def open(self) -> None:
        """After the waiting half of a dispatch: map what merged rows of it need.

        Raises:
            RankLost: the process of a sibling has ended meanwhile.
            CommError: a sibling exports no such memory.
        """
        b, rank = self._core.b, self._core.rank
        for source in [s for s in self._closed if lib.fx_is_merged(b, s)]:
            gateway = self._plan.into[source]
            if gateway == rank:
                for sibling in self._plan.siblings:
                    b.sibling_outbox[sibling * MAX_CAPACITY + source] = self._map(sibling, source)
            else:
                b.gateway_inbox[source] = self._map(gateway, source)
            self._closed.discard(source)

    def close(self) -> None:
        for sibling, source in list(self._mappings):
            self._unmap(sibling, source)

    def _map(self, sibling: int, source: int) -> int:
        """The sibling's memory for a source: the inbox if the sibling is the gateway, else the
        outbox."""
        line, inbox = self._read_line(sibling, source), sibling == self._plan.into[source]
        known = self._mappings.get((sibling, source))
        if known is not None and (known.line, known.inbox) == (line, inbox):
            return known.at
        if known is not None:
            self._unmap(sibling, source)
        try:
            at = self._map_line(sibling, source, line, inbox=inbox)
        except (PeerUnreachable, OSError) as error:
            core = self._core
            core.set_gone(sibling, BROKEN_LINK)
            why = {sibling: WHY[core.gone(sibling)]}
            raise RankLost((sibling,), PHASES[DISPATCH], core.epoch, why) from error
        self._mappings[sibling, source] = _Mapping(line, inbox, at)
        return at

    def _map_line(self, sibling: int, source: int, line: bytes, *, inbox: bool) -> int:
        inbox_at, outbox_at, peer_nonce, nonce, number = _LINE.unpack(line)
        if peer_nonce != self._installed[source].address.nonce:
            raise self._core.nonsense(
                sibling, f"nothing about its link to rank {source}, whose rows it shares"
            )
        offset = inbox_at if inbox else outbox_at
        size = self._core.window.layout.place_bytes
        address = self._installed[sibling].address
        fd = open_link_memory(
            sibling, pid=address.pid, started=address.started, fd=number, nonce=nonce
        )
        try:
            # what lies behind the end of the file would end this process when it is read
            if offset < PAGE or offset % PAGE or offset + size > os.fstat(fd).st_size:
                raise self._core.nonsense(sibling, f"a wrong place of its link to rank {source}")
            at = int(lib.fx_map_to_read(fd, offset, size))
        finally:
            os.close(fd)
        if at == 0:
            raise CommError(f"cannot map {size} bytes of a link: {os.strerror(ffi.errno)}")
        return at

    def _unmap(self, sibling: int, source: int) -> None:
        b = self._core.b
        mapping = self._mappings.pop((sibling, source))
        b.sibling_outbox[sibling * MAX_CAPACITY + source] = 0
        if b.gateway_inbox[source] == mapping.at:
            b.gateway_inbox[source] = 0
        lib.fx_unmap(mapping.at, self._core.window.layout.place_bytes)

    def _write_line(self, peer: int, line: bytes) -> None:
        control = self._core.b.control[self._core.rank]
        ffi.memmove(ffi.cast("char *", control + LINK_MEMORY_AT + peer * LINE), line, len(line))

    def _read_line(self, sibling: int, peer: int) -> bytes:
        at = self._core.b.control[sibling] + LINK_MEMORY_AT + peer * LINE
        return bytes(ffi.buffer(ffi.cast("char *", at), _LINE.size))
