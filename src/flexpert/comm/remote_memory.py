"""Memory of a rank that ranks on other machines read over NIXL, chunk by chunk.

UCX over TCP moves nothing unless both sides make progress, so a reader does not read by itself: it
asks for a chunk, and the owner's thread copies it into the link's outbox and writes it to the
reader's inbox. Several chunks are in flight, so that copying and sending overlap and small pieces
do not wait for each other. The thread naps while this rank reads, meets others or attends to their
requests, and while a link leads to a rank that is about to end; else it sleeps on a condition.
"""

from __future__ import annotations

import contextlib
import ctypes
import struct
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from flexpert.comm import rendezvous
from flexpert.comm.bounded import StoreKeys
from flexpert.comm.errors import CommError, PeerUnreachable
from flexpert.comm.host.nixl import Endpoint, NixlEndpointLink

CHUNK_BYTES = 256 << 10
SILENCE_S = 10.0
"""For how long a peer may send nothing of what was asked for."""
_SLOTS = 8  # chunks in flight
_HEADER = struct.Struct("<BBIQQ")  # kind, slot, bytes, offset, number; a request's region follows
_REQUEST, _ANSWER = 0, 1
_REGION_BYTES = 64  # of a region's name
_NAP_S = 0.0002
_LATELY_S = 0.05  # after a message, another one may come soon
_QUIET_NAP_S = 0.002
_FAREWELL_NAP_S = 0.02  # while nothing but the end of a peer is waited for
_PROBE_S = 0.05
_PREFIX = "flexpert/memory"  # of keys


class ServedMemory(Protocol):
    """Memory of this rank, as its peers may read it. size: bytes."""

    @property
    def size(self) -> int: ...

    def read(self, offset: int, into: Tensor) -> None:
        """Fill [n] uint8 of the host, contiguous, from a byte on. In the server's thread."""


@dataclass(frozen=True, slots=True)
class HostRegion:
    """[size] uint8 of the host, contiguous."""

    memory: Tensor

    @property
    def size(self) -> int:
        return self.memory.numel()

    def read(self, offset: int, into: Tensor) -> None:
        ctypes.memmove(into.data_ptr(), self.memory.data_ptr() + offset, into.numel())


@dataclass(slots=True)
class _Chunk:
    size: int
    offset: int
    number: int
    arrived: bool = False


@dataclass(slots=True)
class _Reader:
    """One peer: its link, and what this side waits for from it."""

    peer: int
    link: NixlEndpointLink
    lock: threading.Lock = field(default_factory=threading.Lock)  # one read at a time
    waiting: dict[int, _Chunk] = field(default_factory=dict)  # slot → what was asked for
    asked: int = 0
    broken: str = ""


class MemoryServer:
    """The memory that this rank lets remote ranks read, and the links to them.

    Calls may come from several threads.
    """

    def __init__(self, rank: int) -> None:
        """Raises: CommError: NIXL is missing."""
        self._rank = rank
        self._endpoint = Endpoint(f"flexpert-memory-{rank}")
        self._regions: dict[str, ServedMemory] = {}
        self._links: dict[int, _Reader] = {}
        self._changed = threading.Condition()
        self._busy = 0  # reads and meetings under way
        self._attends = False
        self._parting: frozenset[int] = frozenset()  # peers whose end is waited for
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="flexpert-memory", daemon=True)
        self._thread.start()

    def export(self, region: str, memory: ServedMemory) -> None:
        """Let peers read it under a name of up to 64 bytes. Raises: ValueError"""
        if not 0 < len(region.encode()) <= _REGION_BYTES:
            raise ValueError(f"the name of a region has 1 to {_REGION_BYTES} bytes, not {region!r}")
        self._regions[region] = memory

    def connect(
        self,
        store: StoreKeys,
        peers: Iterable[int],
        *,
        timeout_s: float,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> tuple[int, ...]:
        """Meet `peers`, who call this in turn; an earlier link to one of them is closed.

        Returns: the ids met. Raises: as `rendezvous.meet`.
        """
        with self._working():
            return rendezvous.meet(
                store,
                self._rank,
                peers,
                _Meeting(self),
                timeout_s=timeout_s,
                cancelled=cancelled,
                prefix=_PREFIX,
            )

    def attend(self) -> None:
        """Answer peers from now on."""
        with self._changed:
            self._attends, self._parting = True, frozenset()
            self._changed.notify_all()

    def rest(self, members: Collection[int]) -> None:
        """Nobody reads here any more until the next `attend`. Links to ranks that are not among
        `members` are closed as soon as these end."""
        with self._changed:
            self._attends = False
            self._parting = frozenset(self._links) - frozenset(members)
            self._changed.notify_all()

    @contextlib.contextmanager
    def _working(self) -> Iterator[None]:
        """The thread makes progress while this is open."""
        with self._changed:
            self._busy += 1
            self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._busy -= 1

    def read_many(
        self,
        peer: int,
        region: str,
        parts: Sequence[tuple[int, Tensor]],
        *,
        timeout_s: float = SILENCE_S,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> None:
        """Fill each [n] uint8 of the host, contiguous, from its byte of the peer's region.

        Args:
            timeout_s: seconds in which at least one chunk must come.
            cancelled: asked now and then; True gives up. The link is cut, as after every failure.

        Raises:
            PeerUnreachable: no link, it broke, or nothing came.
            CommError: cancelled.
        """
        reader = self._links.get(peer)
        if reader is None or reader.broken:
            why = f": {reader.broken}" if reader else ""
            raise PeerUnreachable(f"no link to the memory of rank {peer}{why}")
        with self._taken(reader, cancelled), self._working():
            try:
                self._read(reader, region, parts, timeout_s, cancelled)
            except BaseException as error:  # late chunks must not meet a later read
                self._mark(reader, str(error) or type(error).__name__)
                raise

    def disconnect(self, peer: int) -> None:
        """Close the link to a peer, if there is one."""
        with self._changed:
            reader = self._links.pop(peer, None)
        if reader is not None:
            self._cut(reader, "closed")

    def broken(self) -> dict[int, str]:
        """Peer → why its link was cut."""
        with self._changed:
            return {peer: r.broken for peer, r in self._links.items() if r.broken}

    def close(self) -> None:
        """End the thread and all links; idempotent."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            self._changed.notify_all()
        self._thread.join()
        for reader in list(self._links.values()):
            with reader.lock:  # a read has heard of it, and touches no memory afterwards
                self._mark(reader, "closed")
        self._endpoint.close()

    # ---- the reader's side --------------------------------------------------------------------

    def _read(
        self,
        reader: _Reader,
        region: str,
        parts: Sequence[tuple[int, Tensor]],
        timeout_s: float,
        cancelled: Callable[[], bool],
    ) -> None:
        chunks = _chunks(parts)
        targets: dict[int, Tensor] = {}
        for slot in range(_SLOTS):
            self._ask(reader, slot, region, chunks, targets)
        while targets:
            slot = self._wait(reader, timeout_s, cancelled)
            target, source = targets.pop(slot), reader.link.inbox + slot * CHUNK_BYTES
            ctypes.memmove(target.data_ptr(), source, target.numel())
            self._ask(reader, slot, region, chunks, targets)

    def _ask(
        self,
        reader: _Reader,
        slot: int,
        region: str,
        chunks: Iterator[tuple[int, Tensor]],
        targets: dict[int, Tensor],
    ) -> None:
        part = next(chunks, None)
        if part is None:
            return
        at, targets[slot] = part
        with self._changed:
            reader.asked += 1
            chunk = _Chunk(targets[slot].numel(), at, reader.asked)
            reader.waiting[slot] = chunk
        header = _HEADER.pack(_REQUEST, slot, chunk.size, chunk.offset, chunk.number)
        reader.link.notify(header + region.encode())

    @contextlib.contextmanager
    def _taken(self, reader: _Reader, cancelled: Callable[[], bool]) -> Iterator[None]:
        """The only read of this link. Raises: CommError: cancelled while another one goes on."""
        while not reader.lock.acquire(timeout=_PROBE_S):
            if cancelled():
                raise CommError(f"reading the memory of rank {reader.peer} was cancelled")
        try:
            yield
        finally:
            reader.lock.release()
            if reader.broken:
                self._close_link(reader)

    def _wait(self, reader: _Reader, timeout_s: float, cancelled: Callable[[], bool]) -> int:
        """The slot of the next chunk that has arrived."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while True:
                if cancelled():
                    raise CommError(f"reading the memory of rank {reader.peer} was cancelled")
                for slot, chunk in reader.waiting.items():
                    if chunk.arrived:
                        del reader.waiting[slot]
                        return slot
                if reader.broken or self._closed:
                    raise PeerUnreachable(f"rank {reader.peer}: {reader.broken or 'closed here'}")
                if time.monotonic() >= deadline:
                    raise PeerUnreachable(f"rank {reader.peer} sent nothing for {timeout_s:g} s")
                self._changed.wait(_PROBE_S)

    # ---- the thread ---------------------------------------------------------------------------

    def _run(self) -> None:
        probed = heard = 0.0
        while self._wanted():
            messages = self._endpoint.poll()
            with self._changed:
                readers = {r.link.peer: r for r in self._links.values() if not r.broken}
            for agent, message in messages:
                if agent in readers:
                    self._take(readers[agent], message)
            now = time.monotonic()
            if now - probed > _PROBE_S:
                probed = now
                for reader in readers.values():
                    self._probe(reader)
            if messages:
                heard = now
            else:
                time.sleep(self._nap_s(now - heard))

    def _nap_s(self, quiet_s: float) -> float:
        if self._busy or quiet_s < _LATELY_S:
            return _NAP_S
        return _QUIET_NAP_S if self._attends else _FAREWELL_NAP_S

    def _wanted(self) -> bool:
        """Sleeps until there is something to do; False: the server is closed."""
        with self._changed:
            while not self._closed:
                ended = [p for p in self._parting if p not in self._links or self._links[p].broken]
                for peer in ended:
                    self._links.pop(peer, None)
                self._parting -= frozenset(ended)
                if self._busy or self._attends or self._parting:
                    return True
                self._changed.wait()
            return False

    def _probe(self, reader: _Reader) -> None:
        try:
            reader.link.probe()
            if reader.link.has_ended():
                raise PeerUnreachable(f"rank {reader.peer} has closed the link")
        except CommError as error:
            self._cut(reader, str(error))

    def _take(self, reader: _Reader, message: bytes) -> None:
        try:
            kind, slot, size, offset, number = _HEADER.unpack_from(message)
            if slot >= _SLOTS or not 0 < size <= CHUNK_BYTES:
                raise ValueError(f"slot {slot} with {size} bytes")
            if kind == _REQUEST:
                self._serve(reader, message, slot, size, offset, number)
            elif kind == _ANSWER:
                self._arrive(reader, slot, _Chunk(size, offset, number))
            else:
                raise ValueError(f"kind {kind}")
        except (ValueError, struct.error) as error:
            self._cut(reader, f"rank {reader.peer} sent nonsense: {error}")
        except CommError as error:
            self._cut(reader, str(error))

    def _serve(
        self, reader: _Reader, message: bytes, slot: int, size: int, offset: int, number: int
    ) -> None:
        name = message[_HEADER.size :].decode()
        memory = self._regions.get(name)
        if memory is None:
            raise ValueError(f"no region {name!r}")
        if offset + size > memory.size:
            raise ValueError(f"{size} bytes at {offset} of {memory.size} of region {name!r}")
        at = slot * CHUNK_BYTES
        outbox = (ctypes.c_ubyte * size).from_address(reader.link.outbox + at)
        memory.read(offset, torch.frombuffer(outbox, dtype=torch.uint8))
        reader.link.write(at, size, _HEADER.pack(_ANSWER, slot, size, offset, number))

    def _arrive(self, reader: _Reader, slot: int, chunk: _Chunk) -> None:
        with self._changed:
            if reader.waiting.get(slot) != chunk:
                raise ValueError(f"a chunk that was not asked for, number {chunk.number}")
            reader.waiting[slot].arrived = True
            self._changed.notify_all()

    def _cut(self, reader: _Reader, why: str) -> None:
        self._mark(reader, why)
        self._close_link(reader)

    def _mark(self, reader: _Reader, why: str) -> None:
        with self._changed:
            reader.broken = reader.broken or why
            self._changed.notify_all()

    def _close_link(self, reader: _Reader) -> None:
        """Unless a read is under way, which copies from the inbox: then that does it at its end."""
        if reader.lock.acquire(blocking=False):
            try:
                reader.link.close()
            finally:
                reader.lock.release()


@dataclass(frozen=True, slots=True)
class RemoteMemory:
    """A region of a peer's memory. cancelled: see `MemoryServer.read_many`."""

    server: MemoryServer
    peer: int
    region: str
    cancelled: Callable[[], bool] = lambda: False

    def copy(self, parts: Sequence[tuple[int, Tensor]]) -> None:
        """See `ReadableMemory`; where a part is of a device, by way of the host."""
        staged = [(at, into) for at, into in parts if into.device.type != "cpu"]
        if staged:
            room = torch.empty(sum(len(i) for _, i in staged), dtype=torch.uint8, device="cpu")
            pieces = torch.split(room, [len(into) for _, into in staged])
            self.copy([(at, piece) for (at, _), piece in zip(staged, pieces, strict=True)])
            for (_, into), piece in zip(staged, pieces, strict=True):
                into.copy_(piece)
            parts = [part for part in parts if part[1].device.type == "cpu"]
        self.server.read_many(self.peer, self.region, parts, cancelled=self.cancelled)


class _Meeting:
    """`rendezvous.Host` of a `MemoryServer`."""

    def __init__(self, server: MemoryServer) -> None:
        self._server = server
        self._links: dict[int, NixlEndpointLink] = {}

    def greet(self) -> bytes:
        return b"memory"

    def prepare(self, peer: int, greeting: bytes) -> bytes:
        self.forget(peer)
        self._links[peer] = self._server._endpoint.link(_SLOTS * CHUNK_BYTES, clear=0)
        return self._links[peer].offer

    def open(self, peer: int, details: bytes) -> None:
        link = self._links[peer]
        self._server.disconnect(peer)
        with self._server._changed:  # the thread must know whose the first message is
            link.open(details)
            self._server._links[peer] = _Reader(peer, link)
        del self._links[peer]

    def forget(self, peer: int) -> None:
        link = self._links.pop(peer, None)
        if link is not None:
            link.close()


def _chunks(parts: Sequence[tuple[int, Tensor]]) -> Iterator[tuple[int, Tensor]]:
    for at, into in parts:
        for start in range(0, into.numel(), CHUNK_BYTES):
            yield at + start, into[start : start + CHUNK_BYTES]
