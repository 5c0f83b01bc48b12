"""Which tokens a rank computes in the next step, and what becomes of them. Pure.

    add → waiting ──admit──► prefilling ──prompt computed──► decoding ──finished──► gone
           ▲   ▲                  │                             │
    adopt ─┘   └──── preempt (blocks given back, tokens kept) ──┘

Policy: by priority, and of equals first come, first served, without overtaking. A step computes one
token of every decoding sequence, then chunks of prompts in the order in which they were admitted up
to the token budget. A sequence is admitted when all blocks of its prompt are free, and a spare one
for each sequence that runs already; so only decoding can run out of blocks. Then the latest
arrival, of those with the lowest priority, is preempted and later computed again.

A sequence that comes from another rank with its keys and values, and finds no row, waits with them,
in all the blocks that its tokens need, so that a row is all it waits for. Those that wait with
blocks are ahead of those without, and lose them before anybody who runs does. So the first in the
queue can be admitted at the latest when nobody runs: it waits for no block that one behind it has.

A step is a transaction, because a rank may die in the middle of it:

    plan()      takes blocks and rows, but nobody sees it
    commit()    the step was whole: tokens are appended, blocks published, room made for the next
    rollback()  the step was broken: as if it had not been planned; the same plan comes again

On a GPU the next step is planned while one is computed (`looks_ahead`): it goes on with what that
will leave, if it is whole, but for its tokens, which the device knows (`StepPlan.sources`). Plans
are committed in their order and rolled back in the other one. A sequence that a commit ends may be
part of the plan after it: what that samples for it is dropped, and its blocks stay taken until that
plan, too, has ended. Where KV blocks are short nothing is planned ahead, since only a commit makes
room.

What a broken step may have written to is never read: it writes only to positions not yet counted
as computed and to blocks that nobody else holds. Preemption happens in commit() and not in plan()
for this reason: the blocks of a victim must not be written to by a step that may be rolled back.
Cached blocks evicted by a plan stay evicted after a rollback.

Layers that keep a state have it in slots (`state_slots`), which go the same way: a sequence begins
with the state that was found at the end of its cached blocks, and a step writes to new slots. Only
where a state was kept is a prefix found.

A step may have been whole but computed without some experts. The keys and values of its sequences
are tainted then: nobody else may find them, nor those that follow, until they are computed again.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields, replace

import msgspec
import numpy as np
from numpy.typing import NDArray

from flexpert.engine.block_keys import KeyLog, pack_keys, stride_of
from flexpert.engine.blocks import BlockPool, chain
from flexpert.engine.request import (
    BlockChanges,
    CachedBlock,
    HeldKV,
    RequestSequence,
    TokenEvent,
    TokenLogprobs,
)
from flexpert.engine.sequence import Sampled, SampleState
from flexpert.engine.state_slots import SequenceState, StatePart, StateSlots, StateStep
from flexpert.errors import ConfigError, ContextOverflow, RequestError, context_limit
from flexpert.models.state_runs import NO_STATE, StateRuns

_SPARE_BLOCKS = 8  # for each sequence of a rank that leaves: what it may need meanwhile


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLimits:
    """What one rank has room for.

    max_tokens_per_step: token budget of a step. max_running: sequences computed at once.
    max_model_len: tokens of prompt and answer. blocks, block_size: the KV cache.
    max_scored_per_step: rows of logits, each as long as the vocabulary, that are computed only to
    tell how likely a prompt's tokens were. state_slots: of a model whose layers keep a state of
    each sequence (see `StateSlots`); 0: they keep none.
    """

    max_tokens_per_step: int
    max_running: int
    max_model_len: int
    blocks: int
    block_size: int
    prefix_cache: bool
    max_scored_per_step: int = 256
    state_slots: int = 0

    def __post_init__(self) -> None:
        for entry in fields(self):
            least = 0 if entry.name in ("prefix_cache", "state_slots") else 1
            if getattr(self, entry.name) < least:
                raise ConfigError(f"{entry.name} must be at least {least}")
        if 0 < self.state_slots < 2 * self.rows:
            raise ConfigError(f"state_slots must be at least {2 * self.rows}: two a sequence")

    @property
    def rows(self) -> int:
        """Sequences that run at once: one that decodes takes a token of a step's budget."""
        return min(self.max_running, self.max_tokens_per_step)

    @property
    def longest_table(self) -> int:
        """KV blocks of the longest sequence there is room for."""
        return min(-(-self.max_model_len // self.block_size), self.blocks)


class _Scheduled(SampleState):
    """A sequence in this scheduler. While it waits row is -1, and it has blocks only if it came
    with them (`adopt`)."""

    __slots__ = (
        "aborted",
        "added",
        "blocks",
        "cached",
        "computed",
        "digests",
        "row",
        "scores",
        "state",
        "tainted",
        "waited",
    )

    def __init__(self, sequence: RequestSequence, added: float) -> None:
        super().__init__(sequence)
        self.added = added  # when, by the scheduler's clock
        self.waited: float | None = None  # seconds until it was first admitted
        self.blocks: list[int] = []
        self.computed = 0  # tokens whose keys and values are in the blocks
        self.digests: list[bytes] = []  # of the first full blocks of `tokens`
        self.row = -1  # in the scheduler's arrays
        self.aborted = False  # while a plan that may hold it is in flight
        self.tainted = False  # keys and values in the blocks were computed without some experts
        self.cached = 0  # tokens of the prompt that were found in the cache
        self.state = SequenceState()
        # log probabilities of the prompt's tokens from the second on, as far as it is computed;
        # None: not asked for, or published
        asked = sequence.params.prompt_logprobs is not None and not sequence.generated
        self.scores: list[TokenLogprobs] | None = [] if asked else None


@dataclass(slots=True)
class _Admission:
    state: _Scheduled
    row: int
    blocks: list[int]
    cached: int  # tokens that need no computing
    kept: bool  # the blocks are those it has waited with
    slot: int  # of the state behind the cached tokens


@dataclass(frozen=True, slots=True)
class ScoredChunk:
    """Rows of logits at [start, start + len(tokens)) tell how likely these tokens of a prompt
    were. top: how many of the likeliest are asked for, too."""

    id: str
    start: int
    tokens: list[int]
    top: int


@dataclass(slots=True, eq=False)
class StepPlan:
    """One step's work as the model takes it: S sequences with N tokens, M of which are sampled.

    The first `decodes` sequences have one token each; the rest are chunks of prompts.

    token_ids, positions: [N] int64. query_start: [S + 1] int32, sequence s has the rows
    query_start[s] to query_start[s + 1]. context_len: [S] int32, tokens of s up to and with its
    last row. block_tables: [S, blocks of the longest] int32, padded with whatever valid ids.
    slot_mapping: [N] int64, block * block_size + offset each row's keys and values go to.
    logit_rows: [L] int64, ascending: rows whose logits are needed. sample_at: [M] int64, where
    among them the last row of each sequence is that is sampled. scored: prompts whose tokens'
    log probabilities are asked for. sources: [N] int64, which sample of the plan before is each
    row's token, where that is not known yet; -1: it is in token_ids. None: all are.
    """

    token_ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    query_start: NDArray[np.int32]
    context_len: NDArray[np.int32]
    block_tables: NDArray[np.int32]
    slot_mapping: NDArray[np.int64]
    logit_rows: NDArray[np.int64]
    sample_at: NDArray[np.int64]
    scored: list[ScoredChunk]
    decodes: int
    sources: NDArray[np.int64] | None
    _sampled: list[_Scheduled] = field(repr=False)
    _decoding: list[_Scheduled] = field(repr=False)
    _grown: list[tuple[_Scheduled, int]] = field(repr=False)  # a further block for decoding
    _admitted: list[_Admission] = field(repr=False)
    _chunks: list[tuple[_Scheduled, int]] = field(repr=False)  # computed up to here afterwards
    _whole: list[int] = field(repr=False)  # which sequences are prompts that are sampled
    _rows: NDArray[np.int64] = field(repr=False)  # [S], of the scheduler's arrays
    _blocks: NDArray[np.int64] = field(repr=False)  # [S], how many each has afterwards
    _states: StateStep | None = field(repr=False)
    _at: float = field(repr=False)  # when it was made
    _used_before: int = field(repr=False)  # blocks

    @property
    def ids(self) -> Iterable[str]:
        """Of all sequences that take part."""
        yield from (state.id for state in self._decoding)
        yield from (state.id for state, _ in self._chunks)

    @property
    def samples(self) -> Sequence[SampleState]:
        """The M sequences to sample, in the order of sample_at."""
        return self._sampled

    @property
    def states(self) -> StateRuns | None:
        """Slots that layers with a state read and write; None: the model has none."""
        return None if self._states is None else self._states.runs

    @property
    def unseen(self) -> int:
        """How many samples, the first ones, have a token before that is not known yet."""
        return self.decodes if self.sources is not None else 0

    @property
    def tokens(self) -> int:
        """N; 0 when there is nothing to do, and the rank only takes part in the exchanges."""
        return len(self.token_ids)


@dataclass(frozen=True, slots=True)
class _Begun:
    """A sequence whose prompt is computed in part. blocks: how many it has. slot: of its state."""

    state: _Scheduled
    row: int
    computed: int
    blocks: int
    slot: int


@dataclass(frozen=True, slots=True)
class _Outlook:
    """What is to be computed, if the plan in flight is whole.

    decoding: of D sequences, with rows, positions of the next token, and held blocks: [D] int64.
    sources: as in `StepPlan`, [D]. admitted: `id` of states that wait no more.
    """

    decoding: list[_Scheduled]
    rows: NDArray[np.int64]
    positions: NDArray[np.int64]
    held: NDArray[np.int64]
    sources: NDArray[np.int64] | None
    prefilling: list[_Begun]
    admitted: frozenset[int] = frozenset()

    @property
    def running(self) -> int:
        return len(self.decoding) + len(self.prefilling)


@dataclass(frozen=True, slots=True)
class _Chunk:
    state: _Scheduled
    row: int
    blocks: int
    slot: int
    start: int
    end: int

    @property
    def whole(self) -> bool:
        """The sequence is sampled after it."""
        return self.end == len(self.state.tokens)

    @property
    def scored(self) -> int:
        """How many of its rows tell how likely the prompt's next token was."""
        return 0 if self.state.scores is None else self.end - self.start - self.whole


def _logit_rows(
    decodes: int, chunks: Sequence[_Chunk], stops: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], list[ScoredChunk]]:
    """logit_rows, sample_at and scored of a `StepPlan`.

    stops: [chunks] int64, the row behind the last of each.
    """
    if not any(chunk.scored for chunk in chunks):
        whole = np.array([chunk.whole for chunk in chunks])
        rows = np.concatenate([np.arange(decodes), stops[whole] - 1])
        return rows, np.arange(len(rows)), []
    needed, sample_at, scored = list(range(decodes)), list(range(decodes)), []
    for chunk, stop in zip(chunks, stops.tolist(), strict=True):
        if chunk.scored:
            state = chunk.state
            after = state.tokens[chunk.start + 1 : chunk.start + 1 + chunk.scored]
            top = state.params.prompt_logprobs or 0
            scored.append(ScoredChunk(state.id, len(needed), after, top))
            begin = stop - (chunk.end - chunk.start)
            needed += range(begin, begin + chunk.scored)
        if chunk.whole:
            sample_at.append(len(needed))
            needed.append(stop - 1)
    return np.array(needed, dtype=np.int64), np.array(sample_at, dtype=np.int64), scored


@dataclass(slots=True)
class _Room:
    """What is left of a step. tokens: to be computed. scored: rows of logits that only tell how
    likely a prompt's tokens were; each is as long as the vocabulary."""

    tokens: int
    scored: int

    def any_for(self, state: _Scheduled) -> bool:
        return self.tokens > 0 and (state.scores is None or self.scored > 0)

    def chunk(self, begun: _Begun) -> _Chunk:
        """As much of the rest of a prompt as there is room for; may be nothing."""
        state, start = begun.state, begun.computed
        room = self.tokens if state.scores is None else min(self.tokens, self.scored)
        end = min(len(state.tokens), start + room)
        chunk = _Chunk(state, begun.row, begun.blocks, begun.slot, start, end)
        self.tokens -= chunk.end - chunk.start
        self.scored -= chunk.scored
        if not chunk.whole:
            self.tokens = 0  # none overtakes it
        return chunk


class Scheduler:
    """The sequences of one rank.

    running, waiting: how many. preemptions, prompt_tokens, cached_tokens: since the start; how
    often a sequence lost its blocks, tokens of all admitted prompts, and those found in the cache.
    clock: seconds; nothing is decided by it.
    """

    def __init__(self, limits: EngineLimits, clock: Callable[[], float] = time.monotonic) -> None:
        self.limits = limits
        self._clock = clock
        self.pool = BlockPool(limits.blocks, limits.block_size, limits.prefix_cache)
        self._keys = KeyLog(stride_of(limits.blocks))
        self.pool.watch = self._keys.set
        self.preemptions = 0
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self._states: dict[str, _Scheduled] = {}
        # Each in order of arrival; and all that decode came before all that prefill, and these
        # before all that wait: admission, completion and preemption keep it so.
        self._decoding: list[_Scheduled] = []
        self._prefilling: list[_Scheduled] = []
        self._waiting: deque[_Scheduled] = deque()
        rows = limits.rows
        self._slots = (
            StateSlots(limits.state_slots, rows, keeps=limits.prefix_cache)
            if limits.state_slots
            else None
        )
        longest = min(limits.max_model_len, limits.blocks * limits.block_size)
        self._tables = np.zeros((rows, -(-longest // limits.block_size)), dtype=np.int32)
        self._held = np.zeros(rows, dtype=np.int64)  # blocks of each row
        self._last = np.zeros(rows, dtype=np.int64)  # decoding: the token to compute next
        self._length = np.zeros(rows, dtype=np.int64)  # decoding: its position
        self._free_rows = list(range(rows - 1, -1, -1))
        self._order: NDArray[np.int64] | None = None  # rows of _decoding
        self._plans: list[StepPlan] = []  # in flight, one or two, the first first
        self._ahead: _Outlook | None = None  # see `_look_ahead`
        self._orphans: list[tuple[_Scheduled, StepPlan]] = []  # gone, but part of plans up to this
        self._offered: list[int] = []  # blocks that must stay as they are

    @property
    def has_work(self) -> bool:
        """Whether a step would do or change anything."""
        return bool(self._states)

    @property
    def running(self) -> int:
        """Sequences that are computed."""
        return len(self._decoding) + len(self._prefilling)

    @property
    def waiting(self) -> int:
        """Sequences not yet admitted, or preempted, or that have come and found no row."""
        return len(self._waiting)

    @property
    def kv_used(self) -> float:
        """Share of the KV blocks that sequences hold, 0 to 1."""
        used = self._plans[0]._used_before if self._plans else self.pool.used
        return used / self.pool.blocks

    def __contains__(self, id: str) -> bool:
        return id in self._states

    @property
    def ids(self) -> list[str]:
        """Of all sequences that are not finished here."""
        return list(self._states)

    def cache_changes(self) -> BlockChanges | None:
        """What has come into the prefix cache and gone since the last call; None: nothing."""
        return self._keys.take()

    def cached_keys(self) -> bytes:
        """All that the prefix cache holds; `cache_changes` goes on from here."""
        self._keys.take()
        return pack_keys(digest for digest in self.pool.digests if self._keys.counts(digest))

    def add(self, sequence: RequestSequence) -> None:
        """Queues a sequence; what it has generated elsewhere counts as published.

        Raises:
            RequestError: the prompt is empty.
            ContextOverflow: it can never be answered here: too long for the model or for the
                whole KV cache.
            ValueError: a caller's mistake: the id is present, no seed, nothing left to generate.
        """
        params, limits = sequence.params, self.limits
        if sequence.id in self._states:
            raise ValueError(f"sequence {sequence.id!r} is already here")
        if params.seed is None and params.temperature > 0:
            raise ValueError(f"sequence {sequence.id!r} is sampled but has no seed")
        if not sequence.prompt:
            raise RequestError("the prompt is empty; at least one token is needed")
        prompt = len(sequence.prompt)
        if prompt >= limits.max_model_len:
            raise ContextOverflow(
                f"{context_limit(limits.max_model_len)}. However, the prompt has {prompt}, and "
                f"the prompt may have {limits.max_model_len - 1}"
            )
        longest = limits.max_model_len
        if params.max_tokens is not None:
            longest = min(longest, prompt + params.max_tokens)
        # the keys and values of the last token are never needed
        if longest - 1 > limits.blocks * limits.block_size:
            raise ContextOverflow(
                f"prompt and answer may reach {longest} tokens; the KV cache of a rank holds "
                f"{limits.blocks * limits.block_size}: lower max_tokens or raise kv_memory"
            )
        state = _Scheduled(sequence, self._clock())
        if sequence.generated and state.finish(limits.max_model_len) is not None:
            raise ValueError(f"sequence {sequence.id!r} is already complete")
        self._states[sequence.id] = state
        self._queue(state)

    def abort(self, id: str) -> bool:
        """Forgets a sequence; False if it is not here (any more).

        With a plan in flight its blocks stay taken until the commit or rollback, and no event
        comes for it.
        """
        state = self._states.pop(id, None)
        if state is None:
            return False
        for queue in (self._waiting, self._prefilling, self._decoding):
            if state in queue:
                queue.remove(state)
        self._order = self._ahead = None
        self._let_go(state)
        return True

    def _let_go(self, state: _Scheduled) -> None:
        """A sequence that is gone gives its blocks back, as soon as no plan in flight has it."""
        if not self._plans:
            self._release(state)
            return
        state.aborted = True
        self._orphans.append((state, self._plans[-1]))

    def drain(self) -> list[str]:
        """Takes everything out, to go on elsewhere; the ids in order of arrival.

        Plans in flight are rolled back. The prefix cache stays.
        """
        self._roll_all_back()
        ids = [s.id for s in (*self._decoding, *self._prefilling, *self._waiting)]
        for id in ids:
            self.abort(id)
        return ids

    def offer(self) -> list[HeldKV]:
        """The full blocks of each sequence that has any, for another rank to copy meanwhile.

        Not of a tainted one, nor of a prompt whose log probabilities are asked for and not all
        there: where it goes on it is computed again. They stay as they are until
        `withdraw`, whatever becomes of the sequence.
        """
        self.withdraw()
        size = self.limits.block_size
        held = [
            HeldKV(s.id, s.computed // size * size, s.blocks[: s.computed // size])
            for s in (*self._decoding, *self._prefilling, *self._waiting)
            if s.blocks and not s.tainted and s.scores is None
        ]
        self._offered = [block for one in held for block in one.blocks]
        self.pool.hold(self._offered)
        return held

    def offer_cached(self, most: int) -> list[CachedBlock]:
        """What is cached and no sequence holds, of conversations that may go on: the latest first.
        After `offer`; they stay as they are as well, as far as this rank can do without them.
        Nothing where layers keep states: without these it is of no use."""
        if self._slots is not None:
            return []
        room = self.pool.free_count - _SPARE_BLOCKS * (1 + self.running)
        cached = [CachedBlock(*one) for one in self.pool.latest_idle(min(most, room))]
        blocks = [one.block for one in cached]
        self.pool.share(blocks)
        self._offered += blocks
        return cached

    def withdraw(self) -> None:
        """What was offered may change again."""
        self.pool.free(self._offered)
        self._offered = []

    def hand_over(self) -> list[HeldKV]:
        """`drain`, with all that is computed; it stays in the blocks until the next plan."""
        self._roll_all_back()
        size = self.limits.block_size
        held = [
            HeldKV(s.id, 0, [])
            if s.tainted or s.scores is not None
            else HeldKV(s.id, s.computed, s.blocks[: -(-s.computed // size)], s.state.slot)
            for s in (*self._decoding, *self._prefilling, *self._waiting)
        ]
        self.drain()
        self.withdraw()
        return held

    def adopt(
        self, sequence: RequestSequence, held: HeldKV, have: list[int]
    ) -> list[tuple[int, int]] | None:
        """As `add`, but what another rank has computed is not computed again.

        Where layers keep states that is all or nothing, and theirs goes to `state_slot`.

        Args:
            held: what that rank holds.
            have: blocks of this pool with the first of it, whose references go over.

        Returns:
            (block there, block here) of what must be copied before `settle` and the next plan, be
            it that it goes on at once or that it waits for a row; or None: there are no blocks for
            it, so it waits and is computed again.

        Raises:
            As `add`.
        """
        if self._plans:
            raise RuntimeError("a plan is in flight")
        try:
            self.add(sequence)
        except BaseException:
            self.pool.free(have)
            raise
        state = self._states[sequence.id]
        size = self.limits.block_size
        computed = min(max(held.computed, len(have) * size), len(state.tokens) - 1)
        if state.scores is not None:
            computed = 0  # log probabilities do not travel
        if self._slots is not None and (held.state < 0 or computed != held.computed):
            computed = 0
        decodes = computed == len(state.tokens) - 1
        used = -(-computed // size)
        total = used if decodes else -(-len(state.tokens) // size)
        room = self.pool.free_count - self.running
        ahead = sum(1 for waits in self._waiting if waits.blocks)
        runs = bool(self._free_rows) and not ahead and total - len(have) < room
        if not runs:  # the block of the token that comes next, too: admission takes none
            total = -(-len(state.tokens) // size)
        placed = computed > 0 and total - len(have) <= room
        if placed and self._slots is not None:
            placed = self._slots.place(state.state, ahead + (not runs))
        if not placed:
            self.pool.free(have)
            return None
        self._waiting.remove(state)
        state.blocks = have + self.pool.allocate(total - len(have))
        state.computed = computed
        if runs:
            self._go_on(state, decodes)
        else:
            self._waiting.insert(ahead, state)
        return list(zip(held.blocks[len(have) : used], state.blocks[len(have) : used], strict=True))

    def _go_on(self, state: _Scheduled, decodes: bool) -> None:
        """A sequence that has come with its blocks runs at once."""
        state.row = self._free_rows.pop()
        self._tables[state.row, : len(state.blocks)] = state.blocks
        self._held[state.row] = len(state.blocks)
        if decodes:
            self._last[state.row] = state.tokens[-1]
            self._length[state.row] = state.computed
            self._decoding.append(state)
            self._order = None
        else:
            self._prefilling.append(state)

    def state_slot(self, id: str) -> int | None:
        """Where the states of a sequence go that was adopted; None: its layers keep none."""
        state = self._states.get(id)
        return None if self._slots is None or state is None else state.state.slot

    def settle(self, id: str) -> None:
        """What `adopt` asked for is copied: others may find the full blocks."""
        state = self._states.get(id)
        if state is not None:
            self._publish(state, 0)

    @property
    def looks_ahead(self) -> bool:
        """Whether a step may be planned on top of the one in flight, and has something to do."""
        return self._slots is None and len(self._plans) == 1 and self._look_ahead() is not None

    def _look_ahead(self) -> _Outlook | None:
        """What is planned on top of the plan in flight; kept until anything changes."""
        if self._ahead is None and all(s.goes_on_unseen for s in self._plans[0]._sampled):
            after = self._after(self._plans[0])
            # what both steps decode may need a block each, and the next one another
            if after.running > 0 and self.pool.free_count >= 2 * (after.running + 1):
                self._ahead = after
        return self._ahead

    def plan(self) -> StepPlan:
        """The next step's work; empty if and only if there is none (`has_work`).

        Ends with `commit` or `rollback`. With one in flight only if `looks_ahead`.
        """
        if self._plans and not self.looks_ahead:
            raise RuntimeError("a plan is in flight; commit it or roll it back")
        used = self.pool.used
        now = self._look_ahead() if self._plans else self._outlook()
        assert now is not None  # it looks ahead
        self._ahead = None
        block_of = now.positions // self.limits.block_size
        blocks = now.held.copy()
        grown = []
        for index in np.flatnonzero(block_of == now.held).tolist():
            state = now.decoding[index]
            (block,) = self.pool.allocate(1)  # commit() made room for it
            self._tables[now.rows[index], now.held[index]] = block
            blocks[index] += 1
            grown.append((state, block))
        room = _Room(
            self.limits.max_tokens_per_step - len(now.rows), self.limits.max_scored_per_step
        )
        chunks: list[_Chunk] = []
        for begun in now.prefilling:
            chunk = room.chunk(begun)
            if chunk.end > chunk.start:
                chunks.append(chunk)
        admitted = self._admit(room, chunks, now)
        plan = self._lay_out(now, block_of, blocks, grown, admitted, chunks, used)
        self._plans.append(plan)
        return plan

    def _outlook(self) -> _Outlook:
        if self._order is None:
            self._order = np.array([s.row for s in self._decoding], dtype=np.int64)
        rows = self._order
        return _Outlook(
            self._decoding,
            rows,
            self._length[rows],
            self._held[rows],
            None,
            [_Begun(s, s.row, s.computed, len(s.blocks), s.state.slot) for s in self._prefilling],
        )

    def _after(self, plan: StepPlan) -> _Outlook:
        """What there is if `plan` is whole, and no token of it ends an answer before its time."""
        limit = self.limits.max_model_len
        sequences = [*range(plan.decodes), *plan._whole]
        on = [
            index
            for index, state in enumerate(plan._sampled)
            if not state.aborted and state.room(limit) > 1
        ]
        at = np.array([sequences[index] for index in on], dtype=np.int64)
        ends = {id(state): end for state, end in plan._chunks}
        complete = {id(state) for state in plan._sampled[plan.decodes :]}
        begun = [_Begun(s, s.row, s.computed, len(s.blocks), NO_STATE) for s in self._prefilling]
        begun += [_Begun(a.state, a.row, a.cached, len(a.blocks), NO_STATE) for a in plan._admitted]
        prefilling = [
            replace(one, computed=ends.get(id(one.state), one.computed))
            for one in begun
            if id(one.state) not in complete and not one.state.aborted
        ]
        return _Outlook(
            [plan._sampled[index] for index in on],
            plan._rows[at],
            plan.context_len[at].astype(np.int64),
            plan._blocks[at],
            np.array(on, dtype=np.int64),
            prefilling,
            frozenset(id(one.state) for one in plan._admitted),
        )

    def _admit(self, room: _Room, chunks: list[_Chunk], now: _Outlook) -> list[_Admission]:
        """Takes rows and blocks for the first of those who wait, and adds their chunks."""
        admitted: list[_Admission] = []
        size = self.limits.block_size
        for state in self._waiting:
            if id(state) in now.admitted:
                continue
            if not room.any_for(state) or not self._free_rows:
                break
            spare = now.running + len(admitted)
            blocks, start, slot = state.blocks, state.computed, state.state.slot
            if blocks:  # all it needs
                if spare > self.pool.free_count:
                    break
            else:
                total = -(-len(state.tokens) // size)
                # what is found in the cache is not computed, and so tells no log probabilities
                matchable = (
                    0 if state.scores is not None else self.pool.matchable(len(state.tokens))
                )
                digests = self._chain(state, matchable)[:matchable]
                found = self.pool.match(digests)
                if self._slots is not None:
                    state.state.parted = len(found) * size
                    found = found[: self._slots.find(digests[: len(found)])]
                idle = sum(self.pool.refs(block) == 0 for block in found)
                if total - len(found) + idle + spare > self.pool.free_count:
                    break
                self.pool.share(found)
                blocks = found + self.pool.allocate(total - len(found))
                start = len(found) * size
                if self._slots is not None and found:
                    slot = self._slots.share(digests[len(found) - 1])
            row = self._free_rows.pop()
            self._tables[row, : len(blocks)] = blocks
            admitted.append(_Admission(state, row, blocks, start, bool(state.blocks), slot))
            chunks.append(room.chunk(_Begun(state, row, start, len(blocks), slot)))
        return admitted

    def _lay_out(
        self,
        now: _Outlook,
        block_of: NDArray[np.int64],
        blocks: NDArray[np.int64],
        grown: list[tuple[_Scheduled, int]],
        admitted: list[_Admission],
        chunks: list[_Chunk],
        used: int,
    ) -> StepPlan:
        """The arrays of a plan.

        block_of, blocks: [decodes] int64, of the decoding sequences: index of the block of the
        token, and how many there are. used: blocks before the plan.
        """
        size = self.limits.block_size
        rows, positions = now.rows, now.positions
        decodes = len(rows)
        tokens = self._last[rows] if now.sources is None else np.zeros(decodes, dtype=np.int64)
        sources = now.sources
        slots = self._tables[rows, block_of] * size + (positions - block_of * size)
        queries = np.arange(decodes + 1, dtype=np.int32)
        context = (positions + 1).astype(np.int32)
        logit_rows = sample_at = np.arange(decodes)
        sampled = now.decoding.copy()
        scored: list[ScoredChunk] = []
        width = int(block_of.max()) + 1 if decodes else 0
        if chunks:
            at = [np.arange(c.start, c.end) for c in chunks]
            ids = [np.array(c.state.tokens[c.start : c.end], dtype=np.int64) for c in chunks]
            to = [
                self._tables[c.row, where // size] * size + where % size
                for c, where in zip(chunks, at, strict=True)
            ]
            ends = np.array([c.end for c in chunks])
            lengths = ends - np.array([c.start for c in chunks])
            tokens = np.concatenate([tokens, *ids])
            positions = np.concatenate([positions, *at])
            slots = np.concatenate([slots, *to])
            stops = decodes + np.cumsum(lengths)
            queries = np.concatenate([queries, stops], dtype=np.int32, casting="same_kind")
            context = np.concatenate([context, ends], dtype=np.int32, casting="same_kind")
            logit_rows, sample_at, scored = _logit_rows(decodes, chunks, stops)
            sampled += [c.state for c in chunks if c.whole]
            width = max(width, -(-int(ends.max()) // size))
            rows = np.concatenate([rows, np.array([c.row for c in chunks])])
            blocks = np.concatenate([blocks, np.array([c.blocks for c in chunks])])
            if sources is not None:
                sources = np.concatenate([sources, np.full(int(lengths.sum()), -1)])
        return StepPlan(
            token_ids=tokens,
            positions=positions,
            query_start=queries,
            context_len=context,
            block_tables=self._tables[rows, :width],
            slot_mapping=slots,
            logit_rows=logit_rows,
            sample_at=sample_at,
            scored=scored,
            decodes=decodes,
            sources=sources if decodes else None,
            _sampled=sampled,
            _decoding=now.decoding.copy(),
            _grown=grown,
            _admitted=admitted,
            _chunks=[(c.state, c.end) for c in chunks],
            _whole=[decodes + index for index, c in enumerate(chunks) if c.whole],
            _rows=rows,
            _blocks=blocks,
            _states=self._plan_states(now, chunks),
            _at=self._clock(),
            _used_before=used,
        )

    def _plan_states(self, now: _Outlook, chunks: list[_Chunk]) -> StateStep | None:
        if self._slots is None:
            return None
        parts = [StatePart(s.state, s.state.slot, s.computed, s.computed + 1) for s in now.decoding]
        for chunk in chunks:
            keep = self._kept_in(chunk)
            parts.append(StatePart(chunk.state.state, chunk.slot, chunk.start, chunk.end, keep))
        return self._slots.plan(parts, len(now.decoding))

    def _kept_in(self, chunk: _Chunk) -> list[tuple[int, bytes]]:
        """(tokens, digest) of where the state of a prompt is kept: behind the last block that
        another prompt like it could begin with, and where it parted from an earlier one."""
        state, size = chunk.state, self.limits.block_size
        ends = {self.pool.matchable(len(state.tokens)) * size, state.state.parted}
        inside = sorted(end for end in ends if chunk.start < end <= chunk.end)
        digests = self._chain(state, max(inside, default=0) // size)
        return [(end, digests[end // size - 1]) for end in inside]

    def commit(
        self,
        plan: StepPlan,
        sampled: Sampled,
        degraded: NDArray[np.bool_] | None = None,
        scores: Sequence[list[TokenLogprobs]] = (),
    ) -> list[TokenEvent]:
        """The step was whole: appends, publishes, finishes; then makes room for the next one.
        Of two in flight it is the first one.

        sampled: one token for each of plan.samples. degraded: [N] bool, rows that were computed
        without some of their experts; None: no row was. scores: of each of plan.scored.
        Returns one event for each of them that was not aborted meanwhile, in the same order.
        """
        self._check_in_flight(plan, 0)
        if len(sampled.tokens) != len(plan.samples):
            raise ValueError(f"{len(sampled.tokens)} tokens for {len(plan.samples)} samples")
        for chunk, found in zip(plan.scored, scores, strict=True):
            state = self._states.get(chunk.id)
            if state is not None and state.scores is not None:
                state.scores += found
        del self._plans[0]
        self._ahead = None
        for state, block in plan._grown:
            state.blocks.append(block)
            self._held[state.row] += 1
        self._keep_admitted(plan)
        if degraded is not None:
            self._taint(plan, degraded)
        if plan._states is not None:
            self._commit_states(plan, plan._states)
        size = self.limits.block_size
        for state in plan._decoding:
            state.computed += 1
            if state.computed % size == 0:
                self._publish(state, state.computed - 1)
                if self._slots is not None and not state.tainted and self.limits.prefix_cache:
                    self._slots.keep_latest(state.state, state.digests[state.computed // size - 1])
        for state, end in plan._chunks:
            start, state.computed = state.computed, end
            self._publish(state, start)
        events = self._append(plan, sampled)
        self._drop_orphans(plan)
        if not self._plans:
            self._make_room()
        return events

    def rollback(self, plan: StepPlan) -> None:
        """The step was broken: as if `plan` had not been called; aborts and adds since stand.
        Of two in flight it is the second one."""
        self._check_in_flight(plan, -1)
        self._plans.pop()
        self._ahead = None
        if self._slots is not None and plan._states is not None:
            self._slots.rollback(plan._states)
        for admission in reversed(plan._admitted):
            self._free_rows.append(admission.row)
            if not admission.kept:
                self.pool.free(admission.blocks)
                if self._slots is not None:
                    self._slots.give_back(admission.slot)
        for _state, block in reversed(plan._grown):
            self.pool.free([block])
        self._drop_orphans(plan, self._plans[-1] if self._plans else None)

    def _roll_all_back(self) -> None:
        while self._plans:
            self.rollback(self._plans[-1])

    def _keep_admitted(self, plan: StepPlan) -> None:
        for admission in plan._admitted:
            state = admission.state
            state.row, state.blocks = admission.row, admission.blocks
            state.state.slot = admission.slot
            state.computed = admission.cached
            if state.waited is None:
                state.waited = plan._at - state.added
            self._held[state.row] = len(state.blocks)
            if not admission.kept:
                self.prompt_tokens += len(state.tokens)
                self.cached_tokens += admission.cached
                state.cached = min(admission.cached, state.prompt_length)
            if not state.aborted:
                self._waiting.remove(state)  # others may have come before it since the plan
                self._prefilling.append(state)

    def _commit_states(self, plan: StepPlan, states: StateStep) -> None:
        assert self._slots is not None
        sequences = [*plan._decoding, *(state for state, _ in plan._chunks)]
        self._slots.commit(states, [state.tainted for state in sequences])

    def _taint(self, plan: StepPlan, degraded: NDArray[np.bool_]) -> None:
        states = [*plan._decoding, *(state for state, _ in plan._chunks)]
        hit = np.logical_or.reduceat(degraded, plan.query_start[:-1])
        for index in np.flatnonzero(hit).tolist():
            states[index].tainted = True

    def _append(self, plan: StepPlan, sampled: Sampled) -> list[TokenEvent]:
        events = []
        limit = self.limits.max_model_len
        finished = False
        for state, token, logprobs in zip(
            plan._sampled, sampled.tokens, sampled.logprobs, strict=True
        ):
            if state.aborted:
                continue
            position = state.position
            state.append(token)
            self._last[state.row] = token
            self._length[state.row] = state.computed
            finish = state.finish(limit)
            if finish is not None:
                finished = True
                del self._states[state.id]
            top = None if logprobs is None else [logprobs]
            event = TokenEvent(state.id, position, [token], top, finish, state.tainted)
            if position == 0:
                event = msgspec.structs.replace(
                    event,
                    prompt_logprobs=state.scores,
                    cached=state.cached,
                    waited=state.waited or 0.0,
                )
            state.scores = None
            events.append(event)
        self._advance(plan, events if finished else [])
        return events

    def _advance(self, plan: StepPlan, ended: list[TokenEvent]) -> None:
        """Those whose prompt is complete decode from now on; the finished go."""
        complete = [s for s in plan._sampled[plan.decodes :] if not s.aborted]
        if complete:  # the first ones: a prompt gets tokens only when those before it are complete
            self._prefilling = self._prefilling[len(complete) :]
            self._decoding += complete
            self._order = None
        if any(event.finish for event in ended):
            here = self._states
            gone = [s for s in self._decoding if here.get(s.id) is not s]
            self._decoding = [s for s in self._decoding if here.get(s.id) is s]
            self._order = None
            for state in gone:
                self._let_go(state)

    def _make_room(self) -> None:
        """Preempts the latest arrivals until every decoding sequence finds room for a token."""
        size = self.limits.block_size
        if self.pool.free_count >= len(self._decoding):
            return
        needed = [s for s in self._decoding if s.computed == len(s.blocks) * size]
        while len(needed) > self.pool.free_count:
            waits = next((s for s in reversed(self._waiting) if s.blocks), None)
            victim = waits or self._least()
            self._release(victim)
            if waits is None:
                self._queue(victim, first=True)
            self._order = None
            self.preemptions += 1
            if victim in needed:
                needed.remove(victim)

    def _least(self) -> _Scheduled:
        """Takes out who runs with the lowest priority; of those who prefill, then the latest."""
        lowest = max(s.params.priority for s in (*self._decoding, *self._prefilling))
        for queue in (self._prefilling, self._decoding):
            for state in reversed(queue):
                if state.params.priority == lowest:
                    queue.remove(state)
                    return state
        raise AssertionError

    def _queue(self, state: _Scheduled, *, first: bool = False) -> None:
        """Lets it wait behind those that have blocks and those with a priority that is higher, or
        equal. first: of its equals it is the first."""
        own = state.params.priority - first
        at = len(self._waiting)
        while at > 0:
            other = self._waiting[at - 1]
            if other.blocks or other.params.priority <= own:
                break
            at -= 1
        self._waiting.insert(at, state)

    def _publish(self, state: _Scheduled, since: int) -> None:
        """Publishes the blocks of `state` that became full since `since` tokens were computed."""
        if not self.limits.prefix_cache or state.tainted:
            return
        size = self.limits.block_size
        first, last = since // size, state.computed // size
        self._chain(state, last)
        for index in range(first, last):
            self.pool.publish(state.blocks[index], state.digests[index])

    def _chain(self, state: _Scheduled, blocks: int) -> list[bytes]:
        salt = state.params.cache_salt
        return chain(state.tokens, self.limits.block_size, state.digests, blocks, salt)

    def _release(self, state: _Scheduled) -> None:
        """Gives back the blocks and the row of a sequence, as far as it has them."""
        self.pool.free(state.blocks)
        if self._slots is not None:
            self._slots.release(state.state)
        if state.row >= 0:
            self._free_rows.append(state.row)
        state.blocks, state.computed, state.row, state.tainted = [], 0, -1, False
        if state.scores:
            state.scores = []

    def _drop_orphans(self, ended: StepPlan, before: StepPlan | None = None) -> None:
        """What is gone and was part of a plan that has ended gives its blocks back.

        before: may have it as well, and is still in flight.
        """
        kept = []
        for state, last in self._orphans:
            if last is not ended:
                kept.append((state, last))
            elif before is not None:
                kept.append((state, before))
            else:
                self._release(state)
        self._orphans = kept

    def _check_in_flight(self, plan: StepPlan, at: int) -> None:
        if not self._plans or plan is not self._plans[at]:
            raise ValueError("this plan is not the one in flight that ends next")
