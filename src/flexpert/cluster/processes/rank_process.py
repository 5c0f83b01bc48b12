"""The process around one rank's engine: bytes from the head → commands, reports → bytes."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

from flexpert.cluster.processes.child_connection import ConnectionEnded
from flexpert.cluster.processes.head_link import HeadLink
from flexpert.cluster.processes.rank_spec import decode_spec
from flexpert.cluster.processes.relay import Relay
from flexpert.comm.host.liveness import LivenessLock
from flexpert.config import Config
from flexpert.engine import rank_protocol as msg
from flexpert.engine.faults import Faults
from flexpert.engine.host_network import choose_network
from flexpert.engine.rank_engine import RankEngine
from flexpert.engine.watchdog import Watchdog, work_of_main_thread
from flexpert.errors import FlexpertError
from flexpert.logs import start_logging
from flexpert.models.fusion_verdicts import encode_verdicts

_MEMORY_EVERY_S, _MEMORY_RARELY_S = 1.0, 10.0
_MEMORY_SHARE = 0.01  # of the time: it takes 40 ms where 2 GB of a checkpoint are mapped
# A thread that prepares an epoch must not keep the step loop waiting for the interpreter's lock.
_SWITCH_S = 0.0005
BEATS = 10  # in one stall timeout


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


def rank_main(spec: bytes, end: socket.socket, *more: Any) -> int:
    """Run a rank until the head stops it; returns the exit status.

    more: the model, and before it, of a rank that outlives its head, the socket on which it gets
    the connection of the next.
    """
    *keepers, source = more
    end_with_any_thread()
    sys.setswitchinterval(_SWITCH_S)
    told = decode_spec(spec)
    config = Config.model_validate_json(told.config)
    if config.server.log_level == "debug":
        start_logging("DEBUG", logging.StreamHandler(), config.server.log_format)
    choose_network(config.engine)
    faults = Faults.of_environment(told.rank)
    if faults:
        relay = Relay(end)
        faults.cut, end = relay.cut, relay.near
        faults.at("spawn")
    link = HeadLink(end, keepers[0] if keepers else None)
    report = link.send
    try:
        try:
            engine = RankEngine(
                told.rank,
                source,
                config.engine,
                capacity=config.cluster.max_ranks,
                exchange_timeout_s=config.cluster.exchange_timeout,
                report=report,
                faults=faults,
                verdicts=told.verdicts,
                several_machines=told.several_machines,
            )
            if told.spare:
                engine.warm_up()
        except (FlexpertError, OSError, MemoryError, RuntimeError) as error:
            report(msg.Unable(f"{type(error).__name__}: {error}"))
            return 1
        life = LivenessLock()
        engine.on_attach = lambda: link.attached(
            _hello(engine, life), engine.sequences, engine.cached_keys
        )
        report(_hello(engine, life))
        every_s = config.cluster.stall_timeout / BEATS
        _start("beat", _beat, engine, report, every_s)
        _start("commands", _listen, link, engine)
        engine.run()
        return 0
    except ConnectionEnded:
        return 1  # the head is gone, or wants no more of this rank
    finally:
        link.close()


def _start(name: str, target: Callable[..., None], *args: object) -> None:
    threading.Thread(target=target, args=args, name=name, daemon=True).start()


def _hello(engine: RankEngine, life: LivenessLock) -> msg.Hello:
    return msg.Hello(
        os.getpid(),
        socket.gethostname(),
        engine.buffer.address,
        engine.exported.address,
        engine.store.address,
        dict(engine.watch.laps),
        life.address,
        encode_verdicts(engine.runner.verdicts),
        engine.machine,
        engine.runner.steps,
    )


def _beat(engine: RankEngine, report: Callable[[msg.Report], None], every_s: float) -> None:
    """Tell the head now and then that this process runs, and for how long its step loop, in the
    main thread, has not moved. It also has the memory measured, which takes milliseconds that the
    step loop does not have.
    """
    next_look = 0.0
    watchdog = Watchdog(every_s, time.monotonic())
    with contextlib.suppress(ConnectionEnded):  # the rank ends
        while True:
            stuck_s = watchdog.look(time.monotonic(), engine.turns, work_of_main_thread)
            if (began := time.monotonic()) >= next_look:
                engine.measure_memory()
                now = time.monotonic()
                pause_s = max(_MEMORY_EVERY_S, (now - began) / _MEMORY_SHARE)
                next_look = now + min(pause_s, _MEMORY_RARELY_S)
            load, used = engine.load_report.take(), engine.memory_use
            report(msg.Alive(stuck_s, used, engine.wire_bytes, load, engine.exchanges))
            time.sleep(every_s)


def _listen(link: HeadLink, engine: RankEngine) -> None:
    """Hand commands to the engine until `Stop`: what ends the connection after it ends no rank."""
    command: msg.Command | None = None
    while not isinstance(command, msg.Stop):
        try:
            command = msg.decode_command(link.receive())
        except ConnectionEnded as error:
            if link.outlives_heads:
                print(f"a rank (pid {os.getpid()}) ends: {error}", file=sys.stderr, flush=True)
            os._exit(1)  # whatever the step loop waits for: nobody is told of it any more
        if isinstance(command, msg.Persisted):
            link.persisted(command.count)
        else:
            engine.submit(command)
