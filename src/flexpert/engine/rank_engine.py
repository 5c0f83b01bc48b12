"""One rank: the step loop in lock-step with the active ranks, and its changes of epoch.

    vote      have I work, which epoch am I ready for, how many tokens; nobody has work → sleep
    forward   attention over own requests, every MoE layer's exchange; without tokens only these
    publish   the step is whole → sample, append, report the tokens; before these are appended
              a model with a draft layer proposes what may follow them, in an exchange of the step

On a GPU the rank looks ahead: the next step is voted on, planned and launched while the device
computes one, whose tokens are read and published then. Nothing is in flight where a rank votes for
another epoch, nor when any command but requests is carried out. If a step was broken, what was
launched after it is rolled back as well.

Who may call what: `run` belongs to the main thread. `submit` takes commands of `rank_protocol` from
any thread; they are queued and take effect between steps. Reports come from the step loop, progress
of a preparation from its own thread, and `Halted` from the thread that submits a `Halt`.

What a command or the outcome of an exchange means is decided by `rank_states`; the methods under
"actions" carry its decisions out.
"""

from __future__ import annotations

import logging
import math
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import torch

from flexpert import heap, library_pages
from flexpert.comm import Buffer, CommError, Interrupted, RankLost, RankTimeout
from flexpert.config import EngineConfig
from flexpert.engine import rank_protocol as msg
from flexpert.engine.device_memory_plan import planned_device_memory, window_nbytes
from flexpert.engine.device_meter import DeviceMeter, Slabs
from flexpert.engine.device_profile import WarmUpTime, profile_of, set_threads
from flexpert.engine.draft_step import DraftRun, FurtherStep, draft_inputs
from flexpert.engine.engine_limits import EngineLimits
from flexpert.engine.epoch import PreparedEpoch
from flexpert.engine.faults import Faults
from flexpert.engine.grammar_preparation import GrammarPreparer, GrammarReady
from flexpert.engine.head_store import HeadMeeting, HeadStore, machine_name
from flexpert.engine.kv_transfer import FetchEnded, KVTransfer
from flexpert.engine.load_report import RoutingReport
from flexpert.engine.memory_plan import (
    MemoryMeter,
    buffer_spec,
    kv_blocks,
    most_samples,
    state_slots,
)
from flexpert.engine.output_grammar import GrammarCache
from flexpert.engine.preparation import EpochPreparer, PreparationEnded
from flexpert.engine.rank_states import (
    ExchangeState,
    RankAction,
    RankEvent,
    RankEventKind,
    RankStates,
)
from flexpert.engine.remote_peers import EXPERTS, KV, RemotePeers
from flexpert.engine.request import HeldKV, RequestSequence, TokenLogprobs
from flexpert.engine.sampler import StepSampling, StepTokens, score
from flexpert.engine.scheduler import Scheduler
from flexpert.engine.sequence import SEQUENCE_FAULTS
from flexpert.engine.sequence_intake import SequenceIntake
from flexpert.engine.step_costs import DraftPhases, StepCosts
from flexpert.engine.step_plan import ScoredChunk, StepPlan
from flexpert.engine.stopwatch import Stopwatch, in_words
from flexpert.engine.token_masks import MaskBuilder
from flexpert.engine.warm_up import WarmUp
from flexpert.errors import FlexpertError
from flexpert.kernels.device_stream import StreamEvent
from flexpert.models.batch import DraftRows, ForwardBatch
from flexpert.models.device_drafts import Proposals
from flexpert.models.fusion_verdicts import decode_verdicts
from flexpert.models.kv_cache import KVCache
from flexpert.models.model_runner import ModelRunner
from flexpert.models.source import ModelSource

log = logging.getLogger("flexpert")

_SLOW_STEP_S = 0.1  # is logged, with what took how long
_COUNT_EVERY_S = 0.25  # exchanges are looked at, which is too slow for each step
_REST_S = 0.1  # outside of an epoch: then it looks around, and shows that it does not hang

Queued: TypeAlias = msg.Command | PreparationEnded | FetchEnded | GrammarReady

VOTE = struct.Struct("<BIIBf")
"""What a rank says before a step: has work, ready for epoch, tokens of the step it has planned, the
most tokens that the model is to propose behind it for a sequence, and `StepCosts.saved`."""

_COMMANDS: Mapping[type, RankEventKind] = {
    msg.Prepare: RankEventKind.PREPARE,
    msg.Offer: RankEventKind.OFFER,
    msg.Fetch: RankEventKind.FETCH,
    msg.Commit: RankEventKind.COMMIT,
    msg.Cancel: RankEventKind.CANCEL,
    msg.Halt: RankEventKind.HALT,
}
"""Commands whose meaning depends on the rank's states."""


@dataclass(slots=True)
class _Flight:
    """A step that was launched. done: the device has computed all that it exchanges. times: how
    often the draft layer is applied behind it, on all ranks."""

    plan: StepPlan
    done: StreamEvent
    times: int
    logits: torch.Tensor | None = None
    sampling: StepSampling | None = None
    proposals: Proposals | None = None


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
        verdicts: bytes = b"",
        several_machines: bool = False,
    ) -> None:
        """
        on_attach, an attribute, is called between two steps when another head takes this rank
        over.

        Args:
            capacity: ids that the windows have room for.
            report: called from several threads; see the module's docstring.
            faults: planted in this rank, in tests.
            verdicts: encoded, of an earlier rank of the same service; b"": there is none.
            several_machines: ranks of other machines may join.

        Raises:
            FlexpertError, OSError, MemoryError, RuntimeError: it cannot come up.
        """
        self.watch = Stopwatch()
        info = source.info
        self.source = source
        self.config = config
        self.exchange_timeout_s = exchange_timeout_s
        self.profile = profile_of(config, rank)
        self.watch.lap("device")
        spec = buffer_spec(info, config, capacity)
        self.report = faults.around_reports(report) if faults else report
        self._head_store = HeadStore(self.report)
        self.machine = machine_name(config, rank)
        several = several_machines or config.transport == "nixl"
        meeting = HeadMeeting(self._head_store, self.machine, several)
        buffer = self.profile.make_exchange(rank, spec, exchange_timeout_s, info.experts, meeting)
        self.buffer: Buffer = faults.around(buffer) if faults else buffer
        self._faults = faults
        self.moe = self.profile.make_moe_layers(self.buffer, source)
        self.load_report = RoutingReport(self.moe.loads)
        self.watch.lap("exchange")
        blocks, slots = kv_blocks(info, config), state_slots(info, config)
        # peers read the cache of a rank that leaves
        self.exported = self.profile.export_kv_cache(
            KVCache.nbytes(info, blocks, config.kv_block_size, slots)
        )
        self.watch.lap("KV cache")
        self.runner = ModelRunner.load(
            source,
            moe=self.moe,
            kv_blocks=blocks,
            kv_block_size=config.kv_block_size,
            state_slots=slots,
            deterministic=config.deterministic,
            kv_memory=self.exported.bytes,
            device=self.profile.device,
            kernels=self.profile.make_kernels(),
            verdicts=decode_verdicts(verdicts),
            most_samples=most_samples(config),
            most_tokens=config.max_tokens_per_step,
            most_proposed=self._most_proposed,
            lap=self.watch.lap,
        )
        limits = EngineLimits(
            max_tokens_per_step=config.max_tokens_per_step,
            max_running=config.max_running,
            max_model_len=info.max_model_len,
            blocks=blocks,
            block_size=config.kv_block_size,
            prefix_cache=config.prefix_cache,
            state_slots=slots,
        )
        how = config.speculate
        measures = how is not None and self.profile.measures_steps
        self._costs = StepCosts(how.method) if how is not None and measures else None
        self._phases = DraftPhases() if measures else None
        self.scheduler = Scheduler(limits, speculative=how, phases=self._phases)
        self.store = self.profile.make_expert_store(rank, source)
        self._remote = RemotePeers(
            rank,
            self._head_store,
            {EXPERTS: self.store.served, KV: self.profile.served(self.exported.bytes)},
            exchange_timeout_s=exchange_timeout_s,
        )
        on_device = self.runner.device_drafts
        self.sampler = self.profile.make_sampler(
            self.runner.sampled, None if on_device is None else on_device.accepted
        )
        self.memory = MemoryMeter(
            source,
            config,
            capacity,
            lambda: self.exported.resident + self.store.resident,
            lambda: self.store.mapped,
        )
        self.device_memory = self._device_meter(capacity)
        grammars = GrammarCache(lambda: source.grammar_tokens)
        self._masks = MaskBuilder(grammars, info.vocab)
        self._grammars = GrammarPreparer(grammars, self._enqueue)
        self._intake = SequenceIntake(self.scheduler, self.report, self._grammars)
        self._transfer = KVTransfer(
            info,
            self.scheduler,
            self.runner.kv,
            self.profile,
            self._intake,
            self._remote,
            report=self.report,
            done=self._enqueue,
        )
        self._preparer = EpochPreparer(
            self.buffer,
            source,
            self.store,
            self.moe,
            self.profile.stream,
            self._head_store,
            self._remote,
            report=self.report,
            done=self._enqueue,
        )
        self._warm_up = WarmUp(
            self.runner, self.moe, self.buffer, limits, self.profile, self.sampler
        )
        self._unfit = ""  # why this rank can compute nothing

        self._queue: deque[Queued] = deque()
        self._wake = threading.Event()
        self.on_attach: Callable[[], None] = lambda: None
        self._stopping = False
        self._turns = 0  # of the loop, and commands
        self._far: list[int] = []  # peers over NIXL, in the current epoch
        self.wire_bytes: dict[int, int] = {}  # written to each of them
        self.exchanges = msg.ExchangeUse()
        self._count_at = 0.0  # when exchanges are looked at next

        self._planned: StepPlan | None = None  # and voted on, not launched yet
        self._flights: deque[_Flight] = deque()  # launched and not published, two at most
        self._states = RankStates()
        self._vote_due = False  # though there is no work: newly armed or entered, or a peer votes
        self._last_step_end: float | None = None
        self._paused_at: float | None = None  # since when nothing is served; None on a newcomer
        self._handlers: dict[type, Callable[[Any], None]] = {
            msg.Admit: self._admit,
            msg.Abort: self._abort,
            msg.Adopt: self._adopt,
            msg.Hold: self._hold,
            msg.Attach: self._attach,
            msg.Stop: self._stop,
            PreparationEnded: self._preparation_ended,
            FetchEnded: self._transfer.fetch_ended,
            GrammarReady: self._intake.grammar_ready,
            **dict.fromkeys(_COMMANDS, self._change_states),
        }
        self._actions: dict[RankAction, Callable[[Any], None]] = {
            RankAction.WITHDRAW: self._withdraw,
            RankAction.PREPARE: self._prepare,
            RankAction.REPORT_PREPARED: self._report_prepared,
            RankAction.UNDO: self._undo,
            RankAction.OFFER: self._transfer.offer,
            RankAction.FETCH: self._transfer.fetch,
            RankAction.REFUSE: self._refuse,
            RankAction.ARM: self._arm,
            RankAction.ENTER: self._enter,
            RankAction.HAND_OVER: self._hand_over,
            RankAction.REPORT_SWITCHED: self._report_switched,
            RankAction.PAUSE: self._pause,
            RankAction.REPORT_BROKEN: self._report_broken,
        }

    @property
    def _drafts(self) -> bool:
        """The model has a layer that proposes."""
        return self.runner.drafts is not None or self.runner.device_drafts is not None

    @property
    def _most_proposed(self) -> int:
        """Tokens that the model proposes where the device goes on without the host; 0: none."""
        how = self.config.speculate
        by_model = how is not None and how.method == "mtp" and self.profile.looks_ahead
        return how.num_speculative_tokens if how is not None and by_model else 0

    def _device_meter(self, capacity: int) -> DeviceMeter | None:
        """None: weights, KV cache and windows are memory of the host, and `memory` counts them."""
        if not isinstance(self.store, Slabs):
            return None
        source, config = self.source, self.config
        return DeviceMeter(
            self.profile.usage,
            self.store,
            lambda experts: planned_device_memory(source, config, capacity, experts),
            weights=self.runner.dense_nbytes,
            allocated=len(self.exported.bytes) + window_nbytes(source, config, capacity),
        )

    def warm_up(self) -> None:
        """What can be done before there are experts; else the first `Prepare` does it. Before
        `run`."""
        if self.profile.warm_up is not WarmUpTime.AFTER_LOADING and self.runner.graphs is None:
            self._unfit = self._warm_up.capture(self.watch)

    # ---- from any thread --------------------------------------------------------------------

    def measure_memory(self) -> None:
        """For `memory_use`; takes milliseconds."""
        self.memory.measure()
        if self.device_memory:
            self.device_memory.measure()

    @property
    def memory_use(self) -> msg.MemoryUse:
        """As measured last."""
        device = self.device_memory
        if device is None:
            return msg.MemoryUse(self.memory.measured)
        return msg.MemoryUse(self.memory.measured, device.used, device.spare)

    def submit(self, command: msg.Command) -> None:
        """Queue a command for between two steps.

        A `Halt` also breaks off the step under way, and is acknowledged at once: that the process
        hears does not depend on its step loop.
        """
        if isinstance(command, msg.StoreAnswer):
            self._head_store.answer(command)  # the step loop has nothing to do with it
            return
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

    def _enqueue(self, event: Queued) -> None:
        self._queue.append(event)
        self._wake.set()
        self.buffer.ring()

    # ---- commands and ends of threads, between steps ----------------------------------------

    def _handle_queued(self) -> None:
        self._wake.clear()
        while self._queue:
            self._turns += 1
            event = self._queue.popleft()
            if not isinstance(event, msg.Admit | msg.Abort | GrammarReady):
                self._guarded(self._settle)
            self._handlers[type(event)](event)

    def _admit(self, command: msg.Admit) -> None:
        if self._states.exchange is ExchangeState.LEFT:
            self._hand_back(command.sequences)
        else:
            self._intake.admit(command.sequences)

    def _adopt(self, command: msg.Adopt) -> None:
        if self._states.exchange is ExchangeState.LEFT:
            self._hand_back([move.sequence for move in command.migrations])
        else:
            self._transfer.adopt(command)

    def _hand_back(self, sequences: list[RequestSequence]) -> None:
        """This rank has left: what comes late goes on elsewhere, and it holds nothing of it."""
        held = [HeldKV(sequence.id, 0, []) for sequence in sequences]
        self.report(msg.HandedOver(self.buffer.epoch, held))

    def _abort(self, command: msg.Abort) -> None:
        self._intake.abort(command.ids)

    def _hold(self, command: msg.Hold) -> None:
        """The others are gone, and new ones may get their ids."""
        self.buffer.disconnect(set(self.buffer.connected) - set(command.members))

    def _attach(self, command: msg.Attach) -> None:
        """A new head: it is told what there is, when all that the one before has sent is done."""
        self.on_attach()

    @property
    def sequences(self) -> list[str]:
        """Ids of all that this rank has to compute; of the step loop's thread."""
        return [*self.scheduler.ids, *self._intake.ids]

    @property
    def cached_keys(self) -> bytes:
        """See `Scheduler.cached_keys`; of the step loop's thread."""
        return self.scheduler.cached_keys()

    def _stop(self, command: msg.Stop) -> None:
        self._stopping = True

    def _change_states(self, command: Any) -> None:
        stays = not isinstance(command, msg.Prepare) or self.buffer.rank in command.members
        self._handle(RankEvent(_COMMANDS[type(command)], command.epoch, stays), command)

    def _preparation_ended(self, event: PreparationEnded) -> None:
        if not self._preparer.ended(event):
            return
        try:
            self._preparer.prepared = self._usable(event.result)
        except (FlexpertError, CommError, OSError, RuntimeError) as error:
            failed = PreparationEnded(event.preparation, event.result, str(error))
            self._handle(RankEvent(RankEventKind.NOT_LOADED), failed)
        else:
            self._handle(RankEvent(RankEventKind.LOADED), self._preparer.prepared)

    def _usable(self, result: PreparedEpoch | str) -> PreparedEpoch:
        """A result that this rank can serve with. Raises: FlexpertError, CommError, OSError,
        RuntimeError"""
        if isinstance(result, str):
            raise FlexpertError(result)
        if self._unfit:
            raise FlexpertError(self._unfit)
        late = self.profile.warm_up is WarmUpTime.AFTER_LOADING
        if late and self.buffer.epoch == 0 and result.layers:
            set_threads(self.config, self.source.info.hidden, len(result.plan.members))
            self._warm_up.run(result)
        return result

    # ---- actions of the state tables --------------------------------------------------------

    def _handle(self, event: RankEvent, cause: Any = None) -> None:
        """cause: the command, result or error behind it, for the actions."""
        for action in self._states.handle(event):
            self._actions[action](cause)

    def _withdraw(self, _: object = None) -> None:
        self._transfer.withdraw()
        self._preparer.withdraw()

    def _prepare(self, plan: msg.Prepare) -> None:
        if self.buffer.epoch == 0 and self.profile.warm_up is WarmUpTime.BEFORE_LOADING:
            self.warm_up()
        self._preparer.start(plan)
        if self.buffer.epoch == 0:
            self.warm_up()

    def _report_prepared(self, result: PreparedEpoch) -> None:
        experts, members = len(result.experts), result.plan.members
        device = self.device_memory
        if self.buffer.epoch == 0:  # nobody waits for a newcomer yet
            if device:
                device.warm(alone=self.profile.alone(members))
            self.measure_memory()
        laps = {**self.watch.laps, **result.watch.laps}
        self.watch = Stopwatch()
        planned = self.memory.plan(experts, len(members))
        if self.buffer.epoch == 0:
            heap.trim()  # what the largest step needs; it is planned for, and not needed yet
            library_pages.give_back()  # what only the making of the model and its trials ran
        self.report(
            msg.Prepared(
                result.plan.epoch,
                result.copied,
                planned,
                laps,
                device.plan(experts) if device else None,
                self.memory_use,
            )
        )

    def _undo(self, failed: PreparationEnded) -> None:
        plan = failed.preparation.plan
        self._preparer.undo(plan, failed.result)
        self.report(msg.Failed(plan.epoch, failed.error))

    def _refuse(self, command: msg.Commit) -> None:
        epoch = command.epoch
        self.report(msg.Failed(epoch, f"epoch {epoch} is not prepared on this rank"))

    def _arm(self, _: object) -> None:
        if self._faults:
            self._faults.at("armed")
        self._vote_due = True

    def _enter(self, _: object) -> None:
        """Leave the old epoch, enter the prepared one."""
        self.watch = Stopwatch()
        prepared = self._preparer.take()
        plan = prepared.plan
        gone = set(self.buffer.active) - set(plan.members)
        self.buffer.set_active(plan.members, plan.epoch)
        self.buffer.disconnect(gone)
        self.watch.lap("membership")
        self.load_report.begin()
        if self._costs is not None and self._phases is not None:
            self._costs.begin()
            self._phases.begin()
        self.moe.install(prepared.staged)
        self.watch.lap("install")
        self._preparer.hold(prepared.experts)
        self.watch.lap("drop")
        set_threads(self.config, self.source.info.hidden, len(plan.members))
        self._vote_due = True

    def _hand_over(self, _: object) -> None:
        epoch = self._preparer.take().plan.epoch
        self._intake.leave()
        self.report(msg.HandedOver(epoch, self.scheduler.hand_over()))

    def _report_switched(self, now: float) -> None:
        pause_ms = None if self._paused_at is None else (now - self._paused_at) * 1e3
        self._paused_at = None
        self.watch.lap("first vote")
        laps, self.watch = self.watch.laps, Stopwatch()
        self._far = [peer for peer in self.buffer.active if self.buffer.channel(peer) == "nixl"]
        self.report(msg.Switched(self.buffer.epoch, pause_ms, self._load(), laps, self._far))

    def _pause(self, _: object) -> None:
        self._paused_at = self._last_step_end or time.perf_counter()

    def _report_broken(self, error: CommError) -> None:
        """Evidence for the coordinator."""
        ranks = error.ranks if isinstance(error, RankLost | RankTimeout) else ()
        self.report(msg.Broken(self.buffer.epoch, list(ranks), str(error)))

    def _load(self) -> msg.Load:
        scheduler, graphs = self.scheduler, self.runner.graphs
        return msg.Load(
            scheduler.running,
            scheduler.waiting,
            scheduler.kv_used,
            graphs.captures if graphs else 0,
            scheduler.preemptions,
        )

    # ---- the loop ---------------------------------------------------------------------------

    def run(self) -> None:
        """Serve until `Stop`."""
        try:
            while True:
                self._handle_queued()
                if self._stopping:
                    break
                self._turns += 1
                if not self._states.takes_part:
                    self._wake.wait(_REST_S)
                elif self._flights and not self._goes_on:
                    self._guarded(self._settle)
                elif self._vote_due or self.scheduler.has_work:
                    self._guarded(self._round)
                else:
                    self._guarded(self._await_vote)
        finally:
            self._transfer.withdraw()
            self._preparer.close()
            self._remote.close()
            self._grammars.close()
            self._masks.close()
            self.buffer.close()  # exported memory stays: the thread that measures it may still look

    def _guarded(self, action: Callable[[], None]) -> None:
        """Run a part of a step; a broken exchange is no crash."""
        try:
            action()
        except Interrupted:
            self._abandon()
            self._handle(RankEvent(RankEventKind.INTERRUPTED))
        except CommError as error:
            self._abandon()
            self._handle(RankEvent(RankEventKind.BROKEN), error)

    @property
    def _goes_on(self) -> bool:
        """Whether another step may be launched on top of the one in flight."""
        return self._states.armed_for == 0 and self.scheduler.looks_ahead

    def _await_vote(self) -> None:
        """Sleep until a peer votes or a command comes."""
        # No pause of ours begins here: we have nothing to do, and who has says so himself.
        self._last_step_end = None
        if self._costs is not None:
            self._costs.idle()
        if self.buffer.wait_for_vote(None):
            self._vote_due = True

    def _round(self) -> None:
        """One vote, and what it decides: a switch, a step, or nothing."""
        watch = Stopwatch()
        self._vote_due = False
        armed = self._states.armed_for
        self._planned = plan = self.scheduler.plan()
        watch.lap("plan")
        asked = max(plan.asks, default=0)
        saved = math.nan if self._costs is None else self._costs.saved
        vote = VOTE.pack(self.scheduler.has_work, armed, plan.tokens, asked, saved)
        self.buffer.post_vote(vote, wait=not self._flights)
        votes = [
            VOTE.unpack(vote)
            for vote in self.buffer.collect_votes(self.exchange_timeout_s).values()
        ]
        now = time.perf_counter()
        watch.lap("votes")
        self._handle(RankEvent(RankEventKind.VOTED), now)
        work = any(has_work for has_work, *_ in votes)
        if armed and all(ready == armed for _, ready, *_ in votes):
            self._drop_planned()
            # Nothing was decoded between the last step and here if anybody has work.
            self._paused_at = (self._last_step_end if work else None) or now
            self._handle(RankEvent(RankEventKind.AGREED))
            return
        if work:
            mean_tokens = -(-sum(tokens for _, _, tokens, *_ in votes) // len(votes))
            times = max(1, *(asked for *_, asked, _ in votes)) if self._drafts and plan.on else 0
            if self._phases is not None:
                self._phases.passed(saved for *_, saved in votes)
            self._step(mean_tokens, times, watch)
            self.load_report.look(now)
        else:
            self._drop_planned()
        self._count_exchanges(now, idle=not work)
        self._last_step_end = time.perf_counter() if work else None
        if sum(watch.laps.values()) > _SLOW_STEP_S:
            log.debug("rank %d took long for a step: %s", self.buffer.rank, in_words(watch.laps))

    def _count_exchanges(self, now: float, *, idle: bool) -> None:
        """For another thread to report. idle: no step follows soon."""
        if not (self._far or idle or now >= self._count_at):
            return
        self._count_at = now + _COUNT_EVERY_S
        counted = self.buffer.statistics()
        self.wire_bytes = counted.wire_bytes
        self.exchanges = msg.ExchangeUse(
            counted.exchanges,
            counted.waited_ns.get("dispatch", 0) / 1e9,
            counted.waited_ns.get("combine", 0) / 1e9,
            {
                peer: (waited + counted.combine_wait_ns[peer]) / 1e9
                for peer, waited in counted.dispatch_wait_ns.items()
                if waited and peer != self.buffer.rank
            },
            sum(counted.bytes_sent.values()),
        )

    def _step(self, mean_tokens: int, times: int, watch: Stopwatch) -> None:
        """Launch the planned step, and publish the one before, or this one where nothing goes on
        unseen. mean_tokens: of all ranks. times: see `_Flight`."""
        plan = self._planned
        assert plan is not None
        if plan.tokens == 0:
            if self._costs is not None:
                self._costs.idle()
            self._drop_planned()
            self._settle(watch)
            self.runner.forward_idle(mean_tokens, times)
            self.buffer.check()
            watch.lap("without tokens")
            return
        self._planned = None
        self._flights.append(flight := _Flight(plan, self.profile.stream.event(), times))
        self._launch(flight, mean_tokens, watch)
        while len(self._flights) > 1:
            self._publish(watch)
        if not self.profile.looks_ahead:
            self._settle(watch)

    def _drop_planned(self) -> None:
        """What was planned is not launched."""
        if self._planned is not None:
            self.scheduler.rollback(self._planned)
            self._planned = None

    def _launch(self, flight: _Flight, mean_tokens: int, watch: Stopwatch) -> None:
        plan = flight.plan
        self._intake.begin_step(plan.ids)
        self._masks.begin(plan.samples)
        if self._faults:
            self._faults.at("forward", plan.token_ids)
        watch.lap("begin")
        batch = _row_by_row(plan) if self.profile.looks_ahead else _batch(plan)
        if self.runner.device_drafts is not None:
            batch.drafts = DraftRows(*map(torch.from_numpy, astuple(draft_inputs(plan))))
        logits = self.runner.forward(batch, mean_tokens)
        # prompts are scored when the step is whole; by then the next one may be under way
        flight.logits = logits.clone() if plan.scored and self.profile.looks_ahead else logits
        flight.done.record()
        watch.lap("forward")
        masks = self._masks.finish()
        watch.lap("masks")
        words = None if masks is None else masks.words
        for row, error in (masks.failed if masks else {}).items():
            self.scheduler.abort(plan.samples[row].id)
            self.report(msg.Rejected(plan.samples[row].id, error))
        rows = flight.logits[plan.sample_at] if plan.scored else flight.logits
        flight.sampling = self.sampler.start(rows, plan.samples, words, plan.unseen)
        if self.runner.device_drafts is not None:
            flight.proposals = self.runner.propose(plan.asks, flight.times)
            flight.done.record()
            watch.lap("drafts")

    def _settle(self, watch: Stopwatch | None = None) -> None:
        """Publish what is in flight. Raises: CommError: a step was broken."""
        while self._flights:
            self._publish(watch or Stopwatch())

    def _publish(self, watch: Stopwatch) -> None:
        """Wait for the first step in flight, and if it is whole publish it.

        Raises: CommError: it was broken.
        """
        flight = self._flights[0]
        plan, logits = flight.plan, flight.logits
        assert flight.sampling is not None
        assert logits is not None
        flight.done.synchronize()
        self.buffer.check(wait=False)
        watch.lap(f"device ({plan.tokens} tokens)")
        scores = [self._score(logits, chunk) for chunk in plan.scored]
        tokens = flight.sampling.finish()
        for row, error in tokens.failed.items():
            if not plan.supposed(row):  # else it is sampled again, if it comes to that
                self.scheduler.abort(plan.samples[row].id)
                self._intake.failed(plan.samples[row].id, error)
            else:  # the device has gone on as if it had been sampled
                while len(self._flights) > 1:
                    self.scheduler.rollback(self._flights.pop().plan)
        watch.lap("sample")
        lost = self.moe.lost_rows()
        proposed: list[list[int]] = []
        if flight.proposals is not None:
            proposed = flight.proposals.finish()
        elif self.runner.drafts is not None:
            proposed = self._propose(plan, tokens, flight.times)
            watch.lap("drafts")
        self._flights.popleft()
        events = self.scheduler.commit(
            plan,
            tokens.sampled,
            None if lost is None else lost.numpy(),
            scores,
            tokens.failed,
            proposed,
        )
        if self._costs is not None:
            said = sum(len(event.tokens) for event in events)
            self._costs.published(plan, said, time.perf_counter())
        scheduler = self.scheduler
        blocks, drafts = scheduler.cache_changes(), scheduler.draft_counts()
        self.report(msg.Published(events, self._load(), blocks, plan.tokens, drafts))
        watch.lap("publish")

    def _propose(self, plan: StepPlan, tokens: StepTokens, times: int) -> list[list[int]]:
        """What the model says may follow each of plan.sampled. times: see `_Flight`.

        Raises: CommError: the step was broken.
        """
        if not times:
            self.runner.leave_out_drafts(torch.from_numpy(plan.slot_mapping))
            return []
        run = DraftRun(plan, tokens.sampled.tokens, tokens.failed)
        batch = replace(
            _batch(plan),
            token_ids=torch.from_numpy(run.first.token_ids),
            sample_rows=torch.from_numpy(run.first.rows),
        )
        logits = self.runner.draft(batch)
        for place in range(times):
            if place:
                step = run.further(self.config.kv_block_size)
                logits = self.runner.draft(_further_batch(step), torch.from_numpy(step.rows))
            self.buffer.check(wait=False)
            self.moe.lost_rows()  # no answer depends on it
            found = self.sampler.start(logits, run.samples).finish()
            run.hear(found.sampled.tokens, found.failed)
        return run.proposed

    def _abandon(self) -> None:
        """A step was broken: what is in flight is to be computed again."""
        self._drop_planned()
        while self._flights:
            self.scheduler.rollback(self._flights.pop().plan)

    def _score(self, logits: torch.Tensor, chunk: ScoredChunk) -> list[TokenLogprobs]:
        rows = logits[chunk.start : chunk.start + len(chunk.tokens)]
        try:
            return score(rows, chunk.tokens, chunk.top, deterministic=self.config.deterministic)
        except SEQUENCE_FAULTS as error:
            self.scheduler.abort(chunk.id)
            self._intake.failed(chunk.id, error)
            return []


def _row_by_row(plan: StepPlan) -> ForwardBatch:
    """As `_batch`, with a sequence for each row that decodes: what is written to the cache is there
    before any row reads it, so that proposed tokens need no kernels, and no graphs, of their own.
    The device may write to what is not the plan's alone."""
    batch = _batch(plan)
    if plan.drafts is None:
        if plan.sources is None:
            return batch
        return replace(
            batch,
            positions=batch.positions.clone(),
            context_len=batch.context_len.clone(),
            slot_mapping=batch.slot_mapping.clone(),
        )
    decoded = int(plan.query_start[plan.decodes])
    counts = torch.from_numpy(np.diff(plan.query_start[: plan.decodes + 1]))
    repeats = torch.cat([counts, torch.ones(len(plan.chunks), dtype=counts.dtype)])
    return replace(
        batch,
        positions=batch.positions.clone(),
        query_start=torch.cat(
            [torch.arange(decoded, dtype=torch.int32), batch.query_start[plan.decodes :]]
        ),
        context_len=torch.cat(
            [batch.positions[:decoded].int() + 1, batch.context_len[plan.decodes :]]
        ),
        block_tables=batch.block_tables.repeat_interleave(repeats, dim=0),
        slot_mapping=batch.slot_mapping.clone(),
        shares=True,
    )


def _further_batch(step: FurtherStep) -> ForwardBatch:
    count = len(step.rows)
    return ForwardBatch(
        token_ids=torch.from_numpy(step.token_ids),
        positions=torch.from_numpy(step.positions),
        query_start=torch.arange(count + 1, dtype=torch.int32),
        context_len=torch.from_numpy(step.context_len),
        block_tables=torch.from_numpy(step.block_tables),
        slot_mapping=torch.from_numpy(step.slot_mapping),
        sample_rows=torch.arange(count),
    )


def _batch(plan: StepPlan) -> ForwardBatch:
    return ForwardBatch(
        token_ids=torch.from_numpy(plan.token_ids),
        positions=torch.from_numpy(plan.positions),
        query_start=torch.from_numpy(plan.query_start),
        context_len=torch.from_numpy(plan.context_len),
        block_tables=torch.from_numpy(plan.block_tables),
        slot_mapping=torch.from_numpy(plan.slot_mapping),
        sample_rows=torch.from_numpy(plan.logit_rows),
        sources=None if plan.sources is None else torch.from_numpy(plan.sources),
        states=plan.states,
    )
