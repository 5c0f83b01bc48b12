"""One rank: the step loop in lock-step with the active ranks, and its changes of epoch.

    vote      have I work, which epoch am I ready for; nobody has work → sleep
    forward   attention over own requests, every MoE layer's exchange; without tokens only these
    publish   the step is whole → sample, append, report the tokens

Who may call what: `run` belongs to the main thread. `submit` takes commands of `rank_protocol` from
any thread; they are queued and take effect between steps. Reports come from the step loop, progress
of a preparation from its own thread, and `Halted` from the thread that submits a `Halt`.
"""

from __future__ import annotations

import contextlib
import os
import struct
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import torch

from flexpert.comm import (
    Buffer,
    CommError,
    Interrupted,
    RankLost,
    RankTimeout,
)
from flexpert.config import EngineConfig
from flexpert.engine import rank_protocol as msg
from flexpert.engine.arrivals import Arrivals
from flexpert.engine.background import (
    BackgroundEvent,
    FetchEnded,
    KVFetch,
    Preparation,
    PreparationEnded,
)
from flexpert.engine.device_profile import WarmUp, profile_of
from flexpert.engine.epoch import PreparedEpoch, Weights, prepare_epoch
from flexpert.engine.faults import Faults
from flexpert.engine.memory_plan import (
    SERVING_BYTES,
    buffer_spec,
    kv_blocks,
    planned_memory,
    private_memory,
)
from flexpert.engine.request import HeldKV, KVMigration, RequestSequence
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

Samples = Sequence[SampleState]

# What adding or sampling one sequence may raise; more than that concerns the whole rank.
_FAULTS = (ValueError, TypeError, LookupError, ArithmeticError)

_VOTE = struct.Struct("<BI")  # has work, ready for epoch


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
        report: Callable[[msg.Report], None],
        faults: Faults | None = None,
    ) -> None:
        """
        Args:
            capacity: ids that the windows have room for.
            report: called from several threads; see the module's docstring.
            faults: planted in this rank, in tests.

        Raises:
            FlexpertError, OSError, MemoryError, RuntimeError: it cannot come up.
        """
        info = source.info
        self.source = source
        self.config = config
        self.capacity = capacity
        self.exchange_timeout_s = exchange_timeout_s
        self.profile = profile_of(config, rank)
        spec = buffer_spec(info, config, capacity)
        buffer = self.profile.make_exchange(rank, spec, exchange_timeout_s, info.experts)
        self.report = faults.around_reports(report) if faults else report
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
        self._memory = 0  # bytes of this process when it was last measured
        self._runtime: int | None = None  # planned; unknown until the rank is warm
        self._unfit = ""  # why this rank can compute nothing

        self._handlers: dict[type, Callable[[Any], None]] = {
            msg.Admit: self._admit,
            msg.Abort: self._abort,
            msg.Prepare: self._prepare,
            msg.Commit: self._commit,
            msg.Cancel: self._cancel,
            msg.Offer: self._offer,
            msg.Fetch: self._begin_fetch,
            msg.Adopt: self._adopt,
            msg.Halt: self._halt,
            msg.Hold: self._hold,
            msg.Stop: self._stop,
            PreparationEnded: self._preparation_ended,
            FetchEnded: self._fetch_ended,
        }
        self._queue: deque[msg.Command | BackgroundEvent] = deque()
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
        self._fetches: dict[int, KVFetch] = {}  # from ranks that leave

    # ---- commands, from any thread ----------------------------------------------------------

    def submit(self, command: msg.Command) -> None:
        """Queue a command for between two steps; from any thread.

        A `Halt` also breaks off the step under way, and is acknowledged at once: that the process
        hears does not depend on its step loop.
        """
        self._enqueue(command)
        if isinstance(command, msg.Halt):
            # afterwards: an epoch that is entered meanwhile forgets interrupts, and must find the
            # halt
            self.buffer.interrupt()
            self.report(msg.Halted(command.epoch))

    @property
    def turns(self) -> int:
        """Grows while the step loop computes, waits or rests; if it does not, see `watchdog`."""
        return self._turns + self.moe.walked + self.buffer.turns

    def _enqueue(self, event: msg.Command | BackgroundEvent) -> None:
        self._queue.append(event)
        self._wake.set()
        self.buffer.ring()

    def _handle_queued(self) -> None:
        self._wake.clear()
        while self._queue:
            self._turns += 1
            event = self._queue.popleft()
            self._handlers[type(event)](event)

    def _stop(self, command: msg.Stop) -> None:
        self._stopping = True

    def _hold(self, command: msg.Hold) -> None:
        """The others are gone, and new ones may get their ids."""
        self.buffer.disconnect(set(self.buffer.connected) - set(command.members))

    def _halt(self, command: msg.Halt) -> None:
        self._drop_preparation()
        self._armed, self._entering = 0, None
        if self._member:
            self._leave_epoch()

    def _leave_epoch(self) -> None:
        """The epoch is broken for this rank: it waits outside for the next one."""
        self._member = False
        self._halted = self._last_step_end or time.perf_counter()

    def _admit(self, command: msg.Admit) -> None:
        if self._left:
            self._hand_back(command.sequences)
            return
        for sequence in command.sequences:
            self._announce(sequence)
            try:
                self.scheduler.add(sequence)
            except FlexpertError as error:
                self.report(msg.Rejected(sequence.id, str(error)))
            except _FAULTS as error:
                self._failed(sequence.id, error)

    def _hand_back(self, sequences: list[RequestSequence]) -> None:
        """This rank has left: what comes late goes on elsewhere, and it holds nothing of it."""
        held = [HeldKV(sequence.id, 0, []) for sequence in sequences]
        self.report(msg.HandedOver(self.buffer.epoch, held))

    def _abort(self, command: msg.Abort) -> None:
        self._on_trial.difference_update(command.ids)
        for name in command.ids:
            self.scheduler.abort(name)

    # ---- sequences that move with their KV --------------------------------------------------

    def _offer(self, command: msg.Offer) -> None:
        if self._prepared and self._prepared.plan.epoch == command.epoch:
            self.report(msg.Offered(command.epoch, self.scheduler.offer()))

    def _begin_fetch(self, command: msg.Fetch) -> None:
        if self._prepared is None or self._prepared.plan.epoch != command.epoch:
            return  # withdrawn meanwhile
        migrations = self._credible(command.migrations)
        arrivals = Arrivals(self.scheduler.pool)
        pairs = arrivals.reserve(migrations, spare=self.scheduler.running + len(migrations))
        fetch = self._fetches[command.source] = KVFetch(
            command.epoch,
            command.source,
            arrivals,
            pairs,
            own=self.runner.kv,
            theirs=lambda: self._cache_at(command.kv),
            done=self._enqueue,
        )
        fetch.start()

    def _fetch_ended(self, event: FetchEnded) -> None:
        fetch, copied = event.fetch, event.copied
        if copied is not None:
            fetch.arrivals.settle()
        if copied is None or fetch.dropped:
            fetch.arrivals.drop()
        fetch.over = True
        if not fetch.dropped:
            self.report(msg.Fetched(fetch.epoch, fetch.source, copied or 0))

    def _drop_fetches(self) -> None:
        for fetch in self._fetches.values():
            fetch.drop()
        self._fetches.clear()

    def _adopt(self, command: msg.Adopt) -> None:
        if self._left:
            self._hand_back([move.sequence for move in command.migrations])
            return
        fetch = self._fetches.pop(command.source, None)
        moved = copied = recomputed = 0
        theirs = fetch.theirs if fetch else None
        migrations = self._credible(command.migrations)
        if theirs is None and any(move.held.computed for move in migrations):
            # it is gone, or its address is none: all is computed again
            with contextlib.suppress(CommError, ValueError):
                theirs = self._cache_at(command.kv)
        for sequence, held in ((move.sequence, move.held) for move in migrations):
            self._announce(sequence)
            have = fetch.arrivals.take(sequence.id) if fetch and fetch.over else []
            there = held if theirs else HeldKV(sequence.id, 0, [])
            try:
                pairs = self.scheduler.adopt(sequence, there, have)
            except FlexpertError as error:
                self.report(msg.Rejected(sequence.id, str(error)))
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
        self.report(msg.Adopted(command.source, moved, copied, recomputed))

    def _announce(self, sequence: RequestSequence) -> None:
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

    def _prepare(self, plan: msg.Prepare) -> None:
        self._drop_preparation()
        self._preparing = self._latest = Preparation(
            plan,
            work=self._work_of(plan),
            undo=lambda result: self._undo(plan, result),
            done=self._enqueue,
            after=self._latest,
        )
        cold = self.buffer.epoch == 0 and self.runner.graphs is None
        if cold and self.profile.warm_up is WarmUp.BEFORE_LOADING:
            self._capture()
        self._preparing.start()
        if cold and self.profile.warm_up is WarmUp.WHILE_LOADING:
            self._capture()

    def _work_of(self, plan: msg.Prepare) -> Callable[[threading.Event], PreparedEpoch]:
        def work(cancelled: threading.Event) -> PreparedEpoch:
            return prepare_epoch(
                plan,
                buffer=self.buffer,
                source=self.source,
                held=self._weights,
                store=self.store,
                deterministic=self.config.deterministic,
                cancelled=cancelled,
                progress=lambda share: self.report(msg.Progress(plan.epoch, share)),
            )

        return work

    def _undo(self, plan: msg.Prepare, result: PreparedEpoch | str) -> None:
        """Back to how it was; may run in the preparation's thread."""
        self._forget_peers(plan)
        if not isinstance(result, str):
            self._drop_experts(result)

    def _preparation_ended(self, event: PreparationEnded) -> None:
        preparation, result = event.preparation, event.result
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
            self.report(msg.Failed(epoch, str(error)))
            return
        self._prepared = result
        if self.buffer.epoch == 0:  # nobody waits for a newcomer yet
            self.measure_memory()
        self.report(msg.Prepared(epoch, result.copied, self._plan_memory(result)))

    def _plan_memory(self, prepared: PreparedEpoch) -> msg.Memory:
        planned = planned_memory(
            self.source,
            self.config,
            self.capacity,
            len(prepared.weights),
            len(prepared.plan.members),
        )
        if self._runtime is None:  # warm, and nothing served yet: the rest is the process itself
            process = self._memory - planned.dense - planned.experts
            self._runtime = max(0, process) + SERVING_BYTES
        return msgspec.structs.replace(planned, runtime=self._runtime)

    def measure_memory(self) -> None:
        """Find out how many bytes this rank takes, for its next reports.

        That takes milliseconds; from any thread.
        """
        self._memory = private_memory(self.exported.resident + self.store.resident)

    def _load(self) -> msg.Load:
        scheduler, graphs = self.scheduler, self.runner.graphs
        return msg.Load(
            scheduler.running,
            scheduler.waiting,
            scheduler.kv_used,
            self._memory,
            graphs.captures if graphs else 0,
        )

    def _cancel(self, command: msg.Cancel) -> None:
        if self._armed != command.epoch:  # else too late: the epoch may already be agreed
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

    def _forget_peers(self, plan: msg.Prepare) -> None:
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

    def _commit(self, command: msg.Commit) -> None:
        epoch = command.epoch
        if self._prepared is None or self._prepared.plan.epoch != epoch:
            self.report(msg.Failed(epoch, f"epoch {epoch} is not prepared on this rank"))
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
            self.report(msg.HandedOver(plan.epoch, self.scheduler.hand_over()))
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
        """Serve until `Stop`."""
        try:
            while True:
                self._handle_queued()
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
                self.report(msg.Broken(self.buffer.epoch, list(ranks), str(error)))
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
            self.report(msg.Switched(self._entering.epoch, pause_ms, self._load()))
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
            self.report(msg.OnTrial(name))
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
        self.report(msg.Published(events, self._load()))

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
        self.report(msg.Rejected(sequence_id, why, True))

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
