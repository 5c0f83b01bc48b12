"""Which tokens a rank computes in the next step, and what becomes of them. Pure.

    add → waiting ──admit──► prefilling ──prompt computed──► decoding ──finished──► gone
           ▲   ▲                  │                             │
    adopt ─┘   └──── preempt (blocks given back, tokens kept) ──┘

Policy: by priority, and of equals first come, first served, without overtaking; but a stream that
has begun, on a rank that was lost, goes on before others begin. A step computes one token of every
decoding sequence, then chunks of prompts in the order in which they were admitted up to the token
budget. A sequence is admitted when all blocks of its prompt are free, and a spare one for each
sequence that runs already; so only decoding can run out of blocks. Then the latest arrival, of
those with the lowest priority, is preempted and later computed again.

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

Tokens that are proposed for a sequence (`speculation`) are further rows of it, planned behind all
else that the step has: they take what is left of its budget, and blocks that nobody may need in the
next one. commit() appends what was sampled as far as what was proposed came true; the rows behind
are positions not yet counted as computed, and their blocks go back. Where layers keep a state each
of the rows has a slot of its own, and that of the last one which counts is the sequence's. What the
model itself proposes the device knows, so that the next step is planned on top of one with proposed
tokens as well, where no layer keeps a state: for the least that may come true of them, with blocks
for the most. The device adds the difference.

A step may have been whole but computed without some experts. The keys and values of its sequences
are tainted then: nobody else may find them, nor those that follow, until they are computed again.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from flexpert.engine.block_keys import KeyLog, pack_keys, stride_of
from flexpert.engine.blocks import BlockPool, chain
from flexpert.engine.draft_counts import DraftCounts
from flexpert.engine.draft_planning import plan_drafts, plan_questions
from flexpert.engine.engine_limits import EngineLimits
from flexpert.engine.request import (
    BlockChanges,
    CachedBlock,
    HeldKV,
    RequestSequence,
    TokenEvent,
    TokenLogprobs,
)
from flexpert.engine.scheduled_sequence import ScheduledSequence
from flexpert.engine.sequence import Sampled
from flexpert.engine.speculation import AT_FIRST, SequenceSpeculation
from flexpert.engine.state_slots import StatePart, StateSlots, StateStep
from flexpert.engine.step_costs import DraftPhases
from flexpert.engine.step_layout import lay_out
from flexpert.engine.step_outlook import BegunPrompt, Outlook, PromptChunk, StepRoom, outlook_after
from flexpert.engine.step_plan import AdmittedPrompt, StepPlan
from flexpert.errors import ContextOverflow, RequestError, context_limit
from flexpert.speculative_settings import SpeculativeSettings

_LATELY = 0.02  # weight of the latest proposed token, of all sequences
_SPARE_BLOCKS = 8  # for each sequence of a rank that leaves: what it may need meanwhile


class Scheduler:
    """The sequences of one rank.

    running, waiting: how many. preemptions, prompt_tokens, cached_tokens: since the start; how
    often a sequence lost its blocks, tokens of all admitted prompts, and those found in the cache.
    clock: seconds; nothing is decided by it. speculative: how tokens are proposed; None: none are.
    phases: whether they are at present; None: they are, always.
    """

    def __init__(
        self,
        limits: EngineLimits,
        clock: Callable[[], float] = time.monotonic,
        speculative: SpeculativeSettings | None = None,
        phases: DraftPhases | None = None,
    ) -> None:
        self.limits = limits
        self._clock = clock
        self._speculative = speculative
        self._by_model = self._speculative is not None and self._speculative.method == "mtp"
        self._phases = phases
        self._waited = False  # for a token, behind which something might be proposed
        self._likely = AT_FIRST  # how often tokens that the model proposed came true, lately
        self._drafted: DraftCounts | None = None
        self.pool = BlockPool(limits.blocks, limits.block_size, limits.prefix_cache)
        self._keys = KeyLog(stride_of(limits.blocks))
        self.pool.watch = self._keys.set
        self.preemptions = 0
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self._states: dict[str, ScheduledSequence] = {}
        # Each in order of arrival; and all that decode came before all that prefill, and these
        # before all that wait: admission, completion and preemption keep it so.
        self._decoding: list[ScheduledSequence] = []
        self._prefilling: list[ScheduledSequence] = []
        self._waiting: deque[ScheduledSequence] = deque()
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
        self._ahead: Outlook | None = None  # see `_look_ahead`
        # gone, but part of plans up to this one
        self._orphans: list[tuple[ScheduledSequence, StepPlan]] = []
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
        used = self._plans[0].used_before if self._plans else self.pool.used
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

    def draft_counts(self) -> DraftCounts | None:
        """What became of proposed tokens since the last call; None: there were none."""
        counts, self._drafted = self._drafted, None
        return counts

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
        state = ScheduledSequence(sequence, self._clock())
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

    def _let_go(self, state: ScheduledSequence) -> None:
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

    def _go_on(self, state: ScheduledSequence, decodes: bool) -> None:
        """A sequence that has come with its blocks runs at once."""
        state.row = self._free_rows.pop()
        self._tables[state.row, : len(state.blocks)] = state.blocks
        self._held[state.row] = len(state.blocks)
        if decodes:
            self._last[state.row] = state.tokens[-1]
            self._length[state.row] = state.computed
            self._begin_decoding([state])
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
        return len(self._plans) == 1 and self._look_ahead() is not None

    def _look_ahead(self) -> Outlook | None:
        """What is planned on top of the plan in flight; kept until anything changes."""
        first = self._plans[0]
        if self._ahead is None and self._goes_on_unseen(first):
            after = outlook_after(first, self._prefilling, self.limits.max_model_len)
            # what both steps decode may need a block each, and the next one another
            most = 2 * (self._tokens_left - 1) // self.limits.block_size + 1
            enough = self.pool.free_count >= 2 * most * (after.running + 1)
            if self._slots is not None:
                enough = enough and self._slots.free >= self.limits.rows
            if after.running > 0 and enough:
                self._ahead = after
        return self._ahead

    @property
    def _tokens_left(self) -> int:
        """That a step leaves on the device for each sequence: what it said, and what the model
        proposes."""
        settings = self._speculative
        return 1 + settings.num_speculative_tokens if settings and self._by_model else 1

    def _goes_on_unseen(self, first: StepPlan) -> bool:
        """Whether the next step does not depend on which tokens come of this one."""
        if not all(s.goes_on_unseen for s in first.sampled):
            return False
        if self._speculative is None:
            return True
        if self._slots is not None and first.drafts is not None:
            return False  # the host knows which of its states counts when the step is whole
        if self._by_model:  # from `min_tokens` on they may be others, wherever that is
            return first.drafts is None or not any(s.must_go_on for s in first.decoding)
        few = len(first.sampled) < self._speculative.max_rows
        self._waited = (
            few
            and self._proposes
            and any(
                s.speculation is not None and s.speculation.expects(s.tokens)
                for s in first.decoding
            )
        )
        return first.drafts is None and not self._waited

    @property
    def _proposes(self) -> bool:
        """Whether tokens are proposed in the steps that are planned now."""
        return self._speculative is not None and (self._phases is None or self._phases.on)

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
        room = StepRoom(
            self.limits.max_tokens_per_step - len(now.rows), self.limits.max_scored_per_step
        )
        chunks: list[PromptChunk] = []
        for begun in now.prefilling:
            chunk = room.chunk(begun)
            if chunk.end > chunk.start:
                chunks.append(chunk)
        admitted = self._admit(room, chunks, now)
        drafts, asks, extra = None, list[int](), list[tuple[ScheduledSequence, int]]()
        on, ahead = self._proposes, now.sources is not None
        if self._speculative is not None and on and (self._by_model or not ahead):
            drafts = plan_drafts(
                now,
                len(now.rows) + sum(chunk.end - chunk.start for chunk in chunks),
                self._speculative,
                max_tokens=self.limits.max_tokens_per_step,
                max_model_len=self.limits.max_model_len,
                most=self._slots.free - len(now.rows) - len(chunks) if self._slots else None,
            )
        if self._speculative is not None and self._by_model:
            asks = plan_questions(
                now,
                chunks,
                self._speculative,
                max_model_len=self.limits.max_model_len,
                block_size=self.limits.block_size,
                on=on,
            )
        if drafts is not None or asks:
            extra = self._take_blocks(now, drafts, asks, now.running + len(admitted), blocks)
        plan = lay_out(
            now,
            self._tables,
            self._last,
            self.limits.block_size,
            blocks=blocks,
            drafts=drafts,
            asks=asks,
            on=on,
            speculates=on and (self._by_model or drafts is not None or self._waited),
            width=self._tokens_left,
            grown=grown,
            extra=extra,
            admitted=admitted,
            chunks=chunks,
            states=self._plan_states(now, drafts, chunks),
            used=used,
            at_s=self._clock(),
        )
        self._waited = False
        self._plans.append(plan)
        return plan

    def _take_blocks(
        self,
        now: Outlook,
        drafts: list[list[int]] | None,
        asks: list[int],
        spare: int,
        blocks: NDArray[np.int64],
    ) -> list[tuple[ScheduledSequence, int]]:
        """Takes the blocks of what is proposed and is to be proposed, and adds them to `blocks`;
        where there are none to spare, it is less. What is proposed in the step in flight may come
        true: `looks_ahead` has seen that there are blocks for that. spare: blocks that are left for
        others."""
        extra = []
        size, columns = self.limits.block_size, self._tables.shape[1]
        for index, state in enumerate(now.decoding):
            draft = drafts[index] if drafts else []
            further = asks[index] - 1 if asks and asks[index] > 1 else 0
            last, held = int(now.positions[index] + now.shifts[index]), int(blocks[index])
            must = min(last // size + 1, columns) - held
            more = min((last + len(draft) + further) // size + 1, columns) - held
            if more > max(must, self.pool.free_count - spare):
                more = max(0, must)
            left = max(0, (held + max(0, more)) * size - 1 - last)
            del draft[left:]
            if further:
                asks[index] = 1 + min(further, left - len(draft))
            for block in self.pool.allocate(max(0, more)):
                self._tables[now.rows[index], blocks[index]] = block
                blocks[index] += 1
                extra.append((state, block))
        return extra

    def _outlook(self) -> Outlook:
        if self._order is None:
            self._order = np.array([s.row for s in self._decoding], dtype=np.int64)
        rows = self._order
        return Outlook(
            self._decoding,
            rows,
            self._length[rows],
            self._held[rows],
            None,
            np.zeros(len(rows), dtype=np.int64),
            np.zeros(len(rows), dtype=np.int64),
            [
                BegunPrompt(s, s.row, s.computed, len(s.blocks), s.state.slot)
                for s in self._prefilling
            ],
            [s.state.slot for s in self._decoding] if self._slots is not None else [],
        )

    def _admit(
        self, room: StepRoom, chunks: list[PromptChunk], now: Outlook
    ) -> list[AdmittedPrompt]:
        """Takes rows and blocks for the first of those who wait, and adds their chunks."""
        admitted: list[AdmittedPrompt] = []
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
            admitted.append(AdmittedPrompt(state, row, blocks, start, bool(state.blocks), slot))
            chunks.append(room.chunk(BegunPrompt(state, row, start, len(blocks), slot)))
        return admitted

    def _plan_states(
        self, now: Outlook, drafts: list[list[int]] | None, chunks: list[PromptChunk]
    ) -> StateStep | None:
        if self._slots is None:
            return None
        counts = [1 + len(draft) for draft in drafts] if drafts else [1] * len(now.decoding)
        parts = [
            StatePart(s.state, slot, at, at + count, each=True)
            for s, slot, at, count in zip(
                now.decoding, now.slots, now.positions.tolist(), counts, strict=True
            )
        ]
        for chunk in chunks:
            keep = self._kept_in(chunk)
            parts.append(StatePart(chunk.state.state, chunk.slot, chunk.start, chunk.end, keep))
        return self._slots.plan(parts, len(now.decoding))

    def _kept_in(self, chunk: PromptChunk) -> list[tuple[int, bytes]]:
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
        failed: Collection[int] = (),
        proposed: Sequence[Sequence[int]] = (),
    ) -> list[TokenEvent]:
        """The step was whole: appends, publishes, finishes; then makes room for the next one.
        Of two in flight it is the first one.

        sampled: one token for each of plan.samples. degraded: [N] bool, rows that were computed
        without some of their experts; None: no row was. scores: of each of plan.scored. failed:
        which of plan.samples could not be sampled, of those that are `supposed`. proposed: what the
        model says may follow each of plan.sampled; empty: nothing is asked of it.
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
        for state, block in (*plan.grown, *plan.extra):
            state.blocks.append(block)
            self._held[state.row] += 1
        self._keep_admitted(plan)
        runs = None if plan.drafts is None else plan.runs(sampled.tokens, failed)
        if degraded is not None:
            self._taint(plan, degraded, runs)
        for index, (state, end) in enumerate(plan.chunks, plan.decodes):
            if self._slots is not None and plan.state_step is not None:
                self._slots.commit(plan.state_step, index, end, hidden=state.tainted)
            start, state.computed = state.computed, end
            self._publish(state, start)
        events = self._append(plan, sampled, runs)
        for state, draft in zip(plan.sampled, proposed, strict=False):
            if state.speculation is not None:
                state.speculation.hear(state.tokens, draft)
        if self._plans:
            self._plans[0].hear(proposed)
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
        if self._slots is not None and plan.state_step is not None:
            self._slots.rollback(plan.state_step)
        for _state, block in reversed(plan.extra):  # in reverse order: the same come again
            self.pool.free([block])
        for admission in reversed(plan.admitted):
            self._free_rows.append(admission.row)
            if not admission.kept:
                self.pool.free(admission.blocks)
                if self._slots is not None:
                    self._slots.give_back(admission.slot)
        for _state, block in reversed(plan.grown):
            self.pool.free([block])
        self._drop_orphans(plan, self._plans[-1] if self._plans else None)
        if self._by_model and not self._plans:
            for state in self._decoding:
                self._give_back(state)

    def _roll_all_back(self) -> None:
        while self._plans:
            self.rollback(self._plans[-1])

    def _keep_admitted(self, plan: StepPlan) -> None:
        for admission in plan.admitted:
            state = admission.state
            state.row, state.blocks = admission.row, admission.blocks
            state.state.slot = admission.slot
            state.computed = admission.cached
            if state.waited is None:
                state.waited = plan.at - state.added
            self._held[state.row] = len(state.blocks)
            if not admission.kept:
                self.prompt_tokens += len(state.tokens)
                self.cached_tokens += admission.cached
                state.cached = min(admission.cached, state.prompt_length)
            if not state.aborted:
                self._waiting.remove(state)  # others may have come before it since the plan
                self._prefilling.append(state)

    def _taint(self, plan: StepPlan, degraded: NDArray[np.bool_], runs: list[range] | None) -> None:
        if runs is not None:  # what did not come true is nobody's
            degraded = degraded.copy()
            for run, end in zip(runs, plan.query_start[1 : plan.decodes + 1], strict=False):
                degraded[run.stop : end] = False
        states = [*plan.decoding, *(state for state, _ in plan.chunks)]
        hit = np.logical_or.reduceat(degraded, plan.query_start[:-1])
        for index in np.flatnonzero(hit).tolist():
            states[index].tainted = True

    def _append(
        self, plan: StepPlan, sampled: Sampled, runs: list[range] | None
    ) -> list[TokenEvent]:
        """runs: see `StepPlan.runs`; None: one sample for each sequence."""
        events = []
        limit = self.limits.max_model_len
        for index, state in enumerate(plan.sampled):
            first, count = (index, 1) if runs is None else (runs[index].start, len(runs[index]))
            if state.aborted:
                if index < plan.decodes:
                    self._decoded(plan, index, 1)
                continue
            position, finish = state.position, None
            for said, token in enumerate(sampled.tokens[first : first + count], 1):
                state.append(token)
                finish = state.finish(limit)
                if finish is not None:
                    count = said  # what was sampled behind the end is nobody's
                    break
            if index < plan.decodes:
                self._decoded(plan, index, count)
                if state.speculation is not None:
                    draft = plan.drafts[index] if plan.drafts else ()
                    self._judge(state, state.speculation, draft, count - 1)
            self._last[state.row] = state.tokens[-1]
            self._length[state.row] = state.computed
            if finish is not None:
                del self._states[state.id]
            said_of, told = slice(first, first + count), None
            if sampled.logprobs[first] is not None:
                told = [one for one in sampled.logprobs[said_of] if one is not None]
            tokens = sampled.tokens[said_of]
            event = TokenEvent(state.id, position, tokens, told, finish, state.tainted)
            if position == 0:
                event = msgspec.structs.replace(
                    event,
                    prompt_logprobs=state.scores,
                    cached=state.cached,
                    waited=state.waited or 0.0,
                )
            state.scores = None
            events.append(event)
        self._advance(plan, events)
        return events

    def _decoded(self, plan: StepPlan, index: int, count: int) -> None:
        """Keys and values, and the state, of so many further tokens of a sequence are there; blocks
        that were taken for more go back."""
        state, size = plan.decoding[index], self.limits.block_size
        before = state.computed
        state.computed += count
        full = state.computed // size
        latest = None
        if full * size > before:
            self._publish(state, before)
            if self.limits.prefix_cache and not state.tainted:
                latest = full * size, state.digests[full - 1]
        if self._slots is not None and plan.state_step is not None:
            self._slots.commit(
                plan.state_step, index, state.computed, hidden=state.tainted, latest=latest
            )
        if not self._plans:  # else the next step may need them
            self._give_back(state)

    def _give_back(self, state: ScheduledSequence) -> None:
        """Blocks of a sequence that decodes in which nothing is that counts."""
        needed = -(-state.computed // self.limits.block_size)
        if len(state.blocks) > needed:
            self.pool.free(state.blocks[needed:])
            del state.blocks[needed:]
            self._held[state.row] = needed

    def _judge(
        self,
        state: ScheduledSequence,
        speculation: SequenceSpeculation,
        draft: Sequence[int],
        accepted: int,
    ) -> None:
        """What became of what was proposed for a sequence."""
        speculation.learn(state.tokens, len(draft), accepted)
        if draft:
            for true in (*[1] * accepted, *[0] * (accepted < len(draft))):
                self._likely += _LATELY * (true - self._likely)
            counts = DraftCounts(1, len(draft), [1] * accepted)
            self._drafted = counts if self._drafted is None else self._drafted + counts

    def _begin_decoding(self, states: Sequence[ScheduledSequence]) -> None:
        """Their tokens but the last are computed."""
        self._decoding += states
        self._order = None
        if self._speculative is not None:
            for state in states:
                if state.matcher is None:
                    likely = self._likely if self._by_model else AT_FIRST
                    state.speculation = SequenceSpeculation(self._speculative, likely)

    def _advance(self, plan: StepPlan, ended: list[TokenEvent]) -> None:
        """Those whose prompt is complete decode from now on; the finished go."""
        complete = [s for s in plan.sampled[plan.decodes :] if not s.aborted]
        if complete:  # the first ones: a prompt gets tokens only when those before it are complete
            self._prefilling = self._prefilling[len(complete) :]
            self._begin_decoding(complete)
            for state in complete:  # not those that come with their KV, many in one pause
                if state.speculation is not None:
                    state.speculation.learn(state.tokens)
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

    def _least(self) -> ScheduledSequence:
        """Takes out who runs with the lowest priority; of those who prefill, then the latest."""
        lowest = max(s.params.priority for s in (*self._decoding, *self._prefilling))
        for queue in (self._prefilling, self._decoding):
            for state in reversed(queue):
                if state.params.priority == lowest:
                    queue.remove(state)
                    return state
        raise AssertionError

    def _queue(self, state: ScheduledSequence, *, first: bool = False) -> None:
        """Lets it wait behind those that have blocks and those with a priority that is higher, or
        equal; a stream that has begun, here or on a rank that was lost, before those that have not.
        first: of its equals it is the first."""
        own = _turn(state)
        at = len(self._waiting)
        while at > 0:
            other = self._waiting[at - 1]
            if other.blocks or _turn(other) < own or (_turn(other) == own and not first):
                break
            at -= 1
        self._waiting.insert(at, state)

    def _publish(self, state: ScheduledSequence, since: int) -> None:
        """Publishes the blocks of `state` that became full since `since` tokens were computed."""
        if not self.limits.prefix_cache or state.tainted:
            return
        size = self.limits.block_size
        first, last = since // size, state.computed // size
        self._chain(state, last)
        for index in range(first, last):
            self.pool.publish(state.blocks[index], state.digests[index])

    def _chain(self, state: ScheduledSequence, blocks: int) -> list[bytes]:
        salt = state.params.cache_salt
        return chain(state.tokens, self.limits.block_size, state.digests, blocks, salt)

    def _release(self, state: ScheduledSequence) -> None:
        """Gives back the blocks and the row of a sequence, as far as it has them."""
        self.pool.free(state.blocks)
        if self._slots is not None:
            self._slots.release(state.state)
        if state.row >= 0:
            self._free_rows.append(state.row)
        state.blocks, state.computed, state.row, state.tainted = [], 0, -1, False
        state.speculation = None
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


def _turn(state: ScheduledSequence) -> tuple[int, bool]:
    """Who has less comes first."""
    return state.params.priority, len(state.tokens) == state.prompt_length
