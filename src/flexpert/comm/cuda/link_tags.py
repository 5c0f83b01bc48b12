"""What the flags of each link carry where links begin without a vote. Pure.

A flag counts only if its tag is the one that its reader expects, so both ranks of a pair must know
the tag of a new link before either has heard from the other. They work it out from what they have
in common: who they are, which of their connections this is, the last vote, and how often the link
has begun since. That last number each counts for itself; it is the same on both sides if both mask
and unmask each other between the same two exchanges. Where it is not, the tags differ: nothing is
mistaken for something else, each waits for its limit and masks the other, and the next vote, in
which the hosts agree on the number of the link, lets them begin alike again.

A link that was masked and unmasked with no exchange in between goes on as if nothing had happened,
since its peer need not know. One that broke in an exchange does not: its peer may still be in that
exchange, and must have given the link up before anything is sent over the next one.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass

from flexpert.comm.cuda.cuda_layout import UNVOTED, tag_of_number

_TAG_BITS = 34


@dataclass(slots=True)
class _Pair:
    """One connection to a peer.

    known: what tells it from all others.
    voted: number of the link in the last vote; -1 before any.
    begun: how often it has begun since.
    ended: tag of the link that is masked; 0: none.
    exchanges: those there had been when it was; -1: it broke.
    awaited: tag of the link whose end the present one had to await; 0: none.
    """

    known: bytes
    voted: int = -1
    begun: int = 0
    ended: int = 0
    exchanges: int = -1
    awaited: int = 0


@dataclass(frozen=True, slots=True)
class Beginning:
    """tag: of the link. anew: numbering begins. await_end: of this one by the peer; 0: of none."""

    tag: int
    anew: bool
    await_end: int = 0


class LinkTags:
    """The tags of one rank's links."""

    def __init__(self) -> None:
        self._met: Counter[bytes] = Counter()
        self._pairs: dict[int, _Pair] = {}

    def meet(self, peer: int, own: bytes, theirs: bytes) -> None:
        """A new connection to `peer`. own, theirs: what tells the two processes from all others."""
        both = b"".join(sorted((own, theirs)))
        self._met[both] += 1
        self._pairs[peer] = _Pair(both + self._met[both].to_bytes(4, "little"))

    def begin(self, peer: int, epoch: int, exchanges: int) -> Beginning:
        """The link that begins now, or goes on. exchanges: those of this rank so far."""
        pair = self._pairs[peer]
        ended, pair.ended = pair.ended, 0
        if ended and pair.exchanges == exchanges:
            return Beginning(ended, anew=False)
        pair.begun += 1
        pair.awaited = ended if pair.exchanges < 0 else 0
        return Beginning(_tag(pair, epoch), True, pair.awaited)

    def end(self, peer: int, tag: int, exchanges: int, *, whole: bool) -> None:
        """The link with this tag is masked; whole: all its exchanges were."""
        if peer in self._pairs:
            pair = self._pairs[peer]
            pair.ended, pair.exchanges = tag, exchanges if whole else -1

    def take_back(self, peer: int) -> None:
        """The link did not begin after all: the peer has not given up the one before."""
        if peer in self._pairs:
            pair = self._pairs[peer]
            pair.begun -= 1
            pair.ended, pair.exchanges = pair.awaited, -1

    def agree(self, peer: int, epoch: int, number: int) -> int:
        """The tag after a vote in which both sides came to this number of the link."""
        pair = self._pairs[peer]
        pair.voted, pair.begun, pair.ended = number, 0, 0
        return _tag(pair, epoch)

    def begin_epoch(self) -> None:
        """All links have begun anew, by other tags."""
        for pair in self._pairs.values():
            pair.voted, pair.begun, pair.ended = -1, 0, 0


def _tag(pair: _Pair, epoch: int) -> int:
    numbers = (epoch, pair.voted, pair.begun)
    told = pair.known + b"".join(n.to_bytes(8, "little", signed=True) for n in numbers)
    digest = hashlib.blake2b(told, digest_size=8).digest()
    return UNVOTED | tag_of_number(int.from_bytes(digest, "little") % 2**_TAG_BITS)
