"""Peers behind NIXL: one-sided writes and short messages to processes on other machines.

A `NixlEndpointLink` is one peer: memory of ours that only it writes (`inbox`), and memory of ours
(`outbox`) that is written to the same offsets of the inbox it exports us. An `Endpoint` is the NIXL
agent that all links of a buffer share. No call waits for a peer, but for `close`, which has a
limit.

What NIXL 1.5 with UCX does not promise, measured, and what is done about it here:

- A write's notification leaves when its transfer is seen to be complete, so that of a later write,
  or a plain one, overtakes it. Messages are numbered, and put in order where they arrive.
- Closing a connection or deregistering memory does not stop a peer: over TCP and process_vm_writev
  nobody checks its key. Memory that was exported is exported again only after the writer's last
  word; if that never comes, its addresses stay reserved as long as the process lives.
- Memory registered anew at an old address is refused by agents that know the old key. What is
  registered stays so until the endpoint closes, and is used again.
- Removing a live remote agent leaves a socket open on both sides. It stays loaded until it is dead.
- A dead peer shows in the next post only. A write of zero bytes is a post that sends nothing.
- Its progress thread spins; without it, everything moves in `poll`.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import logging
import os
import secrets
import struct
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import msgspec

from flexpert.comm.errors import ChannelDown, CommError, PeerUnreachable
from flexpert.comm.host.link_memory import LinkMemory

MESSAGE_BYTES = 128

_CLOSE_S = 0.05  # of waiting in one close, for what is under way
_GOODBYE_S = 0.005  # of it, for the last word to leave
_NAP_S = 0.0002
_QUIET_S = 0.1  # a NIC learns of a dead peer from traffic only: probe with a message this often
_IDLE_TRANSFERS = 32  # prepared ones that a link keeps

_LOG_LEVELS = ("NIXL_LOG_LEVEL", "UCX_LOG_LEVEL")
_MODULES = ("nixl", "nixl_cu13", "nixl_cu12")  # the first picks one of the others
_HEADER = struct.Struct("<8sQB")  # the receiver's token, number, kind
_DATA, _GOODBYE = 0, 1
_NUDGE = b"\0"  # too short for a message: thrown away where it arrives


class LinkBroken(PeerUnreachable):
    """The connection to a peer has failed: its process or its machine is gone.

    Attributes:
        peer: name of the peer's agent.
    """

    def __init__(self, peer: str, why: str) -> None:
        super().__init__(f"the NIXL link to {peer} is broken: {why}")
        self.peer = peer


class NixlOffer(msgspec.Struct, frozen=True, array_like=True):
    """What a peer needs to write into an inbox."""

    agent: str
    metadata: bytes  # how to reach the agent, and the keys of the inbox
    at: int
    size: int
    token: bytes


@dataclass(frozen=True, slots=True)
class _Nixl:
    agent: Any
    config: Any
    errors: tuple[type[Exception], ...]


@functools.cache
def load() -> _Nixl:
    """The library, of whichever CUDA version; host memory needs no GPU and no CUDA.

    Raises: CommError: it is not installed.
    """
    reasons: list[str] = []
    for name in _MODULES:
        try:
            with _silence():
                api = importlib.import_module(name)
                bindings = importlib.import_module(f"{name}._bindings")
        except ImportError as error:
            reasons.append(str(error))
            continue
        kinds = (getattr(bindings, kind) for kind in dir(bindings) if kind.endswith("Error"))
        return _Nixl(api.nixl_agent, api.nixl_agent_config, tuple(kinds))
    raise CommError(
        f"a peer on another machine needs NIXL: pip install 'flexpert[nixl]' ({'; '.join(reasons)})"
    )


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """NIXL and UCX log to stdout and stderr what is also raised, unless these are set when they
    are loaded. NIXL changes Python's logging, too."""
    raise_exceptions = logging.raiseExceptions
    ours = [name for name in _LOG_LEVELS if name not in os.environ]
    os.environ.update(dict.fromkeys(ours, "FATAL"))
    try:
        yield
    finally:
        logging.raiseExceptions = raise_exceptions
        for name in ours:
            del os.environ[name]


@contextlib.contextmanager
def _of_the_host() -> Iterator[None]:
    """All memory here is the host's. UCX need not ask CUDA about each piece, which may have to wait
    for a kernel that waits for just this piece."""
    own = "UCX_TLS" not in os.environ
    if own:
        os.environ["UCX_TLS"] = "^cuda"
    try:
        yield
    finally:
        if own:
            del os.environ["UCX_TLS"]


class _Region:
    """Own memory that is registered as long as its endpoint lives."""

    def __init__(
        self, size: int, memory: LinkMemory, agent: Any, errors: tuple[type[Exception], ...]
    ) -> None:
        """Raises: CommError"""
        self._memory = memory
        self.offset, self.at = memory.take(size)
        self.size = size
        try:
            self.registration = agent.register_memory([(self.at, size, 0, "")], "DRAM")
        except errors as error:
            self.unmap()
            raise CommError(
                f"NIXL cannot register {size} bytes ({error}); with RDMA this needs a higher limit "
                "of locked memory (ulimit -l)"
            ) from error

    def clear(self, size: int) -> None:
        ctypes.memset(self.at, 0, min(size, self.size))

    def unmap(self) -> None:
        self._memory.give_back(self.offset, self.at, self.size)

    def forsake(self) -> None:
        """Give the memory back, but not the addresses: it was exported to a peer that never said it
        was done, so that nothing else must get them."""
        self._memory.empty(self.offset, self.size)


class _Remote:
    """Another agent that ours knows, and a write of zero bytes to it: it tells whether it lives."""

    def __init__(self, name: str, empty: Any) -> None:
        self.name = name
        self.links = 0
        self.dead = ""  # why
        self.empty = empty
        self.posted = False

    def flushed(self, agent: Any, errors: tuple[type[Exception], ...]) -> bool:
        """Whether all that was sent has left. Notices that the agent is dead."""
        if self.dead:
            return True
        try:
            if self.posted:
                state = agent.check_xfer_state(self.empty)
            else:
                state = agent.transfer(self.empty)
        except errors as error:
            self.dead = str(error)
            return True
        self.posted = state == "PROC"
        return not self.posted


class Endpoint:
    """One NIXL agent, and the memory and the links that belong to it.

    Calls may come from several threads.

    memory: of all inboxes and outboxes.
    """

    def __init__(self, name: str) -> None:
        """
        Args:
            name: how the agent's begins; the rest makes it different from those of all others that
                ever lived, for peers may not have noticed yet that an earlier one ended.

        Raises: CommError: NIXL is missing or has no UCX.
        """
        nixl = load()
        self.name = f"{name}-{secrets.token_hex(4)}"
        self._errors = nixl.errors
        self._lock = threading.RLock()
        self._free: dict[int, list[_Region]] = {}  # size → registered, and nobody writes them
        self._links: dict[bytes, NixlEndpointLink] = {}  # token → those whose peer may still write
        self._ripe: set[NixlEndpointLink] = set()  # may have messages to hand out
        self._remotes: dict[str, _Remote] = {}
        try:
            with _silence(), _of_the_host():
                self._agent = nixl.agent(self.name, nixl.config(enable_prog_thread=False))
        except self._errors as error:
            raise ChannelDown(f"NIXL cannot start: {error}") from error
        if "UCX" not in self._agent.backends:
            raise CommError("this installation of NIXL has no UCX plugin")
        self.memory = LinkMemory()

    def link(self, size: int, *, clear: int | None = None) -> NixlEndpointLink:
        """Memory for a new peer; `NixlEndpointLink.open` connects.

        Args:
            size: bytes of the inbox and of the outbox, the same on both sides.
            clear: bytes at the start of both that must be zero; default: all. The rest is what
                earlier links left.

        Raises: CommError: no memory, or the endpoint is closed.
        """
        with self._lock:
            agent = self._require_agent()
            self._sweep()
            inbox = self._take(size, clear)
            try:
                outbox = self._take(size, clear)
            except CommError:
                self._free[size].append(inbox)
                raise
            token = secrets.token_bytes(8)
            metadata = agent.get_partial_agent_metadata(inbox.registration, True, ["UCX"])
            offer = NixlOffer(self.name, metadata, inbox.at, size, token)
            link = NixlEndpointLink(self, inbox, outbox, offer)
            self._links[token] = link
            return link

    def poll(self) -> list[tuple[str, bytes]]:
        """Make progress on everything; returns the new messages of open links as (name of the
        peer's agent, message), those of a link in the order in which they were sent."""
        with self._lock:
            if self._agent is None:
                return []
            self._gather()
            arrived: list[tuple[str, bytes]] = []
            while self._ripe:
                link = self._ripe.pop()
                arrived += [(link.peer, message) for message in link._take_messages()]
                if link.closed and link._peer_done and link._token in self._links:
                    self._recycle(link)
            return arrived

    def close(self) -> None:
        """Close all links and the agent; idempotent. Waits a moment for the peers to hear of it,
        and for their last words."""
        deadline = time.monotonic() + _CLOSE_S
        with self._lock:
            links = list(self._links.values())
        for link in links:
            link.close(deadline)
        while not self._quiet() and time.monotonic() < deadline:
            self.poll()
            time.sleep(_NAP_S)
        with self._lock:
            if self._agent is None:
                return
            for link in self._links.values():
                link._inbox.forsake()
            for remote in list(self._remotes.values()):
                self._remove_remote(remote)
            self._links.clear()
            self._ripe.clear()
            self._agent = None  # nothing refers to it any more: it ends here
            for regions in self._free.values():
                for region in regions:
                    region.unmap()
            self._free.clear()
            self.memory.close()

    # ---- what links use, under the lock -------------------------------------------------------

    def _require_agent(self) -> Any:
        if self._agent is None:
            raise CommError(f"NIXL endpoint {self.name} is closed")
        return self._agent

    def _add_remote(self, offer: NixlOffer, outbox: _Region) -> _Remote:
        """Raises: PeerUnreachable"""
        agent = self._require_agent()
        known = self._remotes.get(offer.agent)
        if known and known.flushed(agent, self._errors) and known.dead:
            if known.links:
                raise LinkBroken(offer.agent, f"{known.dead}; an older link must be closed first")
            self._remove_remote(known)
        try:
            agent.add_remote_agent(offer.metadata)
            if offer.agent not in self._remotes:
                empty = self._transfer(outbox.at, offer.at, 0, offer.agent)
                self._remotes[offer.agent] = _Remote(offer.agent, empty)
        except self._errors as error:
            raise PeerUnreachable(f"NIXL cannot reach {offer.agent}: {error}") from error
        remote = self._remotes[offer.agent]
        remote.links += 1
        return remote

    def _remove_remote(self, remote: _Remote) -> None:
        del self._remotes[remote.name]
        self._release(remote.empty)
        remote.empty = None  # links refer to it, and it would keep the agent from ending
        with contextlib.suppress(*self._errors):
            self._agent.remove_remote_agent(remote.name)

    def _transfer(self, source: int, target: int, size: int, peer: str) -> Any:
        agent = self._agent
        return agent.initialize_xfer(
            "WRITE",
            agent.get_xfer_descs([(source, size, 0)], "DRAM"),
            agent.get_xfer_descs([(target, size, 0)], "DRAM"),
            peer,
        )

    def _release(self, handle: Any) -> None:
        with contextlib.suppress(*self._errors):
            handle.release()

    def _take(self, size: int, clear: int | None) -> _Region:
        free = self._free.setdefault(size, [])
        if not free:
            return _Region(size, self.memory, self._agent, self._errors)
        region = free.pop()
        region.clear(size if clear is None else clear)
        return region

    def _recycle(self, link: NixlEndpointLink) -> None:
        """The peer will not write into the inbox any more. Once for each link, though a `poll` in
        another thread and the end of `close` may both come to it."""
        if self._links.pop(link._token, None) is not None:
            self._free[link.size].append(link._inbox)

    def _gather(self) -> None:
        """See what has left, and what has come."""
        for link in self._links.values():
            if link._flying:
                link._settle()
        for messages in self._agent.get_new_notifs().values():
            for message in messages:
                self._accept(message)

    def _sweep(self) -> None:
        """Forget agents that have died, and what was exported to them."""
        for remote in list(self._remotes.values()):
            remote.flushed(self._agent, self._errors)
            if not remote.dead or remote.links:
                continue
            self._gather()  # its last words may have come, and nobody has polled since
            self._remove_remote(remote)
            for link in [link for link in self._links.values() if link.peer == remote.name]:
                link._take_messages()
                if link._peer_done:
                    self._recycle(link)
                    continue
                del self._links[link._token]
                with contextlib.suppress(*self._errors):
                    self._agent.deregister_memory(link._inbox.registration)
                link._inbox.forsake()

    def _accept(self, message: bytes) -> None:
        if len(message) < _HEADER.size:
            return
        token, number, kind = _HEADER.unpack_from(message)
        link = self._links.get(token)
        if link is not None and number >= link._received:
            link._pending[number] = (kind, message[_HEADER.size :])
            self._ripe.add(link)

    def _quiet(self) -> bool:
        """All has been said, on both sides, that will be."""
        with self._lock:
            if self._agent is None:
                return True
            flushed = [r.flushed(self._agent, self._errors) for r in self._remotes.values()]
            alive = {remote.name for remote in self._remotes.values() if not remote.dead}
            return all(flushed) and not any(link.peer in alive for link in self._links.values())


class NixlEndpointLink:
    """One peer. Made by `Endpoint.link`.

    Attributes:
        offer: what the peer needs to `open` its side.
        inbox, outbox: their addresses.
        inbox_offset, outbox_offset: where they lie in the endpoint's memory.
        size: of each, bytes.
        bytes_written: to the peer so far, messages included.
        peer: name of the peer's agent; "" until `open`.
    """

    def __init__(
        self, endpoint: Endpoint, inbox: _Region, outbox: _Region, offer: NixlOffer
    ) -> None:
        self.offer = msgspec.msgpack.encode(offer)
        self.inbox = inbox.at
        self.outbox = outbox.at
        self.inbox_offset = inbox.offset
        self.outbox_offset = outbox.offset
        self.bytes_written = 0
        self.size = offer.size
        self.peer = ""
        self.closed = False
        self._endpoint = endpoint
        self._inbox = inbox
        self._outbox = outbox
        self._token = offer.token
        self._theirs: NixlOffer | None = None
        self._remote: _Remote | None = None
        self._broken = ""
        self._sent = 0
        self._spoke = 0.0
        self._idle: dict[tuple[int, int], Any] = {}  # (offset, size) → prepared transfer
        self._flying: deque[tuple[tuple[int, int], Any]] = deque()
        self._received = 0
        self._pending: dict[int, tuple[int, bytes]] = {}  # number → (kind, message)
        self._peer_done = False

    def open(self, offer: bytes) -> None:
        """Connect to what the peer exports. Does not wait for the peer.

        Raises:
            PeerUnreachable: NIXL refuses.
            ValueError: not an offer, of another size, or the link is open or closed.
        """
        try:
            theirs = msgspec.msgpack.decode(offer, type=NixlOffer)
        except msgspec.MsgspecError as error:
            raise ValueError(f"not the offer of a NIXL link: {error}") from error
        if theirs.size != self.size:
            raise ValueError(f"{theirs.agent} exports {theirs.size} bytes, expected {self.size}")
        with self._endpoint._lock:
            if self.peer or self.closed:
                raise ValueError("a link is opened once")
            self._remote = self._endpoint._add_remote(theirs, self._outbox)
            self._theirs = theirs
            self.peer = theirs.agent
            self._endpoint._ripe.add(self)

    def write(self, offset: int, size: int, message: bytes) -> None:
        """Send outbox[offset : offset + size], then `message`; both arrive in the peer's `poll`.

        Returns at once; the bytes must stay unchanged until the peer has them.

        Raises:
            LinkBroken
            ValueError: outside the memory, or a message of more than 128 bytes.
        """
        if offset < 0 or size < 1 or offset + size > self.size:
            raise ValueError(f"bytes {offset} to {offset + size} of a link of {self.size}")
        with self._endpoint._lock:
            theirs = self._require_open()
            words = self._words(_DATA, message)
            part = (offset, size)
            transfer = self._idle.pop(part, None)
            try:
                if transfer is None:
                    transfer = self._endpoint._transfer(
                        self.outbox + offset, theirs.at + offset, size, self.peer
                    )
                state = self._endpoint._agent.transfer(transfer, words)
            except self._endpoint._errors as error:
                if transfer is not None:
                    self._endpoint._release(transfer)
                raise self._break(error) from error
            self.bytes_written += size + len(words)
            if state == "DONE":
                self._keep(part, transfer)
            else:
                self._flying.append((part, transfer))

    def notify(self, message: bytes) -> None:
        """Send only a message.

        Raises:
            LinkBroken
            ValueError: more than 128 bytes.
        """
        with self._endpoint._lock:
            self._require_open()
            self._send(self._words(_DATA, message))

    def check(self) -> None:
        """Raises: LinkBroken: known since the last `write`, `notify`, `poll` or `probe`."""
        if self._broken:
            raise LinkBroken(self.peer, self._broken)

    def probe(self) -> None:
        """Find out whether the peer's process lives, in a few microseconds; sends next to nothing.

        Raises: LinkBroken
        """
        with self._endpoint._lock:
            self._require_open()
            assert self._remote is not None
            self._remote.flushed(self._endpoint._agent, self._endpoint._errors)
            if self._remote.dead:
                self._broken = self._broken or self._remote.dead
                self.check()
            if time.monotonic() - self._spoke > _QUIET_S:
                self._send(_NUDGE)

    def has_ended(self) -> bool:
        """Whether the peer has closed its side; known since the last `poll`."""
        return self._peer_done

    def is_sending(self) -> bool:
        """Whether messages wait for their data to leave; `poll` sends them on."""
        return self._under_way()

    def close(self, deadline: float | None = None) -> None:
        """Finish what is under way and tell the peer; idempotent. Afterwards inbox and outbox must
        not be touched.

        Args:
            deadline: on the monotonic clock; default: in 50 ms.
        """
        deadline = deadline or time.monotonic() + _CLOSE_S
        with self._endpoint._lock:
            if self.closed or self._endpoint._agent is None:
                return
            self.closed = True
        while self._under_way() and time.monotonic() < deadline:
            time.sleep(_NAP_S)
        self._say_goodbye(deadline)
        endpoint = self._endpoint
        with endpoint._lock:
            if endpoint._agent is None:
                return
            if self._remote is not None:
                self._remote.links -= 1
            for transfer in (*self._idle.values(), *(flying for _, flying in self._flying)):
                endpoint._release(transfer)
            self._idle.clear()
            self._flying.clear()
            # What is still under way may read the outbox; it is not unmapped, and what the peer
            # gets then is without a message, so that nobody looks at it.
            endpoint._free[self.size].append(self._outbox)
            if self._peer_done:
                endpoint._recycle(self)
            if self._broken:
                endpoint._sweep()

    def _say_goodbye(self, deadline: float) -> None:
        """And see it off: nobody may poll after a close, and what the peer exported is lost to it
        without the last word."""
        with self._endpoint._lock:
            if self._remote is None or self._flying or self._broken:
                return  # if not all has arrived, the peer must not export_memory its memory again
            try:
                self._send(self._words(_GOODBYE, b""))
            except LinkBroken:
                return
        deadline = min(deadline, time.monotonic() + _GOODBYE_S)
        while not self._has_left() and time.monotonic() < deadline:
            time.sleep(_NAP_S)

    def _has_left(self) -> bool:
        endpoint = self._endpoint
        with endpoint._lock:
            if endpoint._agent is None or self._remote is None:
                return True
            return self._remote.flushed(endpoint._agent, endpoint._errors)

    # ---- under the endpoint's lock ------------------------------------------------------------

    def _require_open(self) -> NixlOffer:
        self.check()
        if self._theirs is None or self.closed:
            raise CommError(f"the NIXL link {self.peer or 'without a peer'} is not open")
        return self._theirs

    def _words(self, kind: int, message: bytes) -> bytes:
        if len(message) > MESSAGE_BYTES:
            raise ValueError(f"a message of {len(message)} bytes, at most {MESSAGE_BYTES}")
        assert self._theirs is not None
        header = _HEADER.pack(self._theirs.token, self._sent, kind)
        self._sent += 1
        return header + message

    def _send(self, words: bytes) -> None:
        self._spoke = time.monotonic()
        try:
            self._endpoint._agent.send_notif(self.peer, words)
        except self._endpoint._errors as error:
            raise self._break(error) from error
        self.bytes_written += len(words)

    def _break(self, error: Exception) -> LinkBroken:
        self._broken = self._broken or str(error)
        return LinkBroken(self.peer, self._broken)

    def _settle(self) -> None:
        """See which transfers are complete; the messages of those leave now."""
        for _ in range(len(self._flying)):
            part, transfer = self._flying.popleft()
            try:
                state = self._endpoint._agent.check_xfer_state(transfer)
            except self._endpoint._errors as error:
                self._break(error)
                self._endpoint._release(transfer)
                continue
            if state == "DONE":
                self._keep(part, transfer)
            else:
                self._flying.append((part, transfer))

    def _under_way(self) -> bool:
        with self._endpoint._lock:
            if self._endpoint._agent is not None:
                self._settle()
            return bool(self._flying) and not self._broken

    def _keep(self, part: tuple[int, int], transfer: Any) -> None:
        if part in self._idle:
            self._endpoint._release(transfer)
            return
        self._idle[part] = transfer
        if len(self._idle) > _IDLE_TRANSFERS:
            self._endpoint._release(self._idle.pop(next(iter(self._idle))))

    def _take_messages(self) -> list[bytes]:
        """Those that have arrived and whose forerunners have, too."""
        messages: list[bytes] = []
        while (self.peer or self.closed) and self._received in self._pending:
            kind, message = self._pending.pop(self._received)
            self._received += 1
            if kind == _GOODBYE:
                self._peer_done = True
            elif not self.closed:
                messages.append(message)
        return messages
