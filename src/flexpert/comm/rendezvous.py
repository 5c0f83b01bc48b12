"""Two ranks meet through any torch `Store`: each learns what it needs to write to the other.

Each side of a pair leaves an offer for the other under a key of its own, and overwrites it:

    nonce     of this attempt
    echo      the nonce of the peer's offer that this one answers; empty at first
    greeting  who and where this rank is
    details   what the peer with that nonce needs to write here

A side is done when it reads an offer that echoes its own nonce: then the peer is alive, means this
very attempt, and has prepared for it. Its own answer lies in the store by then, so the peer will
be done, too; whoever is done deletes the offer it has read. What a dead rank left behind echoes no
nonce of the living, so it completes nothing; a later offer under the same key replaces it.

The last message has no answer, as ever: if a side gives up just when the other is done, the other
holds a link that never comes up, and its first exchange says so.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import msgspec

from flexpert.comm.bounded import BoundedStore, StoreKeys
from flexpert.comm.errors import ChannelDown, CommError, PeerUnreachable, RankTimeout

_FIRST_NAP_S, _LONGEST_NAP_S = 0.001, 0.02
_RENEW_S = 0.25
_NOTHING = "-"  # what a read of a missing key returns; never a value


class Host(Protocol):
    """The buffer, as far as a meeting needs it."""

    def greet(self) -> bytes:
        """Who and where this rank is; the same for every peer."""

    def prepare(self, peer: int, greeting: bytes) -> bytes:
        """What this peer needs to write here. Undoes an earlier `prepare` for the same peer.

        Raises:
            PeerUnreachable: the greeting is that of a dead process; wait for another.
            ChannelDown: not now; try the same again.
            ValueError: the two can never meet.
        """

    def open(self, peer: int, details: bytes) -> None:
        """The link is ready afterwards. Raises: what `prepare` raises."""

    def forget(self, peer: int) -> None:
        """Undo `prepare` for a peer that did not come."""


class RendezvousOffer(msgspec.Struct, frozen=True, array_like=True):
    nonce: bytes
    echo: bytes
    greeting: bytes
    details: bytes


@dataclass(slots=True)
class _Meeting:
    """The state of one pair, on one side."""

    nonce: bytes
    theirs: bytes = b""  # nonce of the offer that was answered
    dead: bytes = b""  # nonce of one that a dead rank left
    offer: RendezvousOffer | None = None  # what lies in the store
    renewed: bool = False
    down: ChannelDown | None = None  # why it does not go on


class _Offers:
    """What lies in the store, by who left it for whom."""

    def __init__(self, store: BoundedStore, prefix: str) -> None:
        self._store = store
        self._prefix = prefix

    def write(self, rank: int, peer: int, meeting: _Meeting, offer: RendezvousOffer) -> None:
        meeting.offer = offer
        # hex: stores compare text
        self._store.set(self._key(rank, peer), msgspec.msgpack.encode(offer).hex())

    def read(self, source: int, target: int) -> RendezvousOffer | None:
        """Without waiting, as `get` would for a key that is not there or was just deleted."""
        value = self._store.compare_set(self._key(source, target), _NOTHING, _NOTHING)
        if value == _NOTHING.encode():
            return None
        try:
            return msgspec.msgpack.decode(bytes.fromhex(value.decode()), type=RendezvousOffer)
        except (ValueError, msgspec.MsgspecError):
            return None  # not ours; a real offer will replace it

    def delete(self, source: int, target: int) -> None:
        self._store.delete_key(self._key(source, target))

    def _key(self, source: int, target: int) -> str:
        return f"{self._prefix}/{source}>{target}"


def meet(
    store: StoreKeys,
    rank: int,
    peers: Iterable[int],
    host: Host,
    *,
    timeout_s: float,
    epoch: int = 0,
    cancelled: Callable[[], bool] = lambda: False,
    prefix: str = "flexpert",
) -> tuple[int, ...]:
    """Meet each of `peers`, who call this for `rank` in turn, at any time within the limit.

    Args:
        store: the same for all; its own timeout does not matter.
        rank: the own id.
        peers: ids; several meetings go on at the same time, and none waits for another.
        host: see `Host`.
        timeout_s: seconds for all of them together.
        epoch: for the error message.
        cancelled: asked now and then; True gives up.
        prefix: of the keys; meetings of different prefixes do not see each other.

    Returns: the ids met, sorted.

    Raises:
        RankTimeout: some did not come ("connect"); those that did stay met. Its cause, if there is
            one, is a `ChannelDown`: what was wrong on this side.
        ValueError: a peer that can never be met; those met so far stay met.
        CommError: the store is gone, gave no answer within the limit and little more than a
            second, or it was cancelled.
    """
    with BoundedStore(store, timeout_s) as bounded:
        return _meet(_Offers(bounded, prefix), rank, peers, host, timeout_s, epoch, cancelled)


def _meet(
    offers: _Offers,
    rank: int,
    peers: Iterable[int],
    host: Host,
    timeout_s: float,
    epoch: int,
    cancelled: Callable[[], bool],
) -> tuple[int, ...]:
    deadline = time.monotonic() + timeout_s
    left = {peer: _Meeting(secrets.token_bytes(8)) for peer in sorted(set(peers) - {rank})}
    met: list[int] = []
    greeting = host.greet()
    nap_s, renewed = _FIRST_NAP_S, time.monotonic()
    try:
        for peer, meeting in left.items():
            offers.write(rank, peer, meeting, RendezvousOffer(meeting.nonce, b"", greeting, b""))
        while left:
            moved = False
            for peer in list(left):
                meeting = left[peer]
                before = meeting.offer
                if _advance(offers, rank, peer, meeting, host):
                    del left[peer]
                    met.append(peer)
                moved |= meeting.offer is not before or peer not in left
            if not left:
                break
            if time.monotonic() - renewed >= _RENEW_S:
                renewed = time.monotonic()
                for peer, meeting in left.items():
                    _renew(offers, rank, peer, meeting)
            if cancelled():
                raise CommError(f"connecting to rank {_names(left)} was cancelled")
            if time.monotonic() >= deadline:
                down = next((m.down for m in left.values() if m.down), None)
                raise RankTimeout(tuple(left), "connect", epoch, timeout_s) from down
            nap_s = _FIRST_NAP_S if moved else min(1.5 * nap_s, _LONGEST_NAP_S)
            time.sleep(nap_s)
    except RuntimeError as error:  # torch's DistStoreError and its kin
        raise CommError(f"the store that ranks meet through does not answer: {error}") from error
    finally:
        for peer in left:
            host.forget(peer)
    return tuple(sorted(met))


def _advance(offers: _Offers, rank: int, peer: int, meeting: _Meeting, host: Host) -> bool:
    """Read the peer's offer and act on it; whether the two have met."""
    theirs = offers.read(peer, rank)
    if theirs is None or theirs.nonce == meeting.dead:
        return False
    assert meeting.offer is not None
    meeting.down = None
    try:
        if theirs.nonce != meeting.theirs:
            details = host.prepare(peer, theirs.greeting)
            meeting.theirs = theirs.nonce
            answer = RendezvousOffer(meeting.nonce, theirs.nonce, meeting.offer.greeting, details)
            offers.write(rank, peer, meeting, answer)
        if theirs.echo != meeting.nonce:
            return False
        host.open(peer, theirs.details)
    except ChannelDown as error:
        meeting.down = error
        return False
    except PeerUnreachable:
        meeting.dead, meeting.theirs = theirs.nonce, b""
        return False
    offers.delete(peer, rank)
    if meeting.renewed:
        offers.delete(rank, peer)
    return True


def _renew(offers: _Offers, rank: int, peer: int, meeting: _Meeting) -> None:
    """The peer may have deleted this offer when it meant that of our predecessor."""
    if meeting.offer is not None and offers.read(rank, peer) is None:
        meeting.renewed = True
        offers.write(rank, peer, meeting, meeting.offer)


def _names(ranks: Iterable[int]) -> str:
    return ", ".join(map(str, ranks))
