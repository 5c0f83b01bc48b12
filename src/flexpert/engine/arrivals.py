"""KV blocks that come from a rank that leaves, ahead of the sequences they belong to. Pure.

    reserve → (their content is copied) → settle → take, when the sequence comes → drop the rest

A prefix that several of them share comes once, and one that is in the prefix cache not at all.
"""

from __future__ import annotations

from collections.abc import Iterable

from flexpert.engine.blocks import BlockPool, chain
from flexpert.engine.request import CachedBlock, KVMigration

_CACHED = ""  # the id of no sequence


class Arrivals:
    """The blocks of one rank that leaves, in the pool of one that takes its sequences over."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._blocks: dict[str, list[int]] = {}  # sequence → its first full blocks, here
        self._coming: dict[bytes, int] = {}  # digest → block that is still to be copied

    def reserve(self, migrations: Iterable[KVMigration], spare: int) -> list[tuple[int, int]]:
        """Blocks for as many as there is room for.

        Args:
            spare: blocks that stay free: at least one for each running sequence, which may need it
                in the next step.

        Returns:
            (block there, block here) of each that must be copied before `settle`.
        """
        pool, pairs = self._pool, []
        for sequence, held in ((move.sequence, move.held) for move in migrations):
            tokens = [*sequence.prompt, *sequence.generated]
            full = min(len(held.blocks), len(tokens) // pool.block_size)
            salt = sequence.params.cache_salt
            digests = chain(tokens, pool.block_size, [], full, salt) if pool.prefix_cache else []
            mine = self._blocks[sequence.id] = []
            for index, block in enumerate(held.blocks[:full]):
                digest = digests[index] if digests else None
                here = self._known(digest)
                if here is None:
                    if pool.free_count <= spare:
                        break
                    (here,) = pool.allocate(1)
                    pairs.append((block, here))
                    if digest is not None:
                        self._coming[digest] = here
                mine.append(here)
        return pairs

    def reserve_cached(self, cached: Iterable[CachedBlock], spare: int) -> list[tuple[int, int]]:
        """Blocks for what no sequence holds, as far as there are some that nothing is in.

        Returns: as `reserve`.
        """
        pool, pairs = self._pool, []
        mine = self._blocks[_CACHED] = []
        for one in cached:
            if pool.free_count <= spare or not pool.unused:
                break
            if one.digest in self._coming or pool.published(one.digest) is not None:
                continue
            (here,) = pool.allocate(1)
            pairs.append((one.block, here))
            self._coming[one.digest] = here
            mine.append(here)
        return pairs

    def _known(self, digest: bytes | None) -> int | None:
        """A block that has this content or will have it, with one more reference."""
        if digest is None:
            return None
        here = self._coming.get(digest)
        if here is not None:
            self._pool.hold([here])
            return here
        here = self._pool.published(digest)
        if here is not None:
            self._pool.share([here])
        return here

    def settle(self) -> None:
        """All is copied: others may find it."""
        for digest, block in self._coming.items():
            self._pool.publish(block, digest)
        self._coming.clear()
        self._pool.free(self._blocks.pop(_CACHED, []))  # nobody comes for it but who finds it

    def take(self, id: str) -> list[int]:
        """The blocks of a sequence, and their references; they must be settled."""
        return self._blocks.pop(id, [])

    def drop(self) -> None:
        """Nobody comes for the rest. What was settled can still be found as a prefix."""
        for blocks in self._blocks.values():
            self._pool.free(blocks)
        self._blocks.clear()
        self._coming.clear()
