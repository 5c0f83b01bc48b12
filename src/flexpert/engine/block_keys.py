"""What a rank tells the head of its prefix cache: short keys of the blocks that can be found. Pure.

A key is the first 64 bits of a block's digest (`blocks.py`), so that the head finds with the same
`chain` which blocks of a prompt a rank has. Two blocks with one key cost a worse choice of a rank
and nothing else: what a rank reads it finds by the whole digest.

The head is told of at most `MOST_KEYS` blocks of a rank. Of a cache with more of them, only every
so many'th key counts, the same ones everywhere: how far a prefix is held is then known less finely.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence

import msgspec

from flexpert.engine.blocks import chain
from flexpert.engine.request import BlockChanges

MOST_KEYS = 2**17
MOST_PROMPT_BLOCKS = 1024  # of a prompt that are looked up: they tell ranks apart well enough
_KEY_BYTES = 8


class PromptKeys(msgspec.Struct, frozen=True):
    """Of the blocks of a prompt that may come from a cache, those that are told of.

    ends: how many tokens of the prompt end with each.
    """

    keys: Sequence[int]
    ends: Sequence[int]


def key_of(digest: bytes) -> int:
    return int.from_bytes(digest[:_KEY_BYTES], "little")


def stride_of(blocks: int) -> int:
    """One in so many keys of a cache of this size is told of."""
    return -(-blocks // MOST_KEYS)


def prompt_keys(tokens: Sequence[int], block_size: int, stride: int, salt: str) -> PromptKeys:
    """At least the last token is computed, whatever is cached, so that its block is not asked for.

    Costs one or two microseconds for each block.
    """
    blocks = min((len(tokens) - 1) // block_size, MOST_PROMPT_BLOCKS)
    digests = chain(tokens, block_size, [], blocks, salt)
    keys = [key_of(digest) for digest in digests]
    ends: Sequence[int] = range(block_size, block_size * len(keys) + 1, block_size)
    if stride > 1:
        told = [(key, end) for key, end in zip(keys, ends, strict=True) if key % stride == 0]
        keys, ends = [key for key, _ in told], [end for _, end in told]
    return PromptKeys(keys, ends)


def pack_keys(digests: Iterable[bytes]) -> bytes:
    return b"".join(digest[:_KEY_BYTES] for digest in digests)


def unpack_keys(data: bytes) -> tuple[int, ...]:
    """Raises: ValueError: these are no keys."""
    if len(data) % _KEY_BYTES:
        raise ValueError(f"{len(data)} bytes are no keys of blocks")
    return struct.unpack(f"<{len(data) // _KEY_BYTES}Q", data)


class KeyLog:
    """What has become of the blocks of one pool since it was last told; as large as the pool at
    most, however long nobody asks."""

    def __init__(self, stride: int) -> None:
        self._stride = stride
        self._changed: dict[bytes, bool] = {}  # digest → whether it can be found now

    def set(self, digest: bytes, found: bool) -> None:
        if not self.counts(digest):
            return
        if self._changed.pop(digest, found) is found:  # else it came and went, untold
            self._changed[digest] = found

    def counts(self, digest: bytes) -> bool:
        """Whether the head is told of this block."""
        return self._stride == 1 or key_of(digest) % self._stride == 0

    def take(self) -> BlockChanges | None:
        """None: nothing has changed."""
        if not self._changed:
            return None
        changed, self._changed = self._changed, {}
        return BlockChanges(
            pack_keys(digest for digest, found in changed.items() if found),
            pack_keys(digest for digest, found in changed.items() if not found),
        )
