"""Peers on other machines: what kernels left for them leaves here, and what they send is taken.

To the kernels of a rank such a peer looks like any other. They write its rows and raise its flags
in a `HostLane` that stands in for its window; a thread sees a flag there, packs what it stands for
(lane_packing.py), and writes it into the peer's memory over NIXL. The peer's thread lays it out in
another lane, the flag last, where kernels wait for it and take it (lane_kernels.py). So nothing of
this is captured in graphs, whoever waits is a kernel that waits for a flag, as between GPUs of one
machine, and the thread needs nothing of the GPU.

An exchange goes through one link in messages of five kinds, one for each flag. Each kind with bytes
has an area of its own in inbox and outbox. An area is used again only when the peer has taken what
was in it: every message tells how many the sender of it has taken. Where exchanges follow one
another that is known without a message of its own; a peer that has nothing to send says so.

Flags carry the tag of epoch, link and exchange. What belongs to an exchange that was given up has
an old one: it is thrown away here where it would be put at places that are no longer known, and is
not looked at by kernels where it was put into the window.
"""

from __future__ import annotations

import struct
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor

from flexpert.comm import rendezvous
from flexpert.comm.bounded import StoreKeys
from flexpert.comm.buffer import BufferSpec
from flexpert.comm.cuda.cuda_layout import (
    COMBINE_FLAGS_AT,
    COMBINE_FORMATS_AT,
    DISPATCH_FLAGS_AT,
    DISPATCH_FORMATS_AT,
    LANES,
    MAX_TOKENS,
    MEETING_FLAGS_AT,
    RELEASE_FLAGS_AT,
    SEQUENCE_SHIFT,
    WEIGHTS_FLAGS_AT,
)
from flexpert.comm.cuda.host_lane import HostLane
from flexpert.comm.cuda.lane_packing import Dispatched, LanePacking
from flexpert.comm.errors import CommError
from flexpert.comm.host.nixl import Endpoint, NixlEndpointLink
from flexpert.comm.window_layout import spec_hash

_PREFIX = "flexpert/lanes"  # of keys
_MESSAGE = struct.Struct("<BxHIqqQQ")  # kind, 0, 0, rows, flag, format, number, taken
_TAKEN: Final = 255  # as a kind: nothing but what was taken
_NAP_S = 0.00005
_QUIET_NAP_S = 0.001
_LATELY_S = 0.02  # after a message, another one may come soon
_PROBE_S = 0.01
_SAY_TAKEN_S = 0.002  # what was taken is said by then, if nothing else is


@dataclass(frozen=True, slots=True)
class _Kind:
    """A kind of message. flags_at: of its flags in a window. format_at: of its formats, or -1."""

    flags_at: int
    format_at: int = -1

    @property
    def number(self) -> int:
        return self.flags_at // (LANES * 8)


_DISPATCH = _Kind(DISPATCH_FLAGS_AT, DISPATCH_FORMATS_AT)
_COMBINE = _Kind(COMBINE_FLAGS_AT, COMBINE_FORMATS_AT)
_MEETING = _Kind(MEETING_FLAGS_AT)
_RELEASE = _Kind(RELEASE_FLAGS_AT)
_WEIGHTS = _Kind(WEIGHTS_FLAGS_AT)
_KINDS = (_COMBINE, _DISPATCH, _WEIGHTS, _MEETING, _RELEASE)
_BY_NUMBER = {kind.number: kind for kind in _KINDS}


@dataclass(slots=True)
class _Area:
    """Of outbox and inbox. last: number of the message that used it last."""

    at: int
    last: int = 0


@dataclass(slots=True, eq=False)
class _Far:
    """One peer.

    lane: where kernels write for it. landing: what came from it, which kernels take.
    flags, came_flags: [kinds, LANES] int64, in the two. seen: flags that have been sent.
    sent, came: the dispatches under way.
    number: of messages with bytes that were sent; taken: of those, known to be taken; mine: taken
    of the peer's; told: of those, said. owed: since when something was not said.
    """

    peer: int
    link: NixlEndpointLink
    lane: HostLane
    landing: HostLane
    areas: dict[int, _Area]
    flags: Tensor
    came_flags: Tensor
    seen: dict[int, int] = field(default_factory=dict)
    sent: Dispatched | None = None
    came: Dispatched | None = None
    number: int = 0
    taken: int = 0
    mine: int = 0
    told: int = 0
    owed: float = 0.0
    broken: str = ""


class Forwarder:
    """The links of one rank to ranks on other machines, and the thread that serves them."""

    def __init__(
        self,
        rank: int,
        spec: BufferSpec,
        device: torch.device,
        *,
        choices: int,
        broken: Callable[[int, str], None],
    ) -> None:
        """
        Args:
            choices: rows of results a token; see `layout`.
            broken: told, in the thread, that a link is, and why.

        Raises: CommError: NIXL is missing.
        """
        self._rank = rank
        self._spec = spec
        self._choices = choices
        self._device = device
        self._broken = broken
        self._packing = LanePacking(spec, choices)
        self._endpoint = Endpoint(f"flexpert-lanes-{rank}")
        self._peers: dict[int, _Far] = {}
        self._busy = threading.RLock()  # a round of the thread, or a change of the peers
        self._changed = threading.Condition()
        self._meeting = 0
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="flexpert-lanes", daemon=True)
        self._thread.start()

    def connect(
        self,
        store: StoreKeys,
        peers: Iterable[int],
        *,
        timeout_s: float,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> dict[int, FarWindow]:
        """Meet `peers`, who call this in turn; where to write for each, and where it writes.

        Raises: as `rendezvous.meet`.
        """
        with self._changed:
            self._meeting += 1
            self._changed.notify_all()
        try:
            ids = rendezvous.meet(
                store, self._rank, peers, _Meeting(self), timeout_s=timeout_s,
                cancelled=cancelled, prefix=_PREFIX,
            )  # fmt: skip
        finally:
            with self._changed:
                self._meeting -= 1
        with self._busy:
            far = {peer: self._peers[peer] for peer in ids}
        return {peer: FarWindow(each.lane, each.landing) for peer, each in far.items()}

    def disconnect(self, peer: int) -> None:
        """Nothing is sent to this peer any more, and nothing of it is taken. Its lanes stay, until
        whoever has them closes them."""
        with self._busy:
            far = self._peers.pop(peer, None)
        if far is not None:
            far.link.close()

    def bytes_written(self) -> dict[int, int]:
        """To each peer so far, as long as it is connected."""
        with self._busy:
            return {peer: far.link.bytes_written for peer, far in self._peers.items()}

    def close(self) -> None:
        """End the thread and all links; idempotent. Lanes stay."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            self._changed.notify_all()
        self._thread.join()
        for peer in list(self._peers):
            self.disconnect(peer)
        self._endpoint.close()

    # ---- the thread -----------------------------------------------------------------------------

    def _run(self) -> None:
        moved_at = probed = 0.0
        while self._wanted():
            with self._busy:
                moved = self._round()
                now = time.monotonic()
                if now - probed > _PROBE_S:
                    probed = now
                    self._probe()
            if moved:
                moved_at = now
            else:
                time.sleep(_NAP_S if now - moved_at < _LATELY_S else _QUIET_NAP_S)

    def _wanted(self) -> bool:
        """Sleeps until there is something to do; False: it is closed."""
        with self._changed:
            while not self._closed and not self._peers and not self._meeting:
                self._changed.wait()
            return not self._closed

    def _round(self) -> bool:
        """Send what is due and take what came; whether there was anything."""
        moved = False
        for far in self._peers.values():
            if not far.broken:
                try:
                    moved |= self._send(far)
                    far.link.check()
                except CommError as error:
                    self._break(far, str(error))
        by_agent = {far.link.peer: far for far in self._peers.values() if not far.broken}
        for agent, message in self._endpoint.poll():
            moved = True
            taker = by_agent.get(agent)
            if taker is None or taker.broken:
                continue
            try:
                self._take(taker, message)
            except (ValueError, struct.error) as error:
                self._break(taker, f"it sent nonsense: {error}")
            except CommError as error:
                self._break(taker, str(error))
        return moved

    def _probe(self) -> None:
        for far in self._peers.values():
            if not far.broken:
                try:
                    far.link.probe()
                except CommError as error:
                    self._break(far, str(error))

    def _break(self, far: _Far, why: str) -> None:
        far.broken = why
        self._broken(far.peer, why)

    # ---- sending --------------------------------------------------------------------------------

    def _send(self, far: _Far) -> bool:
        flags = far.flags[:, self._rank].tolist()
        moved = False
        for kind in _KINDS:
            flag = flags[kind.number]
            if flag != far.seen.get(kind.number, 0):
                moved |= self._send_one(far, kind, flag)
        if far.mine > far.told and not moved:
            now = time.monotonic()
            far.owed = far.owed or now
            if now - far.owed >= _SAY_TAKEN_S:
                self._tell(far, _TAKEN, 0, 0, 0)
        return moved

    def _send_one(self, far: _Far, kind: _Kind, flag: int) -> bool:
        """Whether it was: its area may still be in use, its exchange given up."""
        area = far.areas.get(kind.number)
        if area is not None and area.last > far.taken:
            return False
        far.seen[kind.number] = flag
        word = 0 if kind.format_at < 0 else self._format(far, kind)
        rows = size = 0
        packing, tag = self._packing, flag >> SEQUENCE_SHIFT
        into = far.link.outbox + (area.at if area else 0)
        if kind is _DISPATCH:
            far.sent, rows, size = packing.pack_dispatch(
                far.lane, tag, flag & MAX_TOKENS, word, into
            )
        elif kind is _WEIGHTS:
            if far.sent is None or far.sent.tag != tag:
                return False
            size = packing.pack_weights(far.lane, far.sent, into)
        elif kind is _COMBINE:
            if far.came is None or far.came.tag != tag:
                return False
            rows, size = packing.pack_combine(far.lane, far.came, word, into)
        if area is None or size == 0:
            self._tell(far, kind.number, rows, flag, word)
            return True
        far.number += 1
        area.last = far.number
        message = self._message(far, kind.number, rows, flag, word, far.number)
        far.link.write(area.at, size, message)
        return True

    def _format(self, far: _Far, kind: _Kind) -> int:
        at = kind.format_at + self._rank * 8
        return int(far.lane.view(at, 1, torch.int64)[0])

    def _tell(self, far: _Far, kind: int, rows: int, flag: int, word: int) -> None:
        far.link.notify(self._message(far, kind, rows, flag, word, 0))

    def _message(self, far: _Far, kind: int, rows: int, flag: int, word: int, number: int) -> bytes:
        far.told, far.owed = far.mine, 0.0
        return _MESSAGE.pack(kind, 0, rows, flag, word, number, far.mine)

    # ---- taking ---------------------------------------------------------------------------------

    def _take(self, far: _Far, message: bytes) -> None:
        """Raises: ValueError, struct.error: nonsense."""
        number_of_kind, _, rows, flag, word, number, taken = _MESSAGE.unpack(message)
        if not far.taken <= taken <= far.number:
            raise ValueError(f"{taken} messages taken of {far.number}")
        far.taken = taken
        if number_of_kind == _TAKEN:
            return
        kind = _BY_NUMBER.get(number_of_kind)
        if kind is None or flag < 0:
            raise ValueError(f"a message of kind {number_of_kind}")
        laid_out = self._lay_out(far, kind, rows, flag, word)
        if number:
            if number <= far.mine:
                raise ValueError(f"message {number} again")
            far.mine = number
        if laid_out:
            far.came_flags[kind.number, far.peer] = flag

    def _lay_out(self, far: _Far, kind: _Kind, rows: int, flag: int, word: int) -> bool:
        """Whether it is of an exchange that was not given up."""
        packing, tag = self._packing, flag >> SEQUENCE_SHIFT
        area = far.areas.get(kind.number)
        source = far.link.inbox + (area.at if area else 0)
        if kind is _DISPATCH:
            far.came = packing.unpack_dispatch(
                source, tag, flag & MAX_TOKENS, word, rows, far.landing
            )
        elif kind is _WEIGHTS:
            if far.came is None or far.came.tag != tag:
                return False
            packing.unpack_weights(source, far.came, far.landing)
        elif kind is _COMBINE:
            if far.sent is None or far.sent.tag != tag:
                return False
            packing.unpack_combine(source, far.sent, word, rows, far.landing)
        return True

    # ---- links ----------------------------------------------------------------------------------

    def _link(self) -> NixlEndpointLink:
        packing = self._packing
        size = packing.dispatch_bytes + packing.weights_bytes + packing.combine_bytes
        return self._endpoint.link(size, clear=0)

    def _add(self, peer: int, link: NixlEndpointLink, offer: bytes) -> None:
        """Raises: what `NixlEndpointLink.open` raises; OSError, CudaError: no memory."""
        lane = HostLane(self._spec, self._choices, self._device)
        try:
            landing = HostLane(self._spec, self._choices, self._device)
        except BaseException:
            lane.close()
            raise
        packing = self._packing
        areas = {
            _DISPATCH.number: _Area(0),
            _WEIGHTS.number: _Area(packing.dispatch_bytes),
            _COMBINE.number: _Area(packing.dispatch_bytes + packing.weights_bytes),
        }
        self.disconnect(peer)
        try:
            with self._busy:  # the thread must know whose the first message is
                link.open(offer)
                self._peers[peer] = _Far(
                    peer, link, lane, landing, areas, _flags_of(lane), _flags_of(landing)
                )
        except BaseException:
            lane.close()
            landing.close()
            raise
        with self._changed:
            self._changed.notify_all()


@dataclass(frozen=True, slots=True)
class FarWindow:
    """What stands in for the window of a rank on another machine, and for this one towards it."""

    lane: HostLane
    landing: HostLane
    elsewhere: bool = True

    @property
    def address(self) -> int:
        return self.lane.address

    @property
    def inbox(self) -> int:
        """Where what it sends comes; 0 after `close`."""
        return self.landing.address

    def close(self) -> None:
        """Once nothing that was launched uses it, and its rank is disconnected."""
        self.lane.close()
        self.landing.close()


def _flags_of(lane: HostLane) -> Tensor:
    return lane.view(0, len(_KINDS) * LANES, torch.int64).view(len(_KINDS), LANES)


class _Meeting:
    """`rendezvous.Host` of a `Forwarder`."""

    def __init__(self, forwarder: Forwarder) -> None:
        self._forwarder = forwarder
        self._links: dict[int, NixlEndpointLink] = {}

    def greet(self) -> bytes:
        return spec_hash(self._forwarder._spec)

    def prepare(self, peer: int, greeting: bytes) -> bytes:
        if greeting != self.greet():
            raise ValueError(f"rank {peer} has a window of another spec than this one")
        self.forget(peer)
        self._links[peer] = self._forwarder._link()
        return self._links[peer].offer

    def open(self, peer: int, details: bytes) -> None:
        self._forwarder._add(peer, self._links[peer], details)
        del self._links[peer]

    def forget(self, peer: int) -> None:
        link = self._links.pop(peer, None)
        if link is not None:
            link.close()
