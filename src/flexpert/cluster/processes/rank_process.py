"""The shell around one rank's engine: its connection to the head, and nothing else."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Mapping

import msgspec

from flexpert.cluster import messages as msg
from flexpert.cluster.processes.child_connection import Connection, ConnectionEnded
from flexpert.cluster.processes.relay import Relay
from flexpert.config import Config
from flexpert.device_settings import DEVICE_SETTINGS
from flexpert.engine.epoch import EpochPlan
from flexpert.engine.faults import Faults
from flexpert.engine.memory_plan import RankMemory
from flexpert.engine.rank_engine import RankEngine
from flexpert.engine.request import HeldKV, TokenEvent
from flexpert.engine.watchdog import Watchdog, work_of_main_thread
from flexpert.errors import FlexpertError
from flexpert.models.source import ExpertFormat, ModelSource

_MEMORY_EVERY_S = 1.0
BEATS = 10  # in one stall timeout
_EXPERTS: Mapping[str, ExpertFormat] = {"none": "unquantized", "auto": "stored", "fp8": "fp8"}


ENTRY = f"{__name__}:rank_main"


class RankSpec(msgspec.Struct, frozen=True):
    """What a new rank is told. config: the settings tree as JSON."""

    rank: int
    config: str


encode_spec = msgspec.msgpack.encode
decode_spec = msgspec.msgpack.Decoder(RankSpec).decode


def open_model(config_json: str) -> ModelSource:
    """The model of a settings tree given as JSON."""
    return open_source(Config.model_validate_json(config_json))


def open_source(config: Config) -> ModelSource:
    """The model that a settings tree names.

    Raises:
        ModelError: it cannot be opened or served.
    """
    quantization = DEVICE_SETTINGS[config.engine.device].quantization(config.model.quantization)
    return ModelSource.open(
        config.model.model,
        revision=config.model.revision,
        dtype=config.model.dtype,
        max_model_len=config.model.max_model_len,
        experts=_EXPERTS[quantization],
    )


class Reporter:
    """Tells the head; callable from any thread of the rank."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.engine: RankEngine | None = None
        self._memory = 0

    def beat(self, every_s: float) -> None:
        """Tell the head now and then that this process runs, from a thread of its own.

        And for how long its step loop, in the main thread, has not moved. It also reads the
        memory, which takes milliseconds, so not in the step loop.
        """

        def run() -> None:
            next_look = 0.0
            watchdog = Watchdog(every_s, time.monotonic())
            with contextlib.suppress(ConnectionEnded):  # the rank ends
                while True:
                    turns = self.engine.turns if self.engine else 0
                    stuck_s = watchdog.look(time.monotonic(), turns, work_of_main_thread)
                    self.tell(msg.Alive(stuck_s))
                    if time.monotonic() >= next_look:
                        self._memory = self._measure()
                        next_look = time.monotonic() + _MEMORY_EVERY_S
                    time.sleep(every_s)

        threading.Thread(target=run, name="beat", daemon=True).start()

    def tell(self, report: msg.Report) -> None:
        """Raises: ConnectionEnded"""
        self._connection.send(msg.encode(report))

    def published(self, events: list[TokenEvent]) -> None:
        self.tell(msg.Published(events, self._load()))

    def _measure(self) -> int:
        assert self.engine is not None  # it is set before anything is told
        return self.engine.private_memory()

    def _load(self) -> msg.Load:
        assert self.engine is not None  # it is the one who tells
        scheduler, graphs = self.engine.scheduler, self.engine.runner.graphs
        return msg.Load(
            scheduler.running,
            scheduler.waiting,
            scheduler.kv_used,
            self._memory,
            graphs.captures if graphs else 0,
        )

    def rejected(self, sequence_id: str, error: str, fault: bool = False) -> None:
        self.tell(msg.Rejected(sequence_id, error, fault))

    def on_trial(self, sequence_id: str) -> None:
        self.tell(msg.OnTrial(sequence_id))

    def progress(self, epoch: int, share: float) -> None:
        self.tell(msg.Progress(epoch, share))

    def prepared(self, epoch: int, copied: int, memory: RankMemory) -> None:
        if self.engine and self.engine.buffer.epoch == 0:  # nobody waits for a newcomer yet
            self._memory = self._measure()
        planned = msg.Memory(
            memory.dense, memory.experts, memory.kv, memory.windows, memory.runtime
        )
        self.tell(msg.Prepared(epoch, copied, planned))

    def failed(self, epoch: int, error: str) -> None:
        self.tell(msg.Failed(epoch, error))

    def switched(self, epoch: int, pause_ms: float | None) -> None:
        self.tell(msg.Switched(epoch, pause_ms, self._load()))

    def offered(self, epoch: int, held: list[HeldKV]) -> None:
        self.tell(msg.Offered(epoch, held))

    def fetched(self, epoch: int, source: int, size: int) -> None:
        self.tell(msg.Fetched(epoch, source, size))

    def handed_over(self, epoch: int, held: list[HeldKV]) -> None:
        self.tell(msg.HandedOver(epoch, held))

    def adopted(self, source: int, moved: int, size: int, recomputed: int) -> None:
        self.tell(msg.Adopted(source, moved, size, recomputed))

    def broken(self, epoch: int, ranks: tuple[int, ...], error: str) -> None:
        self.tell(msg.Broken(epoch, list(ranks), error))


def end_with_any_thread() -> None:
    """From now on an error that a thread of this process does not catch ends the process.

    A rank that has lost the thread that hears commands, says that it lives or prepares an epoch
    would hold up all others; one that has ended is replaced.
    """

    def end(what: threading.ExceptHookArgs) -> None:
        name = what.thread.name if what.thread else "a thread"
        with contextlib.suppress(BaseException):  # there may be no memory to say it
            print(f"{name} failed: {what.exc_type.__name__}: {what.exc_value}", file=sys.stderr)
            traceback.print_tb(what.exc_traceback)
            sys.stderr.flush()
        os._exit(1)

    threading.excepthook = end


def rank_main(spec: bytes, end: socket.socket, source: ModelSource) -> int:
    """Run a rank until the head stops it; returns the exit status."""
    end_with_any_thread()
    told = decode_spec(spec)
    config = Config.model_validate_json(told.config)
    faults = Faults.of_environment(told.rank)
    if faults:
        relay = Relay(end)
        faults.cut, end = relay.cut, relay.near
        faults.at("spawn")
    connection = Connection(end)
    reporter = Reporter(connection)
    try:
        try:
            engine = RankEngine(
                told.rank,
                source,
                config.engine,
                capacity=config.cluster.max_ranks,
                exchange_timeout_s=config.cluster.exchange_timeout,
                listener=reporter,
                faults=faults,
            )
        except (FlexpertError, OSError, MemoryError, RuntimeError) as error:
            reporter.tell(msg.Unable(f"{type(error).__name__}: {error}"))
            return 1
        reporter.engine = engine
        reporter.tell(
            msg.Hello(
                os.getpid(),
                socket.gethostname(),
                engine.buffer.address,
                engine.exported.address,
                engine.store.address,
            )
        )
        reporter.beat(config.cluster.stall_timeout / BEATS)
        listener = threading.Thread(
            target=_listen, args=(connection, engine, reporter), name="commands", daemon=True
        )
        listener.start()
        engine.run()
        return 0
    except ConnectionEnded:
        return 1  # the head is gone, or wants no more of this rank
    finally:
        connection.close()


def _listen(connection: Connection, engine: RankEngine, reporter: Reporter) -> None:
    while True:
        try:
            command = msg.decode_command(connection.receive())
        except ConnectionEnded:
            os._exit(1)  # whatever the step loop waits for: nobody is told of it any more
        match command:
            case msg.Prepare(epoch, members, placement, exporters):
                engine.prepare(EpochPlan(epoch, members, placement, exporters))
            case msg.Commit(epoch):
                engine.commit(epoch)
            case msg.Cancel(epoch):
                engine.cancel(epoch)
            case msg.Admit(sequences):
                engine.admit(sequences)
            case msg.Offer(epoch):
                engine.offer(epoch)
            case msg.Fetch(epoch, source, kv, migrations):
                engine.fetch(epoch, source, kv, migrations)
            case msg.Adopt(source, kv, migrations):
                engine.adopt(source, kv, migrations)
            case msg.Abort(ids):
                engine.abort(ids)
            case msg.Halt(epoch):
                engine.halt()
                reporter.tell(msg.Halted(epoch))
            case msg.Hold(members):
                engine.hold(members)
            case msg.Stop():
                engine.stop()
                return
