"""One rank: the step loop in lock-step with the active ranks, and its changes of epoch.

    vote      have I work, which epoch am I ready for; nobody has work → sleep
    forward   attention over own requests, every MoE layer's exchange; without tokens only these
    publish   the step is whole → sample, append, tell the listener

Who may call what: `run` belongs to the main thread. Commands (`admit`, `abort`, `prepare`,
`commit`, `cancel`, `stop`) come from any thread; they are queued and take effect between steps.
"""

from __future__ import annotations

import contextlib
import os
import struct
import threading
import time
import traceback
from collections import abc, deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from flexpert.comm import (
    Buffer,
    CommError,
    Interrupted,
    RankLost,
    RankTimeout,
)
from flexpert.config import EngineConfig
from flexpert.engine.arrivals import Arrivals
from flexpert.engine.background import Fetch, Preparation
from flexpert.engine.device_profile import WarmUp, profile_of
from flexpert.engine.epoch import EpochPlan, PreparedEpoch, Weights, prepare_epoch
from flexpert.engine.faults import Faults
from flexpert.engine.memory_plan import (
    SERVING_BYTES,
    RankMemory,
    buffer_spec,
    kv_blocks,
    planned_memory,
    private_memory,
)
from flexpert.engine.request import HeldKV, KVMigration, Sequence, TokenEvent
from flexpert.engine.sampler import Sampler
from flexpert.engine.scheduler import EngineLimits, Scheduler, StepPlan
from flexpert.engine.sequence import Sampled, SampleState
from flexpert.errors import FlexpertError
from flexpert.models.batch import ForwardBatch
from flexpert.models.kv_cache import KVCache
from flexpert.models.model_runner import ModelRunner
from flexpert.models.source import ModelSource
from flexpert.moe.moe_layers import LayerState
from flexpert.moe.runtime import warmup_tables

THREADED_HIDDEN = 2048
_REST_S = 0.1  # outside of an epoch: then it looks around, and shows that it does not hang

Samples = abc.Sequence[SampleState]

# What adding or sampling one sequence may raise; more than that concerns the whole rank.
_FAULTS = (ValueError, TypeError, LookupError, ArithmeticError)

_VOTE = struct.Struct("<BI")  # has work, ready for epoch


class RankListener(Protocol):
    """Whom a rank tells. Calls come from the step loop, preparations from their own thread."""

    def published(self, events: list[TokenEvent]) -> None: ...
    def rejected(self, sequence_id: str, error: str, fault: bool = False) -> None: ...
    def on_trial(self, sequence_id: str) -> None: ...
    def progress(self, epoch: int, share: float) -> None: ...
    def prepared(self, epoch: int, copied: int, memory: RankMemory) -> None: ...
    def failed(self, epoch: int, error: str) -> None: ...
    def switched(self, epoch: int, pause_ms: float | None) -> None: ...
    def offered(self, epoch: int, held: list[HeldKV]) -> None: ...
    def fetched(self, epoch: int, source: int, size: int) -> None: ...
    def handed_over(self, epoch: int, held: list[HeldKV]) -> None: ...
    def adopted(self, source: int, moved: int, size: int, recomputed: int) -> None: ...
    def broken(self, epoch: int, ranks: tuple[int, ...], error: str) -> None: ...


class RankEngine:
    """The engine of one rank; see the module's docstring."""

    def __init__(
        self,
        rank: int,
        source: ModelSource,
        config: EngineConfig,
        *,
        capacity: int,
        exchange_timeout_s: float,
        listener: RankListener,
        faults: Faults | None = None,
    ) -> None:
        info = source.info
        self.source = source
        self.config = config
        self.capacity = capacity
        self.exchange_timeout_s = exchange_timeout_s
        self.profile = profile_of(config, rank)
        spec = buffer_spec(info, config, capacity)
        buffer = self.profile.make_exchange(rank, spec, exchange_timeout_s, info.experts)
        self.listener = faults.listening(listener) if faults else listener
        self.buffer: Buffer = faults.around(buffer) if faults else buffer
        self._faults = faults
        self.moe = self.profile.make_moe_layers(self.buffer, source)
        blocks = kv_blocks(info, config)
        # peers read the cache of a rank that leaves
        self.exported = self.profile.export_kv_cache(
            KVCache.nbytes(info, blocks, config.kv_block_size)
        )
        self.runner = ModelRunner.load(
            source,
            moe=self.moe,
            kv_blocks=blocks,
            kv_block_size=config.kv_block_size,
            deterministic=config.deterministic,
            kv_memory=self.exported.bytes,
            device=self.profile.device,
            kernels=self.profile.make_kernels(),
        )
        self.scheduler = Scheduler(
            EngineLimits(
                max_tokens_per_step=config.max_tokens_per_step,
                max_running=config.max_running,
                max_model_len=info.max_model_len,
                blocks=blocks,
                block_size=config.kv_block_size,
                prefix_cache=config.prefix_cache,
            )
        )
        self.store = self.profile.make_expert_store(source)
        self.sampler = Sampler(greedy_on_device=self.profile.samples_on_device)
        self.steps = 0
        self._on_trial: set[str] = set()  # sequences whose first step must be announced
        self._runtime: int | None = None
        self._unfit = ""  # why this rank can compute nothing

        self._commands: deque[Callable[[], None]] = deque()
        self._wake = threading.Event()
        self._stopping = False
        self._turns = 0  # of the loop, and commands

        self._member = False
        self._left = False
        self._weights: Weights = {}
        self._preparing: Preparation | None = None
        self._latest: Preparation | None = None  # perhaps withdrawn, perhaps still at work
        self._prepared: PreparedEpoch | None = None
        self._armed = 0  # the epoch this rank votes for; 0 = none
        self._must_vote = False  # newly armed, or in an epoch whose first vote is still to come
        self._entering: _Switch | None = None
        self._last_step_end: float | None = None
        self._halted: float | None = None  # since when it waits for the epoch after a loss
        self._fetches: dict[int, Fetch] = {}  # from ranks that leave

    # ---- commands, from any thread ----------------------------------------------------------

    def admit(self, sequences: list[Sequence]) -> None:
        """Run these; a rank that has left hands them over at once."""
        self._submit(lambda: self._admit(sequences))

    def abort(self, ids: list[str]) -> None:
        """Forget these; unknown ids are ignored."""
        self._submit(lambda: self._abort(ids))

    def prepare(self, plan: EpochPlan) -> None:
        """Get ready for an epoch in a thread beside serving; ends in `prepared` or `failed`."""
        self._submit(lambda: self._prepare(plan))

    def commit(self, epoch: int) -> None:
        """Vote for the prepared epoch; a rank that is no member yet enters it."""
        self._submit(lambda: self._commit(epoch))

    def cancel(self, epoch: int) -> None:
        """Drop what was prepared for an epoch."""
        self._submit(lambda: self._cancel(epoch))

    def offer(self, epoch: int) -> None:
        """Tell what KV blocks could move ahead of the epoch in which this rank leaves."""
        self._submit(lambda: self._offer(epoch))

    def fetch(self, epoch: int, source: int, address: bytes, migrations: list[KVMigration]) -> None:
        """Copy KV blocks of sequences that will come with the epoch; ends in `fetched`."""
        self._submit(lambda: self._begin_fetch(epoch, source, address, migrations))

    def adopt(self, source: int, address: bytes, migrations: list[KVMigration]) -> None:
        """Go on with these; all that comes from a rank that has left. Ends in `adopted`."""
        self._submit(lambda: self._adopt(source, address, migrations))

    def halt(self) -> None:
        """Drop the step under way, and exchange nothing until the next epoch."""
        self._submit(self._halt)
        # afterwards: an epoch that is entered meanwhile forgets interrupts, and must find the halt
        self.buffer.interrupt()

    def hold(self, members: list[int]) -> None:
        """Part from all but these: the others are gone, and new ones may get their ids."""
        self._submit(lambda: self.buffer.disconnect(set(self.buffer.connected) - set(members)))

    @property
    def turns(self) -> int:
        """Grows while the step loop computes, waits or rests; if it does not, see `watchdog`."""
        return self._turns + self.moe.walked + self.buffer.turns

    def stop(self) -> None:
        """End `run` after the current step."""
        self._submit(self._stop)

    def _submit(self, command: Callable[[], None]) -> None:
        self._commands.append(command)
        self._wake.set()
        self.buffer.ring()

    def _take_commands(self) -> None:
        self._wake.clear()
        while self._commands:
            self._turns += 1
            self._commands.popleft()()

    def _stop(self) -> None:
        self._stopping = True

    def _halt(self) -> None:
        self._drop_preparation()
        self._armed, self._entering = 0, None
        if self._member:
            self._leave_epoch()

    def _leave_epoch(self) -> None:
        """The epoch is broken for this rank: it waits outside for the next one."""
        self._member = False
        self._halted = self._last_step_end or time.perf_counter()

    def _admit(self, sequences: list[Sequence]) -> None:
        if self._left:
            held = [HeldKV(sequence.id, 0, []) for sequence in sequences]
            self.listener.handed_over(self.buffer.epoch, held)
            return
        for sequence in sequences:
            self._announce(sequence)
            try:
                self.scheduler.add(sequence)
            except FlexpertError as error:
                self.listener.rejected(sequence.id, str(error))
            except _FAULTS as error:
                self._failed(sequence.id, error)

    def _abort(self, ids: list[str]) -> None:
        self._on_trial.difference_update(ids)
        for name in ids:
            self.scheduler.abort(name)

    # ---- sequences that move with their KV --------------------------------------------------

    def _offer(self, epoch: int) -> None:
        if self._prepared and self._prepared.plan.epoch == epoch:
            self.listener.offered(epoch, self.scheduler.offer())

    def _begin_fetch(
        self, epoch: int, source: int, address: bytes, migrations: list[KVMigration]
    ) -> None:
        if self._prepared is None or self._prepared.plan.epoch != epoch:
            return  # withdrawn meanwhile
        migrations = self._credible(migrations)
        arrivals = Arrivals(self.scheduler.pool)
        pairs = arrivals.reserve(migrations, spare=self.scheduler.running + len(migrations))
        fetch = self._fetches[source] = Fetch(
            epoch,
            source,
            arrivals,
            pairs,
            own=self.runner.kv,
            theirs=lambda: self._cache_at(address),
            done=lambda which, copied: self._submit(lambda: self._fetched(which, copied)),
        )
        fetch.start()

    def _fetched(self, fetch: Fetch, copied: int | None) -> None:
        """The thread is through; in the step loop's thread."""
        if copied is not None:
            fetch.arrivals.settle()
        if copied is None or fetch.dropped:
            fetch.arrivals.drop()
        fetch.over = True
        if not fetch.dropped:
            self.listener.fetched(fetch.epoch, fetch.source, copied or 0)

    def _drop_fetches(self) -> None:
        for fetch in self._fetches.values():
            fetch.drop()
        self._fetches.clear()

    def _adopt(self, source: int, address: bytes, migrations: list[KVMigration]) -> None:
        if self._left:
            self._admit([move.sequence for move in migrations])
            return
        fetch = self._fetches.pop(source, None)
        moved = copied = recomputed = 0
        theirs = fetch.theirs if fetch else None
        migrations = self._credible(migrations)
        if theirs is None and any(move.held.computed for move in migrations):
            # it is gone, or its address is none: all is computed again
            with contextlib.suppress(CommError, ValueError):
                theirs = self._cache_at(address)
        for sequence, held in ((move.sequence, move.held) for move in migrations):
            self._announce(sequence)
            have = fetch.arrivals.take(sequence.id) if fetch and fetch.over else []
            there = held if theirs else HeldKV(sequence.id, 0, [])
            try:
                pairs = self.scheduler.adopt(sequence, there, have)
            except FlexpertError as error:
                self.listener.rejected(sequence.id, str(error))
                continue
            except _FAULTS as error:
                self._failed(sequence.id, error)
                continue
            if pairs is None:
                recomputed += held.computed
                continue
            if theirs and pairs:
                copied += self.runner.kv.copy_from(theirs, pairs)
            self.scheduler.settle(sequence.id)
            moved += 1
        if fetch:
            fetch.drop()
        self.listener.adopted(source, moved, copied, recomputed)

    def _announce(self, sequence: Sequence) -> None:
        """The first step with it is told, if it may be what ends ranks."""
        if sequence.on_trial:
            self._on_trial.add(sequence.id)

    def _credible(self, migrations: list[KVMigration]) -> list[KVMigration]:
        """What the rank they come from says it holds, where that can be; else it holds nothing."""
        size, blocks = self.config.kv_block_size, self.runner.kv.blocks

        def checked(migration: KVMigration) -> KVMigration:
            sequence, held = migration.sequence, migration.held
            tokens = len(sequence.prompt) + len(sequence.generated)
            right = (
                0 <= held.computed <= tokens
                and len(held.blocks) == -(-held.computed // size)
                and all(0 <= block < blocks for block in held.blocks)
            )
            return migration if right else KVMigration(sequence, HeldKV(sequence.id, 0, []))

        return [checked(migration) for migration in migrations]

    def _cache_at(self, address: bytes) -> KVCache:
        """A peer's KV cache. Raises: PeerUnreachable; ValueError: that is no address"""
        kv, size = self.runner.kv, self.config.kv_block_size
        memory = self.profile.import_memory(address)
        return KVCache(self.source.info, kv.blocks, size, memory.bytes)

    # ---- preparing an epoch -----------------------------------------------------------------

    def _prepare(self, plan: EpochPlan) -> None:
        self._drop_preparation()
        self._preparing = self._latest = Preparation(
            plan,
            work=self._work_of(plan),
            undo=lambda result: self._undo(plan, result),
            done=lambda which, result: self._submit(lambda: self._loaded(which, result)),
            after=self._latest,
        )
        cold = self.buffer.epoch == 0 and self.runner.graphs is None
        if cold and self.profile.warm_up is WarmUp.BEFORE_LOADING:
            self._capture()
        self._preparing.start()
        if cold and self.profile.warm_up is WarmUp.WHILE_LOADING:
            self._capture()

    def _work_of(self, plan: EpochPlan) -> Callable[[threading.Event], PreparedEpoch]:
        def work(cancelled: threading.Event) -> PreparedEpoch:
            return prepare_epoch(
                plan,
                buffer=self.buffer,
                source=self.source,
                held=self._weights,
                store=self.store,
                deterministic=self.config.deterministic,
                cancelled=cancelled,
                progress=lambda share: self.listener.progress(plan.epoch, share),
            )

        return work

    def _undo(self, plan: EpochPlan, result: PreparedEpoch | str) -> None:
        """Back to how it was; may run in the preparation's thread."""
        self._forget_peers(plan)
        if not isinstance(result, str):
            self._drop_experts(result)

    def _loaded(self, preparation: Preparation, result: PreparedEpoch | str) -> None:
        """The thread is through; in the step loop's thread."""
        if preparation is not self._preparing:
            return
        self._preparing = None
        epoch = preparation.plan.epoch
        try:
            if isinstance(result, str):
                raise FlexpertError(result)
            if self._unfit:
                raise FlexpertError(self._unfit)
            late = self.profile.warm_up is WarmUp.AFTER_LOADING
            if late and self.buffer.epoch == 0 and result.layers:
                self._warm_up(result)
        except (FlexpertError, CommError, OSError, RuntimeError) as error:
            self._undo(preparation.plan, result)
            self.listener.failed(epoch, str(error))
            return
        self._prepared = result
        memory = self._plan_memory(result)
        self.listener.prepared(epoch, result.copied, memory)

    def _plan_memory(self, prepared: PreparedEpoch) -> RankMemory:
        planned = planned_memory(
            self.source,
            self.config,
            self.capacity,
            len(prepared.weights),
            len(prepared.plan.members),
        )
        if self._runtime is None:  # warm, and nothing served yet: the rest is the process itself
            process = self.private_memory() - planned.dense - planned.experts
            self._runtime = max(0, process) + SERVING_BYTES
        return replace(planned, runtime=self._runtime)

    def private_memory(self) -> int:
        """Bytes this rank takes now; from any thread."""
        return private_memory(self.exported.resident + self.store.resident)

    def _cancel(self, epoch: int) -> None:
        if self._armed != epoch:  # else too late: the epoch may already be agreed
            self._drop_preparation()

    def _drop_preparation(self) -> None:
        """Back to how it was before `_prepare`."""
        self.scheduler.withdraw()
        self._drop_fetches()
        if self._preparing:
            self._preparing.cancel()
            self._preparing = None
        if self._prepared:
            self._undo(self._prepared.plan, self._prepared)
            self._prepared = None

    def _drop_experts(self, prepared: PreparedEpoch) -> None:
        """Give back the memory of experts that were loaded in vain."""
        self.store.drop(set(prepared.weights) - set(self._weights))

    def _forget_peers(self, plan: EpochPlan) -> None:
        self.buffer.disconnect(set(plan.members) - set(self.buffer.active))

    def _warm_up(self, prepared: PreparedEpoch) -> None:
        """Walk the model alone, so that the first step with others pays no first-call costs."""
        tables = warmup_tables(prepared.plan.placement, self.buffer.rank)
        self.moe.install(
            [
                LayerState(table, layer.experts)
                for table, layer in zip(tables, prepared.layers, strict=True)
            ]
        )
        self._set_threads(len(prepared.plan.members))
        if all(table.slots for table in tables):
            self._walk_alone()
        self.moe.install([])

    def _capture(self) -> None:
        """Capture the decode steps, and compile all else; no expert needs to be there."""
        limits = self.scheduler.limits
        try:
            if self.buffer.capturable:
                sizes = self.profile.graph_sizes(min(limits.max_running, self._room))
                self.runner.capture(sizes, limits.longest_table)
            self._walk_alone()
        except (CommError, RuntimeError) as error:
            self._unfit = f"{type(error).__name__}: {error}"

    def _walk_alone(self) -> None:
        """One of each shape of products, which would otherwise be compiled while serving."""
        limits = self.scheduler.limits
        for rows in self.profile.warm_up_sizes(self._room):
            self.runner.forward(_warmup_batch(rows, limits.block_size, limits.max_running))

    @property
    def _room(self) -> int:
        """Tokens of the largest step."""
        limits = self.scheduler.limits
        return min(limits.max_tokens_per_step, limits.blocks * limits.block_size)

    def _set_threads(self, members: int) -> None:
        cores = len(os.sched_getaffinity(0))
        # Sleeping threads take longer to wake than small products take: with 256 channels two
        # threads gave 1,190 tokens/s where one gave 2,080, with 1,024 channels they gave the same.
        worth_it = self.source.info.hidden >= THREADED_HIDDEN
        share = self.config.threads or (max(1, cores // members) if worth_it else 1)
        # one thread: how a product is split over threads must not decide its bits
        torch.set_num_threads(1 if self.config.deterministic else share)

    # ---- switching epochs -------------------------------------------------------------------

    def _commit(self, epoch: int) -> None:
        if self._prepared is None or self._prepared.plan.epoch != epoch:
            self.listener.failed(epoch, f"epoch {epoch} is not prepared on this rank")
            return
        self._armed = epoch
        if self._faults:
            self._faults.at("armed")
        if self._member:
            self._must_vote = True
        else:
            self._switch(since=self._halted)

    def _switch(self, since: float | None) -> None:
        """Leave the old epoch, enter the prepared one. since: when serving paused, or newcomer."""
        prepared = self._prepared
        assert prepared is not None  # both callers just checked
        self._prepared, self._armed = None, 0
        plan = prepared.plan
        if self.buffer.rank not in plan.members:
            self._member, self._left = False, True
            self.listener.handed_over(plan.epoch, self.scheduler.hand_over())
            return
        gone = set(self.buffer.active) - set(plan.members)
        self.buffer.set_active(plan.members, plan.epoch)
        self.buffer.disconnect(gone)
        self.moe.install(prepared.layers)
        self.store.drop(set(self._weights) - set(prepared.weights))
        self._weights = prepared.weights
        self._set_threads(len(plan.members))
        self._member, self._must_vote, self._halted = True, True, None
        self._entering = _Switch(plan.epoch, since)

    # ---- the loop ---------------------------------------------------------------------------

    def run(self) -> None:
        """Serve until `stop`."""
        try:
            while True:
                self._take_commands()
                if self._stopping:
                    break
                self._turns += 1
                if not self._member:
                    self._wake.wait(_REST_S)
                elif self._must_vote or self.scheduler.has_work:
                    self._guarded(self._round)
                elif self._guarded(lambda: self.buffer.wait_for_vote(None)):
                    self._must_vote = True
        finally:
            self._drop_preparation()
            if self._latest:
                self._latest.join(timeout=5.0)
            self.buffer.close()  # exported memory stays: the thread that measures it may still look

    def _guarded(self, action: Callable[[], bool]) -> bool:
        """Run a part of a step; a broken exchange is evidence for the coordinator, no crash."""
        try:
            return action()
        except CommError as error:
            self._leave_epoch()
            if not isinstance(error, Interrupted):
                ranks = error.ranks if isinstance(error, RankLost | RankTimeout) else ()
                self.listener.broken(self.buffer.epoch, ranks, str(error))
            return False

    def _round(self) -> bool:
        """One vote, and what it decides: a switch, a step, or nothing."""
        self._must_vote = False
        self.buffer.post_vote(_VOTE.pack(self.scheduler.has_work, self._armed))
        votes = [
            _VOTE.unpack(vote)
            for vote in self.buffer.collect_votes(self.exchange_timeout_s).values()
        ]
        now = time.perf_counter()
        if self._entering:
            since = self._entering.since
            pause_ms = None if since is None else (now - since) * 1e3
            self.listener.switched(self._entering.epoch, pause_ms)
            self._entering = None
        work = any(has_work for has_work, _ in votes)
        if self._armed and all(ready == self._armed for _, ready in votes):
            # Nothing was decoded between the last step and here if anybody has work.
            self._switch(since=(self._last_step_end if work else None) or now)
            return True
        if work:
            self._step()
        self._last_step_end = time.perf_counter() if work else None
        return True

    def _step(self) -> None:
        if not self.scheduler.has_work:
            self._idle()
            self.steps += 1
            return
        plan = self.scheduler.plan()
        if plan.tokens == 0:
            self.scheduler.rollback(plan)
            self._idle()
            return
        for name in self._on_trial.intersection(plan.ids if self._on_trial else ()):
            self._on_trial.discard(name)
            self.listener.on_trial(name)
        if self._faults:
            self._faults.at("forward", plan.token_ids)
        try:
            logits = self.runner.forward(_batch(plan))
            self.buffer.check()
        except CommError:
            self.scheduler.rollback(plan)
            raise
        self.steps += 1
        sampled = self._sample(logits, plan.samples)
        lost = self.moe.lost_rows()
        events = self.scheduler.commit(plan, sampled, None if lost is None else lost.numpy())
        self.listener.published(events)

    def _sample(self, logits: torch.Tensor, samples: Samples) -> Sampled:
        """One token for each; a sequence that cannot be sampled fails, and the others go on."""
        try:
            return self.sampler.sample(logits, samples)
        except _FAULTS:
            each = [self._sample_one(logits[i : i + 1], s) for i, s in enumerate(samples)]
        return Sampled([one.tokens[0] for one in each], [one.logprobs[0] for one in each])

    def _sample_one(self, row: torch.Tensor, sample: SampleState) -> Sampled:
        try:
            return self.sampler.sample(row, [sample])
        except _FAULTS as error:
            self.scheduler.abort(sample.id)
            self._failed(sample.id, error)
            return Sampled([0], [None])

    def _failed(self, sequence_id: str, error: Exception) -> None:
        """By a fault of ours that only one sequence brings about."""
        traceback.print_exception(error)
        why = f"the request could not be computed: {type(error).__name__}: {error}"
        self.listener.rejected(sequence_id, why, True)

    def _idle(self) -> None:
        self.runner.forward_idle()
        self.buffer.check()


@dataclass(frozen=True, slots=True)
class _Switch:
    """Entering an epoch. since: when serving paused; None for a newcomer."""

    epoch: int
    since: float | None


def _batch(plan: StepPlan) -> ForwardBatch:
    return ForwardBatch(
        token_ids=torch.from_numpy(plan.token_ids),
        positions=torch.from_numpy(plan.positions),
        query_start=torch.from_numpy(plan.query_start),
        context_len=torch.from_numpy(plan.context_len),
        block_tables=torch.from_numpy(plan.block_tables),
        slot_mapping=torch.from_numpy(plan.slot_mapping),
        sample_rows=torch.from_numpy(plan.sample_rows),
    )


def _warmup_batch(rows: int, block_size: int, samples: int) -> ForwardBatch:
    """One sequence of `rows` tokens in the first blocks, which nobody uses before an epoch."""
    count = torch.arange(rows)
    return ForwardBatch(
        token_ids=torch.zeros(rows, dtype=torch.int64),
        positions=count,
        query_start=torch.tensor([0, rows], dtype=torch.int32),
        context_len=torch.tensor([rows], dtype=torch.int32),
        block_tables=torch.arange(-(-rows // block_size), dtype=torch.int32).unsqueeze(0),
        slot_mapping=count,
        sample_rows=count[:samples],
    )
