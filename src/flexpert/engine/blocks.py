"""The blocks of a rank's paged KV cache: who holds which, and which can be found again. Pure.

A block holds the keys and values of `block_size` consecutive tokens of one sequence. A full block
whose content was computed can be published under a digest of everything up to its end; a later
sequence that begins with the same tokens shares it instead of computing it. A block is in one
of four states:

    free        content worthless                       refs 0, no digest, on the stack
    private     written by one sequence                 refs ≥ 1, no digest
    published   read by `refs` sequences, found again   refs ≥ 1, digest
    idle        nobody reads it, can still be found     refs 0, digest, in LRU order

Idle blocks are taken only when no free one is left, the least recently used first. Everything here
costs a constant time per block.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from hashlib import blake2b
from itertools import islice

import numpy as np

from flexpert.errors import FlexpertError

ROOT = b""  # the parent of a sequence's first block
_TOKEN_BYTES = 8
DIGEST_BYTES = 32


class OutOfBlocks(FlexpertError):  # noqa: N818
    """More blocks were asked for than are free; ask `BlockPool.free_count` before."""


def block_digest(parent: bytes, tokens: Sequence[int]) -> bytes:
    """The name of a full block: its own tokens, and through `parent` all tokens before them.

    256 bits of BLAKE2b: prompts come from strangers, who must not be able to construct two with
    one digest and so read the keys and values of somebody else's prompt.
    """
    return blake2b(parent + _as_bytes(tokens), digest_size=DIGEST_BYTES).digest()


def _as_bytes(tokens: Sequence[int]) -> bytes:
    return np.array(tokens, dtype="<i8").tobytes()


def root(salt: str) -> bytes:
    """What the first block of a sequence follows."""
    if not salt:
        return ROOT
    return blake2b(salt.encode(), digest_size=DIGEST_BYTES, person=b"cache_salt").digest()


def chain(
    tokens: Sequence[int], block_size: int, known: list[bytes], blocks: int, salt: str = ""
) -> list[bytes]:
    """Extends `known`, the digests of the first blocks of `tokens`, to `blocks` of them.

    salt: sequences with different ones have no digest in common.
    """
    first = len(known)
    if first >= blocks:
        return known
    data = _as_bytes(tokens[first * block_size : blocks * block_size])
    parent = known[-1] if known else root(salt)
    size = block_size * _TOKEN_BYTES
    for start in range(0, (blocks - first) * size, size):
        parent = blake2b(parent + data[start : start + size], digest_size=DIGEST_BYTES).digest()
        known.append(parent)
    return known


class BlockPool:
    """Allocation, sharing and eviction of block ids in [0, blocks).

    watch: told of a digest when it can be found (True), and when it no longer can.
    """

    def __init__(self, blocks: int, block_size: int, prefix_cache: bool) -> None:
        self.blocks = blocks
        self.block_size = block_size
        self.prefix_cache = prefix_cache
        self._free = list(range(blocks - 1, -1, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._refs = [0] * blocks
        self._digests: list[bytes | None] = [None] * blocks
        self._published: dict[bytes, int] = {}
        self.watch: Callable[[bytes, bool], None] = lambda digest, found: None

    @property
    def free_count(self) -> int:
        """Blocks that `allocate` can give: free and idle ones."""
        return len(self._free) + len(self._idle)

    @property
    def unused(self) -> int:
        """Blocks that nothing is in."""
        return len(self._free)

    @property
    def used(self) -> int:
        """Blocks that some sequence holds."""
        return self.blocks - self.free_count

    @property
    def idle(self) -> int:
        """Blocks nobody holds whose content can still be found."""
        return len(self._idle)

    def refs(self, block: int) -> int:
        """How many sequences hold `block`."""
        return self._refs[block]

    def match_prefix(self, tokens: Sequence[int]) -> list[int]:
        """The published blocks that `tokens` begins with; takes no reference (see `share`).

        Never all of `tokens`: at least one is left to compute, since its logits are desired.
        """
        return self.match(chain(tokens, self.block_size, [], self.matchable(len(tokens))))

    def matchable(self, tokens: int) -> int:
        """How many blocks of a prompt of `tokens` tokens may come from the cache."""
        return (tokens - 1) // self.block_size if self.prefix_cache else 0

    def match(self, digests: Iterable[bytes]) -> list[int]:
        """The published blocks of the longest known prefix of a chain of digests."""
        found = []
        for digest in digests:
            block = self._published.get(digest)
            if block is None:
                break
            found.append(block)
        return found

    def share(self, blocks: Iterable[int]) -> None:
        """Takes one more reference to each of these published blocks."""
        for block in blocks:
            if self._refs[block] == 0:
                del self._idle[block]
            self._refs[block] += 1

    def latest_idle(self, count: int) -> list[tuple[bytes, int]]:
        """(digest, block) of those whose content would be lost last, that first; takes no
        reference (see `share`)."""
        latest = islice(reversed(self._idle), max(0, count))
        return [(digest, block) for block in latest if (digest := self._digests[block])]

    def hold(self, blocks: Iterable[int]) -> None:
        """Takes one more reference to each of these blocks, which somebody holds already."""
        for block in blocks:
            if self._refs[block] == 0:
                raise ValueError(f"KV block {block} is held by nobody")
            self._refs[block] += 1

    @property
    def digests(self) -> Iterable[bytes]:
        """Of all blocks that can be found."""
        return self._published.keys()

    def published(self, digest: bytes) -> int | None:
        """The block that can be found under a digest."""
        return self._published.get(digest)

    def allocate(self, count: int) -> list[int]:
        """`count` private blocks; their content is worthless.

        Raises:
            OutOfBlocks: fewer than `count` are free; nothing was taken.
        """
        if count > self.free_count:
            raise OutOfBlocks(f"{count} KV blocks asked for, {self.free_count} are free")
        taken = []
        for _ in range(count):
            if self._free:
                block = self._free.pop()
            else:
                block, _none = self._idle.popitem(last=False)
                self._forget(block)
            self._refs[block] = 1
            taken.append(block)
        return taken

    def free(self, blocks: Sequence[int]) -> None:
        """Gives back one reference to each block of a sequence, given in the sequence's order.

        The last block is given back first, so that eviction takes a prefix from its end and what
        is left of it can still be found. For private blocks it is the exact reverse of `allocate`.
        """
        for block in reversed(blocks):
            if self._refs[block] == 0:
                raise ValueError(f"KV block {block} is freed more often than it was taken")
            self._refs[block] -= 1
            if self._refs[block] == 0:
                if self._digests[block] is None:
                    self._free.append(block)
                else:
                    self._idle[block] = None

    def publish(self, block: int, digest: bytes) -> None:
        """A held block is full and computed: others may find it under `digest` from now on.

        Where two sequences computed the same content at the same time the first stays published
        and the second block stays private.
        """
        if not self.prefix_cache or digest in self._published:
            return
        if self._refs[block] == 0 or self._digests[block] is not None:
            raise ValueError(f"KV block {block} is not a private block that somebody holds")
        self._published[digest] = block
        self._digests[block] = digest
        self.watch(digest, True)

    def discard(self, digest: bytes) -> None:
        """Nobody will look for this content again: if nobody holds the block, nothing is in it."""
        block = self._published.get(digest)
        if block is not None and self._refs[block] == 0:
            del self._idle[block]
            self._forget(block)
            self._free.append(block)

    def _forget(self, block: int) -> None:
        digest = self._digests[block]
        if digest is not None:
            del self._published[digest]
            self._digests[block] = None
            self.watch(digest, False)
