"""The head: admits requests, keeps the journal, and houses the coordinator. Everything but HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import secrets
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from prometheus_client.core import Metric

from flexpert.cluster import state_store
from flexpert.cluster.admission import Admission
from flexpert.cluster.coordinator import Coordinator
from flexpert.cluster.expert_cache_manager import ExpertCacheManager
from flexpert.cluster.formatting import describe_memory
from flexpert.cluster.handover.messages import ServiceHandedOver
from flexpert.cluster.handover.running_head import RunningHead
from flexpert.cluster.handover.succession import Succession
from flexpert.cluster.head_state import Everything, HeadState, UnclaimedAnswers
from flexpert.cluster.hosts.host_ranks import HostRanks
from flexpert.cluster.interfaces import Computed, T, Work
from flexpert.cluster.journal import Journal
from flexpert.cluster.journal import TokenStream as TokenStream
from flexpert.cluster.kept_counters import KeptSample, continued, kept
from flexpert.cluster.listeners import Listeners
from flexpert.cluster.memory_budget import MemoryBudget
from flexpert.cluster.operation import TargetRequest
from flexpert.cluster.phase_clock import CHANGES
from flexpert.cluster.processes.early_fork_server import EarlyForkServer, for_children
from flexpert.cluster.processes.helper import ForkedHelper, OnEnd, OnMessage
from flexpert.cluster.processes.launcher import LocalLauncher
from flexpert.cluster.processes.model_report import ask_model, model_apart
from flexpert.cluster.processes.rank_spec import ENTRY, RankSpec, encode_spec
from flexpert.cluster.processes.spare_ranks import SpareRanks
from flexpert.cluster.processes.transport import Transport
from flexpert.cluster.progress_watch import ProgressWatch
from flexpert.cluster.rank_store import RankStore
from flexpert.cluster.rank_takeover import RankTakeover
from flexpert.cluster.request_routing import RankCaches, Router
from flexpert.cluster.resumption import restore_requests, worth_keeping
from flexpert.cluster.saved_state import (
    SavedCluster,
    SavedHost,
    SavedOperation,
    SavedState,
)
from flexpert.cluster.sequence_trace import ChangeTracer, SequenceTrace
from flexpert.cluster.served_model import ServedModel
from flexpert.cluster.service_metrics import Metrics, cache_config
from flexpert.cluster.state_directory import StateDirectory
from flexpert.cluster.views import (
    ChangePreview,
    ClusterEvent,
    ClusterView,
    LayerPlacement,
    LiveLoad,
    OperationView,
    RankView,
    Readiness,
    RebalanceView,
    ServiceState,
)
from flexpert.comm import PeerUnreachable
from flexpert.comm.host.liveness import watch
from flexpert.config import Config
from flexpert.engine import rank_protocol as msg
from flexpert.engine.gpu_driver import GpuDriver, driver_of
from flexpert.engine.host_network import check_network
from flexpert.engine.request import HeldKV, KVMigration, SamplingParams
from flexpert.engine.stopwatch import Stopwatch, in_words
from flexpert.errors import (
    FlexpertError,
    RequestError,
    ServiceStopped,
    UnknownOperation,
    context_overflow,
)
from flexpert.models.token_tables import TokenTables
from flexpert.models.tokenizer_files import open_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger("flexpert")

_ATTACH_S = 10.0  # for ranks to answer another head, between two of their steps


class Head:
    """One service. All methods are called on its event loop.

    fork_server: one that was started before the head's own imports, for `start` to take; who
    started it ends it if `start` does not come so far.
    state: the directory that the settings name, locked; default: it is locked by `start`.
    running: a head from which this one is to take over.
    succession: how another head takes over from this one.
    can_fork: set when processes can be started.
    info, tables, model_name: of the model; set by `start`. tables: None if the settings leave the
    tokenizer out. opened: they are there, and ranks are being started.
    registry: metrics of cluster and engine; registries: that, and those of who serves this head.
    failure: why the service went down by itself, or None. on_failure: told when it does.
    impaired: part of the service → why it does not work now. Who owns a long-lived task writes down
    here what `/health` must say while it is not well, and takes it away when it is again.
    tracer: is told of epochs and operations; None: nobody is.
    """

    info: ServedModel
    tables: TokenTables | None
    model_name: str

    def __init__(
        self,
        config: Config,
        *,
        fork_server: EarlyForkServer | None = None,
        state: StateDirectory | None = None,
        running: RunningHead | None = None,
    ) -> None:
        self.config = config
        self._running = running
        self.succession = Succession(config, self)
        self.can_fork = asyncio.Event()
        self._directory = state
        self._state: HeadState | None = None
        self._takeover: RankTakeover | None = None
        self._taking_over = False
        self._continues = False  # from a head that has told its events
        self._unclaimed = UnclaimedAnswers(self._forget)
        self._published: Counter[int] = Counter()  # reports of tokens, of each rank's process
        self._early = fork_server
        self.failure: FlexpertError | None = None
        self.on_failure: Callable[[FlexpertError], None] | None = None
        self.impaired: dict[str, str] = {}
        self.tracer: ChangeTracer | None = None
        self._router = Router(config.cluster.routing)
        self._journal = Journal(config.cluster.max_sequences, self._router)
        self._admission = Admission(self._journal, self._admitting, self._send)
        self._transport: Transport | None = None
        self._launcher: LocalLauncher | None = None
        self._coordinator: Coordinator | None = None
        self._listeners = Listeners()
        self._numbers = itertools.count(1)
        self._serving = self._has_served = False
        self._stopping = asyncio.Lock()
        self._stopped = False
        self.opened = asyncio.Event()
        self.sampling_defaults: dict[str, Any] = {}
        self._cache: ExpertCacheManager | None = None
        self._budget: MemoryBudget | None = None
        self._hosts = HostRanks(config, self)
        cluster = config.cluster
        self._spares = SpareRanks(
            cluster.spare_ranks,
            cluster.max_ranks,
            taken=self._taken,
            start=self._start_spare,
            stop=self._end_spare,
            start_timeout_s=cluster.start_timeout,
            stall_timeout_s=cluster.stall_timeout,
        )
        self._lives: dict[int, bytes] = {}  # liveness locks of ranks
        self._rank_store = RankStore()
        self.metrics = Metrics(
            self._rank_views,
            lambda: self.epoch,
            lambda: len(self._journal),
            lambda: self._coordinator.balance() if self._coordinator else None,
            lambda: len(self._journal.waiting()),
        )
        self._journal.meter = self.metrics
        self.registry = self.metrics.registry
        self._router.on_decision = self.metrics.routed
        self.registries = [self.registry]
        self._kept_samples: list[KeptSample] = []  # of the head before
        self._id = secrets.token_hex(8)
        self._progress = ProgressWatch(cluster.wedged_timeout, time.monotonic)

    # ---- life -------------------------------------------------------------------------------

    async def start(self, report: Callable[[str], None] | None = None) -> None:
        """Bring the first ranks up; returns when requests are served.

        Raises:
            FlexpertError: it cannot be done; everything that was started is terminated.
        """
        tell = report or (lambda line: None)
        began = self._early.began if self._early else time.monotonic()
        watch = Stopwatch()
        watch.laps["before"] = time.monotonic() - began
        try:
            ahead = await self._take_from_running(tell) if self._running else None
            saved = await asyncio.to_thread(self._open_state)
            self._taking_over = saved is not None
            check_network(self.config.engine)
            await self._hosts.connect(tell)
            directory = self._state.directory if self._state and saved else None
            if directory is not None and not directory.ranks_wait:
                directory = None
            how = "taking its ranks over" if directory else "starting the fork server"
            if ahead is None:
                tell(f"opening model {self.config.model.model!r}, {how}")
            self._transport = Transport(self._on_report, self._on_cut_off, self._on_disconnected)
            self._launcher = LocalLauncher(self._on_exit, self._early)
            timeout_s = self.config.cluster.start_timeout
            living = None
            if directory:
                connect = directory.connect
                living = await self._launcher.take_over(self.config, connect, timeout_s)
            else:
                await self._launcher.start(self.config, timeout_s)
            watch.lap("fork server")
            opened = None
            if ahead is None:
                described = self._hosts.expected
                opened = await ask_model(
                    self._launcher, self.config, timeout_s, described=described
                )
                self._know(opened.model)
                await self._make_coordinator(tell)
            self.can_fork.set()
            watch.lap("model")
            assert self._coordinator is not None
            ranks = self.config.cluster.ranks
            if self._hosts.starts_all:
                await self._hosts.listen(self.info, tell)
                await self._hosts.check_room(ranks)
            if ranks and saved is None:
                tell(f"starting {ranks} rank{'s' if ranks > 1 else ''}")
            if self._state is not None:
                self._state.start(
                    self._on_written,
                    self._everything,
                    self._warn_unsaved,
                    lambda: kept(self.measured()),
                )
            if saved is not None and saved.cluster is not None:
                first = None
                await self._hosts.listen(self.info, tell, saved.hosts)
                await self._take_over(saved, saved.cluster, living or frozenset())
            else:
                first = self._coordinator.begin_first(ranks)
            if opened is not None:
                self.tables = await opened.tables
            self.opened.set()
            done = await self.wait_operation(first.id) if first else None
            if done and done.state != "done":
                raise FlexpertError(f"the service did not come up: {done.error}")
            watch.lap("ranks")
            log.debug("the service came up: %s", in_words(watch.laps))
        except BaseException:
            await self.stop()
            raise
        self._serving = self._has_served = True
        self._cache = ExpertCacheManager(self.config, self.info, self)
        self._cache.start()
        self._spares.run()
        if not self._hosts.starts_all and saved is None:
            await self._hosts.listen(self.info, tell)
        for rank in self._coordinator.ranks():
            memory = describe_memory(*self._coordinator.memory(rank.id))
            if memory:
                tell(f"rank {rank.id} (pid {rank.pid}): {memory}")
        if self._state is not None:
            try:
                self.succession.open(self._state)
            except OSError as error:
                log.warning("no other head will be able to take over: %s", error.strerror)
        tell(f"serving after {time.monotonic() - began:.1f} s")

    def _know(self, model: ServedModel) -> None:
        """What the head itself needs of a model."""
        self.info, engine = model, self.config.engine
        caches = RankCaches(
            model.kv_blocks,
            engine.kv_block_size,
            min(engine.max_running, engine.max_tokens_per_step),
            engine.prefix_cache,
        )
        self._router.set_caches(caches)
        self._journal.kv_tokens = caches.blocks * caches.block_size
        self.metrics.cache_config = cache_config(engine, caches.blocks)
        self.sampling_defaults = model.sampling_defaults
        self.model_name = self.config.model.served_name or model.name

    def open_tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The model's, in this process, which imports transformers; None: it is left out.

        Raises: ModelError: it cannot be read.
        """
        if self.tables is None:
            return None
        return open_tokenizer(Path(self.info.path), trusted=self.info.trusted)

    async def _make_coordinator(self, tell: Callable[[str], None]) -> None:
        driver = await asyncio.to_thread(self._gpu_driver, tell)
        budget = self._budget = MemoryBudget(self.config, self.info, driver)
        budget.held = lambda: self._spares.held
        budget.elsewhere = self._hosts.free_memory
        self._coordinator = Coordinator(self.config, self.info, self, budget)

    async def _take_from_running(self, tell: Callable[[str], None]) -> ServedModel:
        """All that can be done while the other head serves; then its service is this one's.

        Raises: FlexpertError: that one goes on.
        """
        running = self._running
        assert running is not None
        there = f"process {running.welcome.pid}, flexpert {running.welcome.version}"
        tell(f"opening model {self.config.model.model!r}, while the head of {there} serves")
        timeout_s = self.config.cluster.start_timeout
        model, self.tables = await model_apart(self.config, timeout_s)
        self._know(model)
        await self._make_coordinator(tell)
        self.opened.set()
        await self.succession.application()
        tell("ready to take over")
        taken = await asyncio.to_thread(running.take, tell)
        running.close()
        self._directory = taken.directory
        self._listeners.continue_from(taken.latest, taken.events)
        self._continues = True
        return model

    def _open_state(self) -> SavedState | None:
        """Raises: ConfigError, ModelError"""
        if self.config.cluster.state_dir is None:
            return None
        self._state = HeadState(self.config, self._directory)
        self._journal.log = self._state.store
        return self._state.saved

    async def _take_over(
        self, saved: SavedState, record: SavedCluster, living: frozenset[int]
    ) -> None:
        """Go on with the ranks and requests of another head."""
        assert self._launcher is not None
        assert self._transport is not None
        assert self._coordinator is not None
        assert self._state is not None
        done = asyncio.Event()
        takeover = self._takeover = RankTakeover(
            attach=self._attach,
            kill=self._end_taken,
            call_later=self.call_later,
            done=done.set,
        )
        limit_s = max(_ATTACH_S, 5 * self.config.cluster.stall_timeout)
        for one in saved.hosts:
            if one.rank not in self._hosts:  # nobody can join this head
                self._coordinator.leave_to_host(one.rank)
        takeover.begin(living | self._hosts.ids, worth_keeping(record), limit_s)
        await done.wait()
        if not self._continues:
            self._listeners.resume(record.events)
        self._kept_samples = saved.counters
        journal, store = self._journal, self._state.store
        attached = takeover.attached
        entries, foreign = restore_requests(journal, saved.requests, attached, self._cancel)
        numbers = [0]
        for entry in entries:
            sequence = entry.request
            self._unclaimed.add(entry.stream, sequence.prompt, sequence.params)
            if entry.finished:
                store.ended(sequence.id)
            number = sequence.id.rpartition("-")[2]
            numbers.append(int(number) if number.isdecimal() else 0)
        # some that were not written down may have been given since
        self._numbers = itertools.count(max(numbers) + 2**20)
        self._takeover = None
        hellos = {rank: told.hello for rank, told in attached.items()}
        for rank, told in attached.items():
            self._published[rank] = told.persisted + len(told.published)
            self._learn_all(rank, told.blocks)
            store.mark(rank, self._published[rank])
        for rank, refused in foreign.items():
            self._send(rank, msg.Abort(refused))
        self._coordinator.restore(record, saved.operations, hellos)
        self._taking_over = False
        for rank, hello in hellos.items():
            self._watch(rank, hello.life)
        for rank, report in takeover.pending:
            self._on_report(rank, report)
        self._admission.admit_waiting()
        self.call_later(state_store.KEPT_S, self._unclaimed.expire)
        log.warning(
            "another head's service goes on: ranks %s, %d requests",
            sorted(hellos) or "none",
            len(journal),
        )

    def _learn_all(self, rank: int, blocks: bytes) -> None:
        """A rank that was taken over tells once of its whole prefix cache."""
        try:
            self._router.reset(rank, blocks)
        except msg.Contradiction as error:  # it is chosen by its load alone
            log.warning("rank %d: %s", rank, error)

    def _attach(self, rank: int) -> None:
        """Give a running rank a connection to this head."""
        assert self._launcher is not None
        assert self._transport is not None
        end = self._transport.open(rank)
        if rank in self._hosts:
            self._hosts.attach(rank, end)
        else:
            self._launcher.attach(rank, end)
        self._transport.send(rank, msg.Attach())

    def _end_taken(self, rank: int) -> None:
        assert self._launcher is not None
        if rank in self._hosts:
            self._hosts.kill(rank)
        else:
            self._launcher.kill(rank)

    def _on_written(self, rank: int, count: int) -> None:
        self._send(rank, msg.Persisted(count))

    def _everything(self) -> Everything:
        return self._need_coordinator().save_all(), self._journal.requests()

    def _warn_unsaved(self, text: str) -> None:
        data: dict[str, object] = {"error": text}
        self.publish(ClusterEvent(kind="warning", time=time.time(), data=data))

    def _forget(self, sequence_id: str) -> None:
        if self._state is not None:
            self._state.store.closed(sequence_id)

    def _gpu_driver(self, tell: Callable[[str], None]) -> GpuDriver | None:
        """None where there is no GPU, or nothing that says how much memory it has."""
        if self.info.gpus is None:
            return None
        driver = driver_of(self.info.gpus)
        if driver is None:
            tell("NVML does not say how much memory the GPUs have free: it is not checked")
        return driver

    async def stop(self, drain_s: float = 0.0) -> None:
        """End everything, after running sequences had drain_s to finish. Idempotent."""
        self._serving = False
        async with self._stopping:
            if self.succession.handed.is_set():
                await self._stop_following(drain_s)
            elif not self._stopped:
                await self._stop(drain_s)

    async def _stop_following(self, drain_s: float) -> None:
        """Another head has the service; here are only connections."""
        deadline = time.monotonic() + drain_s
        while self.succession.waits and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        await self.succession.close(ServiceStopped("the service is stopping"), remove=False)

    async def _stop(self, drain_s: float) -> None:
        if self._running is not None:
            self._running.give_up()
        if self._taking_over:  # it has failed; the ranks wait for another head
            self._stopped = True
            self._hosts.leave()
            if self._launcher:
                self._launcher.leave()
            if self._transport:
                self._transport.close()
            if self._state:
                self._state.close(remove=False)
            return
        deadline = time.monotonic() + drain_s
        while len(self._journal) and not self.failure and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        self._stopped = True
        self._spares.close()
        if self._cache:
            self._cache.close()
        if self._coordinator:
            self._coordinator.close()
        self._journal.fail_all(ServiceStopped("the service is stopping"))
        self._listeners.close()
        await self.succession.close(ServiceStopped("the service is stopping"), remove=True)
        if self._coordinator and self._transport:
            for rank in self._coordinator.ranks():
                self._transport.send(rank.id, msg.Stop())
        await self._hosts.close()
        if self._launcher:
            await self._launcher.close()
        if self._transport:
            self._transport.close()
        if self._state:
            self._state.close(remove=True)

    def readiness(self) -> Readiness:
        """Whether requests are answered now; they are throughout every change of the ranks."""
        if self.failure is not None:
            return Readiness(live=False, ready=False, reason=str(self.failure), state="failed")
        coordinator = self._coordinator
        if not self._serving or coordinator is None:
            state: ServiceState = "stopping" if self._has_served else "starting"
            closed = "the service does not accept requests"
            return Readiness(ready=False, reason=closed, state=state)
        if coordinator.down is not None:
            self._progress.made()
            return Readiness(ready=False, reason=coordinator.down, state="down")
        if not coordinator.admitting:
            return Readiness(ready=False, reason="no rank is up", state="down")
        if self.impaired:
            reason = "; ".join(f"{part}: {why}" for part, why in sorted(self.impaired.items()))
            return Readiness(ready=False, reason=reason, state="impaired")
        if coordinator.recovering:
            self._progress.made()
            return Readiness(state="recovering")
        stuck_s = self._progress.stuck_s(len(self._journal))
        if stuck_s is not None:
            reason = f"{len(self._journal)} requests wait, and no step was done in {stuck_s:.0f} s"
            return Readiness(ready=False, reason=reason, state="wedged")
        waits = any(rank.waiting for rank in coordinator.ranks()) or self._journal.waiting()
        return Readiness(state="busy" if waits else "ready")

    def measured(self) -> Iterator[Metric]:
        """All metrics, counters with what the head before this one had counted."""
        families = itertools.chain.from_iterable(one.collect() for one in self.registries)
        return continued(families, self._kept_samples)

    # ---- requests ---------------------------------------------------------------------------

    def submit(
        self,
        prompt: list[int],
        params: SamplingParams,
        *,
        request_id: str | None = None,
        trace: SequenceTrace | None = None,
    ) -> TokenStream:
        """Run one sequence (`params.n` and `params.stop` are the caller's work).

        trace: is told what the sequence goes through.

        Raises:
            RequestError, ContextOverflow, Overloaded, ServiceStopped
        """
        if self.succession.handed.is_set():
            raise ServiceHandedOver
        if not self._serving or self._coordinator is None:
            raise ServiceStopped("the service does not accept requests now")
        params = self._resolve(prompt, params)
        if request_id is not None:
            again = self._unclaimed.claim(request_id, prompt, params)
            if again is not None:
                return again
        sequence_id = f"{request_id or 'seq'}-{next(self._numbers)}"
        eos = () if params.ignore_eos else self.info.eos_token_ids
        if not len(self._journal):
            self._progress.made()
        if trace is not None:
            trace.running_change = self._need_coordinator().running_change
        entry = self._journal.open(sequence_id, prompt, params, eos, self._cancel, trace)
        self.metrics.prompt_tokens.inc(len(prompt))
        self._admission.admit(entry)
        return entry.stream

    def _resolve(self, prompt: list[int], params: SamplingParams) -> SamplingParams:
        params.check()
        params.check_model(self.info.vocab, self.info.max_model_len)
        if not prompt:
            raise RequestError("the prompt is empty")
        if not (min(prompt) >= 0 and max(prompt) < self.info.vocab):
            bad = next(token for token in prompt if not 0 <= token < self.info.vocab)
            raise RequestError(f"token {bad} is outside the vocabulary of {self.info.vocab}")
        room = self.info.max_model_len - len(prompt)
        desired = room if params.max_tokens is None else params.max_tokens
        if room < 1 or max(desired, params.min_tokens) > room:
            raise context_overflow(self.info.max_model_len, len(prompt), max(desired, 1))
        seed = secrets.randbits(63) if params.seed is None else params.seed
        return msgspec.structs.replace(params, max_tokens=desired, seed=seed, n=1, stop=())

    def _admitting(self) -> frozenset[int]:
        return self._need_coordinator().admitting

    def _cancel(self, sequence_id: str) -> None:
        entry = self._journal.entry(sequence_id)
        if self.succession.handed.is_set():
            self._journal.close(sequence_id)
            self.succession.follower.cancel(sequence_id)
        elif self._admission.cancel(sequence_id) and entry:
            if entry.stream.enough:
                self.metrics.finished(entry, "stop", self._journal.clock())
            else:
                self.metrics.sequences.labels("cancelled").inc()

    # ---- another head takes over ------------------------------------------------------------

    @property
    def changing(self) -> str | None:
        """A change that is under way, or waits."""
        coordinator = self._coordinator
        if coordinator is None or coordinator.idle:
            return None
        running = coordinator.running
        return f"operation {running.id} runs ({running.phase})" if running else "the ranks change"

    def refusal(self) -> str | None:
        """Why no other head could take over, or None."""
        if self._state is None or not self._serving:
            return "it starts or stops"
        if self._hosts.starts_all or self.config.cluster.join_listen:
            return "it has ranks of other hosts; end it, and start with --resume"
        self._need_coordinator().save_all()  # all that was noted is written with it
        failure = self._state.store.failure
        return failure and f"its state cannot be written down: {failure}"

    def freeze(self) -> tuple[dict[TokenStream, int], int, list[ClusterEvent]]:
        """See `succession.Served`."""
        assert self._launcher is not None
        assert self._transport is not None
        self._serving, self._stopped = False, True
        self._transport.close()
        self._need_coordinator().close()
        self._journal.log = None
        if self._cache:
            self._cache.close()
        self._spares.close()
        self._launcher.leave()
        latest, events = self._listeners.latest, self._listeners.kept
        self._listeners.close()
        unfinished = self._journal.unfinished()
        return (
            {stream: n for stream, n in unfinished.items() if stream.id not in self._unclaimed},
            latest,
            events,
        )

    def adopt(self, sequence_id: str) -> TokenStream | None:
        """The answer of a sequence that was taken over, for who follows it."""
        return self._unclaimed.take(sequence_id)

    # ---- the cluster ------------------------------------------------------------------------

    def cluster(self) -> ClusterView:
        """The whole state, as `GET /cluster` shows it."""
        coordinator = self._need_coordinator()
        return ClusterView(
            epoch=coordinator.epoch,
            model=self.model_name,
            max_ranks=self.config.cluster.max_ranks,
            ranks=self._rank_views(),
            placement=coordinator.placement(),
            operation=coordinator.running,
            balance=coordinator.balance(),
            desired=sorted(coordinator.desired),
            left_out=sorted(coordinator.left_out),
            down=coordinator.down,
            spares=self._spares.views(),
            hosts=self._hosts.views(),
            gone=coordinator.gone(),
            head=self._id,
            cursor=self._listeners.latest,
            resumable=self._state is not None and self._state.store.failure is None,
            unsaved=self._state.store.failure if self._state else None,
        )

    def begin_operation(
        self,
        *,
        ranks: int | None = None,
        add: int = 0,
        remove: Sequence[int] = (),
        join: Sequence[int] = (),
        operation_id: str | None = None,
    ) -> OperationView:
        """Start a change; see `Coordinator.begin`.

        Raises:
            OperationConflict, OperationRefused
        """
        return self._need_coordinator().begin(
            ranks=ranks, add=add, remove=remove, join=join, operation_id=operation_id
        )

    async def request_operation(
        self,
        *,
        ranks: int | None = None,
        add: int = 0,
        remove: Sequence[int] = (),
        operation_id: str | None = None,
    ) -> OperationView:
        """As `begin_operation`, once it is known that there is room for the newcomers.

        Raises:
            OperationConflict, OperationRefused
        """
        coordinator = self._need_coordinator()
        if operation_id is not None:
            request = TargetRequest(ranks, add, tuple(sorted(remove)))
            repeated = coordinator.repeated(operation_id, request)
            if repeated is not None:
                return repeated
        if self._hosts.starts_all and coordinator.idle:
            newcomers = coordinator.newcomers(ranks=ranks, add=add, remove=remove)
            await self._hosts.check_room(len(newcomers))
        return self.begin_operation(ranks=ranks, add=add, remove=remove, operation_id=operation_id)

    def rebalance(self, operation_id: str | None = None) -> OperationView:
        """Move experts as their load asks for. Raises: OperationConflict, OperationRefused"""
        return self._need_coordinator().rebalance(operation_id)

    def proposed_rebalance(self) -> RebalanceView:
        """What that would do."""
        return self._need_coordinator().proposed_rebalance()

    async def preview_operation(
        self,
        *,
        ranks: int | None = None,
        add: int = 0,
        remove: Sequence[int] = (),
        rebalance: bool = False,
    ) -> ChangePreview:
        """What `request_operation` or `rebalance` would do.

        Raises: OperationConflict, OperationRefused
        """
        coordinator = self._need_coordinator()
        if rebalance:
            return coordinator.preview_rebalance()
        if self._hosts.starts_all and coordinator.idle:
            newcomers = coordinator.newcomers(ranks=ranks, add=add, remove=remove)
            await self._hosts.check_room(len(newcomers))
        return coordinator.preview(ranks=ranks, add=add, remove=remove)

    def operations(self) -> list[OperationView]:
        """The latest changes, oldest first."""
        return self._need_coordinator().operations

    def layer_placement(self, layer: int) -> LayerPlacement:
        """Who holds which expert of an MoE layer. Raises: RequestError: there is none of it."""
        return self._need_coordinator().layer_placement(layer)

    def live_load(self) -> LiveLoad:
        """What the ranks have to do."""
        return self._need_coordinator().live_load()

    def recent_events(self) -> list[ClusterEvent]:
        """The latest that are kept, oldest first."""
        return self._listeners.recent()

    @property
    def latest_request(self) -> OperationView | None:
        """The latest change that somebody asked for."""
        return self._need_coordinator().latest_request

    def operation(self, operation_id: str) -> OperationView:
        """Raises UnknownOperation."""
        return self._need_coordinator().operation(operation_id).view()

    def cancel_operation(self, operation_id: str) -> OperationView:
        """Raises UnknownOperation, OperationConflict once it commits or is over."""
        return self._need_coordinator().cancel(operation_id)

    async def wait_operation(self, operation_id: str) -> OperationView:
        """Until it is over."""
        operation = self._need_coordinator().operation(operation_id)
        over = asyncio.ensure_future(operation.over.wait())
        handed = asyncio.ensure_future(self.succession.handed.wait())
        try:
            await asyncio.wait((over, handed), return_when=asyncio.FIRST_COMPLETED)
        finally:
            over.cancel()
            handed.cancel()
        if not operation.over.is_set():
            raise ServiceHandedOver
        return operation.view()

    def events(self, since: int | None = None) -> AsyncIterator[ClusterEvent]:
        """What happens from now on, or after the event of that number, until the service stops; see
        `Listeners.events`."""
        return self._listeners.events(since)

    def check_cursor(self, since: int) -> None:
        """Raises: CursorLost: what came after the event of that number is not known any more."""
        self._listeners.check(since)

    def _need_coordinator(self) -> Coordinator:
        if self.succession.handed.is_set():
            raise ServiceHandedOver
        if self._coordinator is None:
            raise ServiceStopped("the service is not up yet")
        return self._coordinator

    def start_helper(
        self, entry: str, spec: bytes, on_message: OnMessage, on_end: OnEnd
    ) -> ForkedHelper:
        """A child process that is no rank; see `ForkedHelper`.

        Raises: OSError, ServiceStopped
        """
        if self._launcher is None or self._stopped:
            raise ServiceStopped("the service is not up")
        return ForkedHelper(self._launcher, entry, spec, on_message, on_end)

    def check_room(self, sequences: int) -> None:
        """Raises: Overloaded: there is no room in the journal for so many more."""
        self._journal.check_room(sequences)

    # ---- what the coordinator needs ----------------------------------------------------------

    def call_later(self, delay_s: float, action: Callable[[], None]) -> asyncio.TimerHandle:
        return asyncio.get_running_loop().call_later(delay_s, action)

    def compute(self, work: Callable[[], T], then: Callable[[Computed[T]], None]) -> None:
        asyncio.get_running_loop().run_in_executor(None, work).add_done_callback(then)

    def now(self) -> float:
        return time.monotonic()

    def work(self, rank: int) -> Work | None:
        assert self._launcher is not None
        return self._launcher.work(rank)

    @property
    def expert_cache(self) -> bytes:
        return self._cache.address if self._cache else b""

    def admit_waiting(self) -> None:
        self._admission.admit_waiting()

    def spawn(self, rank: int, verdicts: bytes) -> None:
        there, hello = self._spares.take(rank, lambda: self.spawn(rank, verdicts))
        if hello is not None:
            try:
                self._on_report(rank, hello)
            except msg.Contradiction as error:
                self._on_cut_off(rank, f"contradicts itself: {error}")
        if not there:
            self._fork(rank, verdicts)

    def _start_spare(self, rank: int) -> None:
        """Raises: OperationRefused: it does not fit."""
        assert self._budget is not None
        assert self._coordinator is not None
        self._budget.check_spare(rank)
        self._fork(rank, self._coordinator.verdicts, spare=True)

    def _taken(self) -> frozenset[int] | None:
        """Ids that no spare may have; None: ranks change."""
        coordinator = self._coordinator
        if coordinator is None or coordinator.running is not None or coordinator.down:
            return None
        return coordinator.members | coordinator.desired | self.reserved

    def _fork(self, rank: int, verdicts: bytes, *, spare: bool = False) -> None:
        assert self._launcher is not None
        assert self._transport is not None
        try:
            end = self._transport.open(rank)
        except OSError as error:
            why = f"it cannot be connected: {error.strerror}; raise the limit of open files"
            asyncio.get_running_loop().call_soon(self._on_exit, rank, 1, why)
            return
        if rank in self._hosts:
            self._hosts.spawn(rank, verdicts, end)
            return
        cluster = self.config.cluster
        hosts = cluster.join_listen is not None or cluster.launcher == "ray"
        spec = encode_spec(RankSpec(rank, for_children(self.config), verdicts, spare, hosts))
        self._launcher.spawn(rank, ENTRY, spec, end)

    def _end_spare(self, rank: int) -> None:
        """It ends when it hears of it, or is killed with the launcher."""
        self._send(rank, msg.Stop())
        if not self._stopped and self._launcher:
            self._launcher.kill(rank)

    def on_this_host(self, newcomers: frozenset[int]) -> frozenset[int]:
        return frozenset() if self._hosts.starts_all else newcomers - self.reserved

    @property
    def reserved(self) -> frozenset[int]:
        return self._hosts.ids

    @property
    def draining(self) -> frozenset[int]:
        return self._hosts.draining

    def kill(self, rank: int) -> None:
        assert self._launcher is not None
        if rank in self._spares:  # it ends already
            self._spares.withdraw(rank)
        elif rank in self._hosts:
            self._hosts.kill(rank)
        else:
            self._launcher.kill(rank)

    # ---- for hosts that join ------------------------------------------------------------------

    def ids_in_use(self) -> frozenset[int]:
        """Ids that no rank from outside may have."""
        coordinator = self._need_coordinator()
        if self._taking_over:  # whose they are is not known yet: who joins now tries again
            return frozenset(range(self.config.cluster.max_ranks))
        spares = {rank for rank in range(self.config.cluster.max_ranks) if rank in self._spares}
        return coordinator.desired | {rank.id for rank in coordinator.ranks()} | spares

    def busy(self) -> bool:
        """Whether a change could not begin now."""
        return not (self._serving and self._need_coordinator().idle)

    def is_member(self, rank: int) -> bool:
        """Whether the rank is of the current epoch."""
        known = self._coordinator is not None and rank in self._coordinator.members
        return known or self._taking_over

    def rank_left_host(self, rank: int, status: int, why: str, *, ours: bool) -> None:
        """The process of a rank on another host is gone, or given up. ours: it may be started
        again from here."""
        if self._coordinator and not ours:
            self._coordinator.leave_to_host(rank)
        self._on_exit(rank, status, why)

    def send(self, rank: int, command: msg.Command) -> None:
        self._send(rank, command)

    def assign_destinations(
        self, held: list[HeldKV], destinations: Iterable[int]
    ) -> dict[int, list[KVMigration]]:
        return self._journal.assign_destinations(held, destinations)

    def hand_over(
        self, rank: int, held: list[HeldKV], destinations: Iterable[int]
    ) -> dict[int, list[KVMigration]]:
        return self._journal.hand_over(rank, held, destinations)

    def rank_exited(self, rank: int, own_fault: bool) -> None:
        if self.tracer is not None:
            self._journal.rank_lost(rank)
        failed = self._journal.rank_exited(rank, own_fault=own_fault)
        if failed is not None:
            log.error(
                "request %s failed: ranks keep ending in the step that takes it",
                failed,
                extra={"request": failed, "rank": rank, "epoch": self.epoch},
            )

    def heard(self) -> bool:
        return bool(self._listeners)

    def service_lost(self, reason: str) -> None:
        """Nobody is left and nobody will be started again: the service stops."""
        self._serving = False
        self.failure = FlexpertError(f"{reason}; the service stops")
        log.error("%s", self.failure)
        self._journal.fail_all(self.failure)
        if self.on_failure:
            self.on_failure(self.failure)

    @property
    def saves(self) -> bool:
        return self._state is not None

    def save_cluster(self, record: SavedCluster, *, urgent: bool) -> None:
        if self._state is not None:
            numbered = msgspec.structs.replace(record, events=self._listeners.latest)
            self._state.save_cluster(numbered, urgent=urgent)

    def save_operation(self, record: SavedOperation, *, urgent: bool) -> None:
        if self._state is not None:
            self._state.store.operation(record, urgent=urgent)

    def forget_operation(self, operation_id: str) -> None:
        if self._state is not None:
            self._state.store.forget_operation(operation_id)

    def save_hosts(self, records: list[SavedHost]) -> None:
        if self._state is not None:
            self._state.save_hosts(records)

    def impair(self, part: str, why: str | None) -> None:
        if why is None:
            self.impaired.pop(part, None)
        else:
            self.impaired[part] = why

    def publish(self, event: ClusterEvent) -> None:
        if event.kind == "operation" and event.data["state"] in ("done", "failed", "cancelled"):
            self.metrics.operation_over(msgspec.convert(event.data, OperationView))
        elif event.kind == "rank":
            self.metrics.rank_gone(event.data)
        if self.tracer is not None:
            self._trace(self.tracer, event)
        self._listeners.publish(event)

    def _trace(self, tracer: ChangeTracer, event: ClusterEvent) -> None:
        coordinator = self._coordinator
        if coordinator is None:
            return
        if event.kind == "epoch":
            tracer.epoch_began(msgspec.convert(event.data["epoch"], int), coordinator.running)
        elif event.kind == "operation":
            with contextlib.suppress(UnknownOperation):
                operation = coordinator.operation(str(event.data["id"]))
                if operation.over.is_set():
                    tracer.operation_over(operation)

    # ---- from the ranks ---------------------------------------------------------------------

    def _on_report(self, rank: int, report: msg.Report) -> None:
        if self._coordinator is None:
            return
        if self._takeover is not None:
            self._takeover.on_report(rank, report)
            return
        if rank in self._spares:
            self._spares.on_report(rank, report)
            return
        match report:
            case msg.Hello():
                self._watch(rank, report.life)
            case msg.Published(events, _, blocks):
                self._progress.made()
                self._router.learn(rank, blocks)
                journal = self._journal
                before = journal.tokens_published
                degraded = journal.tokens_degraded, journal.answers_degraded
                vocab = self.info.vocab
                for event in events:
                    for token in event.tokens:  # all() takes five times as long
                        if not 0 <= token < vocab:
                            raise msg.Contradiction(f"it publishes tokens {event.tokens[:8]}")
                    journal.publish(rank, event)
                    if event.cached:
                        self.metrics.cached_tokens.inc(event.cached)
                self.metrics.step(rank, report)
                self.metrics.tokens.inc(journal.tokens_published - before)
                if (journal.tokens_degraded, journal.answers_degraded) != degraded:
                    self.metrics.degraded_tokens.inc(journal.tokens_degraded - degraded[0])
                    self.metrics.degraded_sequences.inc(journal.answers_degraded - degraded[1])
                if self._state is not None:
                    self._published[rank] += 1
                    self._state.store.mark(rank, self._published[rank])
            case msg.Fetched(_, _, _, blocks, _) | msg.Adopted(_, _, _, _, blocks):
                self._router.learn(rank, blocks)
            case msg.StoreRequest(number):
                value = self._rank_store.answer(rank, report)
                self._send(rank, msg.StoreAnswer(number, value))
            case msg.OnTrial(sequence_id):
                self._journal.on_trial(sequence_id)
            case msg.Rejected(sequence_id, error, fault):
                if fault:
                    log.error(
                        "request %s failed on rank %d: %s",
                        sequence_id,
                        rank,
                        error,
                        extra={"request": sequence_id, "rank": rank, "epoch": self.epoch},
                    )
                kind = FlexpertError if fault else RequestError
                self._journal.fail(sequence_id, kind(error))
        self._coordinator.on_report(rank, report)

    def _on_cut_off(self, rank: int, why: str) -> None:
        if self._takeover is not None:
            self._takeover.on_lost(rank)
        elif rank in self._spares:
            self._spares.on_cut_off(rank, why)
        elif self._coordinator and not self._stopped:
            self._coordinator.expel(rank, why)

    def _watch(self, rank: int, life: bytes) -> None:
        """Hear of a rank's end before its connection closes. Raises: Contradiction"""
        if not life:
            return
        loop = asyncio.get_running_loop()
        self._lives[rank] = life

        def ended() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(self._on_life_ended, rank, life)

        try:
            watch(life, ended)
        except PeerUnreachable:
            pass  # it has ended already, as its connection tells
        except (ValueError, OSError) as error:
            raise msg.Contradiction(f"its liveness lock cannot be watched: {error}") from error

    def _on_life_ended(self, rank: int, life: bytes) -> None:
        if self._lives.get(rank) == life and self._transport:
            self._transport.drain(rank)  # what it said before
            self._on_disconnected(rank)

    def _on_disconnected(self, rank: int) -> None:
        if self._takeover is not None:
            self._takeover.on_lost(rank)
        elif rank in self._spares:
            self._spares.on_disconnected(rank)
        elif self._coordinator and not self._stopped:
            self._coordinator.on_disconnected(rank)

    def _on_exit(self, rank: int, status: int, why: str) -> None:
        self._lives.pop(rank, None)
        self._rank_store.forget(rank)
        if self._transport:
            self._transport.drain(rank)
            self._transport.forget(rank)
        self._router.forget(rank)
        self._published.pop(rank, None)
        if self._takeover is not None:
            self._takeover.on_exit(rank)
            return
        if rank in self._spares:
            how = signal.Signals(-status).name if status < 0 else f"exit status {status}"
            if not self._spares.on_exit(rank, why or how):
                return
        if self._coordinator and not self._stopped:
            try:
                self._coordinator.on_exit(rank, status, why)
            except Exception as error:
                log.exception("the end of rank %d could not be handled", rank, extra={"rank": rank})
                self.impair(CHANGES, f"the end of rank {rank} could not be handled: {error!r}")

    def _send(self, rank: int, command: msg.Command) -> None:
        if self._transport:
            with contextlib.suppress(RuntimeError):  # the loop is closing
                self._transport.send(rank, command)

    def _rank_views(self) -> list[RankView]:
        blocks = self._router.blocks
        return [
            msgspec.structs.replace(rank, cached_blocks=blocks(rank.id))
            for rank in (self._coordinator.ranks() if self._coordinator else ())
        ]

    @property
    def epoch(self) -> int:
        """The current one; 0 before the first."""
        return self._coordinator.epoch if self._coordinator else 0
