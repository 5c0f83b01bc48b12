"""The KV blocks of sequences that move, and the states of those whose layers keep one: out of the
memory of a rank that leaves into this one's.

    offer → fetch (in a thread, while both ranks serve) → adopt, once the other has left

Full blocks are copied ahead; `adopt` copies what was filled since. A block of this rank that a
fetch may still write to belongs to that fetch until its thread has ended, whatever was withdrawn
meanwhile. What cannot be copied is computed again, so that no failure here costs a sequence.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from flexpert.comm import CommError
from flexpert.comm.peer_memory import ReadableMemory
from flexpert.engine import rank_protocol as msg
from flexpert.engine.arrivals import Arrivals
from flexpert.engine.blocks import DIGEST_BYTES
from flexpert.engine.device_profile import DeviceProfile
from flexpert.engine.remote_peers import RemotePeers
from flexpert.engine.request import CachedBlock, HeldKV, KVMigration, RequestSequence
from flexpert.engine.scheduler import Scheduler
from flexpert.engine.sequence_intake import SequenceIntake
from flexpert.kernels.device_stream import DeviceStream
from flexpert.models.kv_cache import KVCache
from flexpert.models.source import ModelInfo

_FETCH_BLOCKS = 64  # copied at once
MOST_CACHED = 2048  # blocks that no sequence holds; a change waits for them

KVSource: TypeAlias = KVCache | ReadableMemory
"""The cache of a rank that leaves: mapped here, or read over NIXL."""


def copy_blocks(own: KVCache, theirs: KVSource, pairs: Sequence[tuple[int, int]]) -> int:
    """See `KVCache.copy_from`. Raises: CommError: the other cannot be read any more."""
    if isinstance(theirs, KVCache):
        return own.copy_from(theirs, pairs)
    return own.read_from(theirs, pairs)


class KVFetch(threading.Thread):
    """Copies KV blocks of a rank that leaves.

    theirs: that rank's cache, once all is copied. over: the thread has exited, and the step loop
    has heard so; set by the latter.
    """

    def __init__(
        self,
        command: msg.Fetch,
        arrivals: Arrivals,
        pairs: list[tuple[int, int]],
        cached: list[tuple[int, int]],
        *,
        own: KVCache,
        theirs: Callable[[Callable[[], bool]], KVSource],
        stream: DeviceStream,
        done: Callable[[FetchEnded], None],
    ) -> None:
        """
        Args:
            pairs: (block there, block here) of sequences that move. cached: and, after those, of
                what no sequence holds.
            theirs: opens the cache, and is told what to ask whether the fetch is dropped. Raises:
                CommError, ValueError
            done: called in the thread.
        """
        super().__init__(name=f"fetch-{command.source}", daemon=True)
        self.command = command
        self.arrivals = arrivals
        self.theirs: KVSource | None = None
        self.over = False
        self.dropped = False
        self._pairs = pairs
        self._cached = cached
        self._own = own
        self._open = theirs
        self._stream = stream
        self._done = done

    def drop(self) -> None:
        """Nobody takes what is left; called in the step loop's thread. Blocks that the thread may
        still write to stay taken until it has ended."""
        self.dropped = True
        if self.over:
            self.arrivals.drop()

    def run(self) -> None:
        with self._stream.aside():
            copied = self._copy()
        self._done(FetchEnded(self, copied))

    def _copy(self) -> tuple[int, int] | None:
        copied = [0, 0]
        try:
            theirs = self._open(lambda: self.dropped)
            for which, pairs in enumerate((self._pairs, self._cached)):
                for at in range(0, len(pairs), _FETCH_BLOCKS):
                    if self.dropped:
                        return None
                    part = pairs[at : at + _FETCH_BLOCKS]
                    copied[which] += copy_blocks(self._own, theirs, part)
        except (CommError, ValueError):  # it is gone or its address is none
            return None
        self.theirs = theirs
        return copied[0], copied[1]


@dataclass(frozen=True, slots=True)
class FetchEnded:
    """A fetch's thread has ended. copied: bytes of sequences, and of what none of them holds; or
    None if it could not be done in full."""

    fetch: KVFetch
    copied: tuple[int, int] | None


class KVTransfer:
    """Used by the step loop's thread."""

    def __init__(
        self,
        info: ModelInfo,
        scheduler: Scheduler,
        own: KVCache,
        profile: DeviceProfile,
        intake: SequenceIntake,
        remote: RemotePeers,
        *,
        report: Callable[[msg.Report], None],
        done: Callable[[FetchEnded], None],
    ) -> None:
        """
        Args:
            own: this rank's cache; those of its peers are as large.
            remote: the memory of ranks on other machines.
            done: hears of a fetch that has ended, in its thread.
        """
        self._info = info
        self._scheduler = scheduler
        self._own = own
        self._profile = profile
        self._intake = intake
        self._remote = remote
        self._report = report
        self._done = done
        self._fetches: dict[int, KVFetch] = {}  # from ranks that leave

    def offer(self, command: msg.Offer) -> None:
        """Report full blocks, which stay as they are until `withdraw`."""
        held = self._scheduler.offer()
        cached = self._scheduler.offer_cached(MOST_CACHED)
        self._report(msg.Offered(command.epoch, held, cached))

    def fetch(self, command: msg.Fetch) -> None:
        """Copy what a leaver offers, as far as there are blocks for it."""
        migrations = self._credible(command.migrations)
        self._intake.expect(move.sequence for move in migrations)
        arrivals = Arrivals(self._scheduler.pool)
        spare = self._scheduler.running + len(migrations)
        pairs = arrivals.reserve(migrations, spare=spare)
        cached = arrivals.reserve_cached(self._credible_cached(command.cached), spare=spare)
        fetch = self._fetches[command.source] = KVFetch(
            command,
            arrivals,
            pairs,
            cached,
            own=self._own,
            theirs=lambda dropped: self._cache_of(command.source, command.kv, dropped),
            stream=self._profile.stream,
            done=self._done,
        )
        fetch.start()

    def fetch_ended(self, event: FetchEnded) -> None:
        fetch, copied = event.fetch, event.copied
        if copied is not None:
            fetch.arrivals.settle()
        if copied is None or fetch.dropped:
            fetch.arrivals.drop()
        fetch.over = True
        if not fetch.dropped:
            epoch, source = fetch.command.epoch, fetch.command.source
            blocks = self._scheduler.cache_changes()
            size, cached = copied or (0, 0)
            self._report(msg.Fetched(epoch, source, size, blocks, cached))

    def withdraw(self) -> None:
        """No epoch comes for which something was offered or fetched."""
        self._scheduler.withdraw()
        for fetch in self._fetches.values():
            fetch.drop()
        self._fetches.clear()

    def adopt(self, command: msg.Adopt) -> None:
        """Go on with the sequences of a rank that has left."""
        fetch = self._fetches.pop(command.source, None)
        moved = size = recomputed = 0
        migrations = self._credible(command.migrations)
        theirs = self._cache_of_leaver(command, fetch, migrations)
        for sequence, held in ((move.sequence, move.held) for move in migrations):
            have = fetch.arrivals.take(sequence.id) if fetch and fetch.over else []
            there = held if theirs else HeldKV(sequence.id, 0, [])
            added = False
            with self._intake.isolated(sequence):
                pairs = self._scheduler.adopt(sequence, there, have)
                added = True
            if not added:
                continue
            if pairs is None:
                recomputed += held.computed
                continue
            try:
                if theirs and pairs:
                    size += copy_blocks(self._own, theirs, pairs)
                slot = self._scheduler.state_slot(sequence.id)
                if theirs and slot is not None:
                    size += self._own.copy_state(theirs, there.state, slot)
            except CommError:
                self._compute_again(sequence)
                recomputed += held.computed
                continue
            self._scheduler.settle(sequence.id)
            moved += 1
        if fetch:
            fetch.drop()
        blocks = self._scheduler.cache_changes()
        self._report(msg.Adopted(command.source, moved, size, recomputed, blocks))

    def _compute_again(self, sequence: RequestSequence) -> None:
        """It was adopted, but its KV has not come."""
        self._scheduler.abort(sequence.id)
        with self._intake.isolated(sequence):
            self._scheduler.add(sequence)

    def _cache_of_leaver(
        self, command: msg.Adopt, fetch: KVFetch | None, migrations: list[KVMigration]
    ) -> KVSource | None:
        """None: it is gone, or its address is none, or it holds nothing of these, or it is on
        another machine and a fetch from there has not ended."""
        if not any(move.held.computed for move in migrations):
            return None
        with contextlib.suppress(CommError, ValueError):
            if self._remote.is_far(command.source):
                late = fetch is not None and not fetch.over
                return None if late else self._remote.kv_at_switch(command.source)
            if fetch and fetch.theirs:
                return fetch.theirs
            return self._cache_at(command.kv)
        return None

    def _cache_of(self, rank: int, address: bytes, cancelled: Callable[[], bool]) -> KVSource:
        """A peer's KV cache. Raises: PeerUnreachable; ValueError: that is no address"""
        if self._remote.is_far(rank):
            return self._remote.kv(rank, cancelled)
        return self._cache_at(address)

    def _cache_at(self, address: bytes) -> KVCache:
        """Of a peer on this machine. Raises: PeerUnreachable; ValueError: that is no address"""
        memory = self._profile.import_memory(address).bytes
        size, slots = self._scheduler.limits.block_size, self._own.slots
        return KVCache(self._info, self._own.blocks, size, memory, slots)

    def _credible_cached(self, cached: list[CachedBlock]) -> list[CachedBlock]:
        """What may be so; else the rank it comes from is not believed at all."""
        size, blocks = DIGEST_BYTES, self._own.blocks
        right = all(len(one.digest) == size and 0 <= one.block < blocks for one in cached)
        return cached[:MOST_CACHED] if right else []

    def _credible(self, migrations: list[KVMigration]) -> list[KVMigration]:
        """What the rank they come from says it holds, where that can be; else it holds nothing."""
        size, blocks = self._scheduler.limits.block_size, self._own.blocks

        def checked(migration: KVMigration) -> KVMigration:
            sequence, held = migration.sequence, migration.held
            tokens = len(sequence.prompt) + len(sequence.generated)
            right = (
                0 <= held.computed <= tokens
                and len(held.blocks) == -(-held.computed // size)
                and all(0 <= block < blocks for block in held.blocks)
                and -1 <= held.state < max(1, self._own.slots)
            )
            return migration if right else KVMigration(sequence, HeldKV(sequence.id, 0, []))

        return [checked(migration) for migration in migrations]
