"""The slots that hold the states of sequences, for models whose layers keep one. Pure.

A state cannot be cut at a token, as keys and values can: it is of all tokens up to one. So each
slot holds the states behind one token, and is never changed once a step that wrote it was whole:

    plan      a slot for the state behind each sequence's last row of the step, and where tokens are
              proposed for it, behind each of them
    commit    the sequence has the one behind its last row that counts; the slot before it is free,
              unless it is kept, and so are those behind what did not come true
    rollback  the new ones are free, and the sequences have what they had

Of two steps in flight the second one reads what the first one writes; both write to new slots.

What is kept are copies at ends of KV blocks, under the digest of the block, for prompts that begin
with the same tokens: behind the last full block of a prompt, behind the last one of the answer so
far, and where a prompt left the keys and values that were found of it (so that the next one that
parts there finds a state, too). Nothing is copied for it: the slot is not given back.

Slots are counted and found as KV blocks are, by a `BlockPool` of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flexpert.engine.blocks import BlockPool
from flexpert.models.state_runs import NO_STATE, StateRuns

SLOTS_PER_SEQUENCE = 3
"""The state before a step, the one behind it, and a kept one."""

SLOTS_AHEAD = 1
"""More, where a step is planned on top of the one in flight: the state behind that, too."""


class SequenceState:
    """Where the states of one sequence are.

    slot: holds them behind all of its tokens that are computed; `NO_STATE`: none is. parted: tokens
    up to which keys and values were found, if a state was not. kept: digest under which the latest
    state of its answer can be found.
    """

    __slots__ = ("kept", "parted", "slot")

    def __init__(self) -> None:
        self.slot = NO_STATE
        self.parted = 0
        self.kept: bytes | None = None


@dataclass(frozen=True, slots=True)
class StatePart:
    """What a step computes of one sequence.

    source: the slot before it. start, end: the tokens. keep: (tokens, digest) where the state is to
    be kept, ascending and behind `start`. each: it decodes, and a state is wanted behind every one
    of the tokens, since any of them may be the last that counts.
    """

    state: SequenceState
    source: int
    start: int
    end: int
    keep: Sequence[tuple[int, bytes]] = ()
    each: bool = False


@dataclass(frozen=True, slots=True)
class StateStep:
    """The states of a step. behind: of each part, the slot behind it. kept: of each part, (tokens,
    slot, digest) of those on the way that are to be kept; without a digest those of what is
    proposed."""

    runs: StateRuns
    parts: Sequence[StatePart]
    behind: list[int]
    kept: list[list[tuple[int, int, bytes | None]]]


class StateSlots:
    """Which slot is whose."""

    def __init__(self, slots: int, rows: int, *, keeps: bool) -> None:
        """
        Args:
            slots: at least two for each of `rows`, the most sequences that run at once.
            keeps: copies for prompts that begin with the same tokens.
        """
        self.slots = slots
        self._pool = BlockPool(slots, 1, keeps)
        self._keeps = keeps
        self._most_waiting = slots - 2 * rows  # what steps may need is never given to who waits

    @property
    def used(self) -> int:
        """Slots that some sequence holds."""
        return self._pool.used

    @property
    def free(self) -> int:
        """Slots that no sequence holds; kept states may be in them."""
        return self._pool.free_count

    def find(self, digests: Sequence[bytes]) -> int:
        """Of a chain of digests, how many blocks there are before the last state that is kept."""
        for blocks in range(len(digests), 0, -1):
            if self._pool.published(digests[blocks - 1]) is not None:
                return blocks
        return 0

    def share(self, digest: bytes) -> int:
        """The slot of a state that `find` has found, with one more reference."""
        slot = self._pool.published(digest)
        assert slot is not None
        self._pool.share([slot])
        return slot

    def give_back(self, slot: int) -> None:
        """One reference less; of `NO_STATE` nothing."""
        if slot != NO_STATE:
            self._pool.free([slot])

    def release(self, state: SequenceState) -> None:
        """A sequence has no state any more."""
        self.give_back(state.slot)
        state.slot = NO_STATE

    def place(self, state: SequenceState, waiting: int) -> bool:
        """Gives a slot to a sequence whose states come from another rank.

        waiting: how many sequences wait for a row with a state then.

        Returns: whether there was one to spare.
        """
        if waiting > self._most_waiting or self._pool.free_count == 0:
            return False
        (state.slot,) = self._pool.allocate(1)
        return True

    # ---- a step -----------------------------------------------------------------------------

    def plan(self, parts: Sequence[StatePart], decodes: int) -> StateStep:
        """Slots for a step; its first `decodes` parts decode, and have a state each."""
        behind = self._pool.allocate(len(parts))
        begins, sources, targets = [0], [], []
        kept = []
        for part, last in zip(parts, behind, strict=True):
            on_way = self._on_way(part)
            kept.append(on_way)
            source, at = part.source, part.start
            for stop, target in (*((t, slot) for t, slot, _ in on_way), (part.end, last)):
                begins.append(begins[-1] + stop - at)
                sources.append(source)
                targets.append(target)
                source, at = target, stop
        rows = sum(part.end - part.start for part in parts[:decodes])
        return StateStep(StateRuns(begins, sources, targets, rows), parts, behind, kept)

    def _on_way(self, part: StatePart) -> list[tuple[int, int, bytes | None]]:
        """(tokens, slot, digest) of states in the middle of a part: behind each of its rows, or
        where they are kept: of those that are not yet, as far as there are slots."""
        if part.each:
            between = range(part.start + 1, part.end)
            slots = self._pool.allocate(len(between))
            return [(tokens, slot, None) for tokens, slot in zip(between, slots, strict=True)]
        found: list[tuple[int, int, bytes | None]] = []
        for tokens, digest in part.keep:
            if tokens < part.end and self._wanted(digest) and self._pool.free_count > 0:
                (slot,) = self._pool.allocate(1)
                found.append((tokens, slot, digest))
        return found

    def _wanted(self, digest: bytes) -> bool:
        return self._keeps and self._pool.published(digest) is None

    def commit(
        self,
        step: StateStep,
        index: int,
        tokens: int,
        *,
        hidden: bool,
        latest: tuple[int, bytes] | None = None,
    ) -> None:
        """The step was whole: what becomes of one of its parts.

        Args:
            tokens: of the sequence, up to the last one that counts.
            hidden: nobody else may find its states.
            latest: (tokens, digest) of the end of a block that its answer has come to: that state
                is kept in place of the one before it.
        """
        part = step.parts[index]
        state = part.state
        self.give_back(state.slot)
        state.slot = NO_STATE
        for at, slot, digest in (*step.kept[index], (part.end, step.behind[index], None)):
            if digest is not None and not hidden:
                self._pool.publish(slot, digest)
            if latest is not None and at == latest[0]:
                self._keep_latest(state, slot, latest[1])
            if at == tokens:
                state.slot = slot
            else:
                self._pool.free([slot])
        for at, digest in part.keep:
            if at == part.end and not hidden and self._wanted(digest):
                self._pool.publish(state.slot, digest)

    def rollback(self, step: StateStep) -> None:
        """The step was broken."""
        self._pool.free([*step.behind, *(slot for on_way in step.kept for _, slot, _ in on_way)])

    def _keep_latest(self, state: SequenceState, slot: int, digest: bytes) -> None:
        if self._wanted(digest):
            self._pool.publish(slot, digest)
            if state.kept is not None:
                self._pool.discard(state.kept)
            state.kept = digest
