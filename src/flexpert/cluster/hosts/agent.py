"""`flexpert join`: one rank on this host for a head elsewhere.

An agent authenticates, is given an id and the settings, opens the same model here and starts the
rank when a change adds it. The rank speaks with the head through it. When the head is lost, or
gives this host up, the rank is ended, and the agent joins anew; unless another head may go on with
the service: then the rank waits for that, for a while, and goes on with its peers meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import msgspec
from pydantic import ValidationError

from flexpert.cluster.hosts import agent_protocol as say
from flexpert.cluster.hosts.byte_pipe import BytePipe
from flexpert.cluster.hosts.cluster_token import ClusterKeys
from flexpert.cluster.hosts.curve_socket import CurveClient, NotSentError, pieces
from flexpert.cluster.hosts.ready_file import ReadyFile
from flexpert.cluster.memory_budget import free_memory
from flexpert.cluster.processes.early_fork_server import for_children
from flexpert.cluster.processes.launcher import LocalLauncher
from flexpert.cluster.processes.model_report import ask_model
from flexpert.cluster.processes.rank_spec import ENTRY, RankSpec, encode_spec
from flexpert.cluster.served_model import ServedModel
from flexpert.config import Config
from flexpert.engine.gpu_driver import driver_of
from flexpert.errors import FlexpertError
from flexpert.forking.framing import WrongProtocol
from flexpert.stop_signals import STOP_SIGNALS, StopRequest
from flexpert.version import VERSION

log = logging.getLogger("flexpert")

_WELCOME_S = 10.0
_GONE_S = 5.0  # for a rank that is killed
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 10.0
_HEALTHY_S = 10.0  # a rank that served for so long had come up well
_BEATS = 5  # in one timeout
_SILENCE = 2.5  # timeouts after which the head is lost: it beats, and may be slow


class Outcome(Enum):
    """How a session ended."""

    LEFT = "left"  # by a change, or because it was asked to here
    LOST = "lost"  # the head, or the head has given this host up
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class AgentOptions:
    """address: of the head. rank: the id that is wanted; -1: any. overrides: settings that differ
    here, dotted. retry_s: for how long a head that is lost is looked for. ticket: see `Join`.
    host: name of this host for people; "": as the system has it. ready_file: there while the rank
    serves."""

    address: str
    rank: int
    overrides: dict[str, object]
    retry_s: float
    ticket: bytes = b""
    host: str = ""
    ready_file: Path | None = None


def wait_before_joining(last_s: float, served_s: float) -> float:
    """Seconds until the next attempt: longer each time, until a rank has served for a while."""
    return (
        _FIRST_WAIT_S if served_s >= _HEALTHY_S or not last_s else min(_LONGEST_WAIT_S, 2 * last_s)
    )


class Agent:
    """One rank on this host, through any number of sessions.

    tell: what people are to know, a line each.
    failure: why `run` returned 1; "" before.
    """

    def __init__(
        self, options: AgentOptions, keys: ClusterKeys, tell: Callable[[str], None]
    ) -> None:
        """Raises: ConfigError: the file of the options cannot be made."""
        self._options = options
        self._keys = keys
        self._tell = tell
        self._rank = options.rank
        self._ready = ReadyFile(options.ready_file)
        self._stop = StopRequest()
        self._leaves = asyncio.Event()
        self._ends_now = asyncio.Event()
        self._launcher: LocalLauncher | None = None
        self._prepared = ("", False)  # what the launcher was started with
        self._model: ServedModel | None = None
        self._session: _AgentSession | None = None
        self.failure = ""

    async def run(self) -> int:
        """Until the rank has left or nothing more can be done; returns the exit status.

        0 it has left, or was asked to when the head was lost, 1 it could not join or the head is
        lost for good, 130 stopped at once.
        """
        loop = asyncio.get_running_loop()
        for number in STOP_SIGNALS:
            loop.add_signal_handler(number, self._on_signal, number)
        try:
            return await self._join_again_and_again()
        finally:
            for number in STOP_SIGNALS:
                loop.remove_signal_handler(number)
            if self._launcher:
                await self._launcher.close(_GONE_S)

    def _on_signal(self, number: int) -> None:
        self._stop.on_signal(number, time.monotonic())
        if self._stop.at_once:
            self._ends_now.set()
        elif not self._leaves.is_set():
            self._tell("leaving: its requests move first; again: at once")
        self._leaves.set()

    async def _join_again_and_again(self) -> int:
        lost_at = time.monotonic()
        wait_s = 0.0
        while True:
            session = self._session = _AgentSession(self)
            outcome, reason = await session.run()
            self._session = None
            if self._ends_now.is_set():
                return 130
            if outcome is Outcome.LEFT:
                self._tell(reason)
                return 0
            if session.served_s >= _HEALTHY_S:
                lost_at = time.monotonic()
            wait_s = wait_before_joining(wait_s, session.served_s)
            if outcome is Outcome.LOST and self._leaves.is_set():  # there is nobody to drain it
                self._tell(reason)
                return 0
            over = time.monotonic() - lost_at > self._options.retry_s
            if outcome is Outcome.REFUSED or over:
                self.failure = reason
                print(f"flexpert: {reason}", file=sys.stderr)
                return 1
            self._tell(f"{reason}; joining again in {wait_s:g} s")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._leaves.wait(), wait_s)
            if self._leaves.is_set():
                return 0

    async def prepare(self, settings: str, *, reconnects: bool) -> Config:
        """The model and a fork server for these settings. reconnects: its rank may get another
        connection. Raises: FlexpertError"""
        tree = msgspec.json.decode(settings, type=dict[str, dict[str, object]])
        for path, value in self._options.overrides.items():
            section, _, name = path.partition(".")
            tree.setdefault(section, {})[name] = value
        try:
            config = Config.model_validate(tree)
        except ValidationError as error:
            raise FlexpertError(f"the head's settings do not fit here: {error}") from None
        wanted = (config.model_dump_json(), reconnects)
        if self._launcher and self._prepared == wanted:
            return config
        if self._launcher:
            await self._launcher.close(_GONE_S)
        self._tell(f"opening model {config.model.model!r}")
        self._launcher = LocalLauncher(self._on_exit, reconnects=reconnects)
        timeout_s = config.cluster.start_timeout
        await self._launcher.start(config, timeout_s)
        self._model = (await ask_model(self._launcher, config, timeout_s, described=True)).model
        self._prepared = wanted
        return config

    def _on_exit(self, rank: int, status: int, why: str) -> None:
        if self._session:
            self._session.rank_exited(status, why)


def _free_memory(config: Config, gpus: int | None, rank: int) -> say.FreeMemory:
    """Raises: OperationRefused: the system does not say it."""
    device = None
    if gpus is not None and (driver := driver_of(gpus)) is not None:
        memory = driver.memory(rank % driver.gpus)
        device = memory.free if memory else None
    return say.FreeMemory(free_memory(config), device)


class _AgentSession:
    """One connection to the head, from `Join` to the end of the rank."""

    def __init__(self, agent: Agent) -> None:
        self._spawned: float | None = None
        self._serves = False
        self._agent = agent
        self._loop = asyncio.get_running_loop()
        self._over: asyncio.Future[tuple[Outcome, str]] = self._loop.create_future()
        self._welcome: asyncio.Future[say.Welcome] = self._loop.create_future()
        self._heard = self._loop.time()
        self._client: CurveClient | None = None
        self._number = b""
        self._config: Config | None = None
        self._pipe: BytePipe | None = None
        self._orphan_s = 0.0  # its rank waits so long for another head
        self._gone: say.RankGone | None = None
        self._exited = asyncio.Event()
        self._exited.set()

    @property
    def served_s(self) -> float:
        """For how long it has had a rank."""
        return 0.0 if self._spawned is None else self._loop.time() - self._spawned

    async def run(self) -> tuple[Outcome, str]:
        agent = self._agent
        address = agent._options.address
        self._client = CurveClient(address, agent._keys, self._receive, self._refused)
        work = self._loop.create_task(self._work())
        ends = self._loop.create_task(agent._ends_now.wait())
        try:
            await asyncio.wait((work, self._over, ends), return_when=asyncio.FIRST_COMPLETED)
            if self._over.done():
                return self._over.result()
            if ends.done():
                self._send(say.AskToLeave(self._number, now=True))
                return Outcome.LEFT, "stopped"
            return work.result()
        finally:
            self._serve(False)
            work.cancel()
            ends.cancel()
            await self._end_rank()
            self._client.close()

    async def _work(self) -> tuple[Outcome, str]:
        """Join, and keep the session up; ends only with an error."""
        agent = self._agent
        options = agent._options
        address, host = options.address, options.host or socket.gethostname()
        self._send(say.Join(VERSION, agent._rank, host, options.ticket))
        leaves = self._loop.create_task(agent._leaves.wait())
        try:
            await asyncio.wait(
                (self._welcome, leaves), timeout=_WELCOME_S, return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            leaves.cancel()
        if not self._welcome.done():
            if agent._leaves.is_set():
                return Outcome.LEFT, "stopped"
            return Outcome.LOST, f"no answer from {address}; is the head there, with --join-listen?"
        welcome = self._welcome.result()
        agent._rank, self._number = welcome.rank, welcome.session
        self._orphan_s = welcome.orphan_s
        beats = self._loop.create_task(self._beat(welcome.timeout_s))
        try:
            agent._tell(f"joining as rank {welcome.rank}")
            self._config = await agent.prepare(welcome.settings, reconnects=welcome.orphan_s > 0)
            model = agent._model
            assert model is not None
            free = await asyncio.to_thread(_free_memory, self._config, model.gpus, agent._rank)
            self._send(say.Opened(self._number, model.description, free))
            await agent._leaves.wait()
            self._send(say.AskToLeave(self._number))
            await asyncio.Event().wait()  # until the head says that it has left
        except FlexpertError as error:
            self._send(say.AskToLeave(self._number, now=True, why=str(error)))
            return Outcome.REFUSED, str(error)
        finally:
            beats.cancel()
        raise AssertionError

    async def _beat(self, timeout_s: float) -> None:
        while True:
            await asyncio.sleep(timeout_s / _BEATS)
            self._send(say.AgentBeat(self._number))
            silent_s = self._loop.time() - self._heard
            limit_s = _SILENCE * timeout_s
            if silent_s > limit_s and self._waits:
                self._cut_rank_off()
                limit_s = max(limit_s, self._orphan_s)
            if silent_s > limit_s:
                self._end(Outcome.LOST, f"nothing was heard of the head for {silent_s:.1f} s")

    @property
    def _waits(self) -> bool:
        """Whether there is a rank, and it waits for another head when this one is lost."""
        has_rank = self._spawned is not None and self._gone is None
        return self._orphan_s > 0 and has_rank and not self._agent._leaves.is_set()

    def _cut_rank_off(self) -> None:
        """What it says is of no use to another head, to which it says all that matters again."""
        if self._pipe is not None:
            self._pipe.close()
            self._pipe = None

    # ---- what the head says -----------------------------------------------------------------

    def _receive(self, message: bytes) -> None:
        try:
            heard = say.decode_to_agent(message)
        except WrongProtocol as error:
            self._end(Outcome.REFUSED, f"the head cannot be understood: {error}")
            return
        except msgspec.MsgspecError as error:
            self._end(Outcome.LOST, f"the head says what cannot be understood: {error}")
            return
        self._heard = self._loop.time()
        if isinstance(heard, say.Turned):
            outcome = Outcome.LOST if heard.again else Outcome.REFUSED
            self._end(outcome, f"the head does not take it: {heard.reason}")
        elif isinstance(heard, say.Welcome):
            if not self._welcome.done():
                self._welcome.set_result(heard)
        elif heard.session == self._number:
            self._obey(heard)

    def _obey(self, command: say.ToAgent) -> None:
        match command:
            case say.HeadBeat(_, serves):
                self._serve(serves)
            case say.Spawn(_, verdicts):
                self._spawn(verdicts)
            case say.Reattach():
                self._reattach()
            case say.ToRank(_, data) if self._pipe is not None:
                self._pipe.write(data)
            case say.Left(_, reason):
                left = f"rank {self._agent._rank} has left"
                self._end(Outcome.LEFT, f"{left}: {reason}" if reason else left)
            case say.Fenced(_, reason):
                self._end(Outcome.LOST, f"rank {self._agent._rank} was given up: {reason}")

    def _refused(self) -> None:
        if self._waits:  # a head that ended just now; or one with another token: then none comes
            return
        address = self._agent._options.address
        self._end(
            Outcome.REFUSED,
            f"{address} does not take this cluster token, or is no head of flexpert: give the "
            "head's with --cluster-token-file or FLEXPERT_CLUSTER_TOKEN",
        )

    # ---- the rank ---------------------------------------------------------------------------

    def _spawn(self, verdicts: bytes) -> None:
        agent = self._agent
        if agent._launcher is None or self._config is None or self._spawned is not None:
            self._end(Outcome.LOST, "the head starts a rank that is not ready, or there already")
            return
        near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self._pipe = BytePipe(near, self._from_rank, lambda: None)
        self._exited.clear()
        self._spawned = self._loop.time()
        settings = for_children(self._config)
        spec = RankSpec(agent._rank, settings, verdicts, several_machines=True)
        agent._launcher.spawn(agent._rank, ENTRY, encode_spec(spec), far)
        agent._tell(f"rank {agent._rank} starts")

    def _reattach(self) -> None:
        """Another head goes on: its connection with the rank is a new one."""
        agent = self._agent
        if self._gone is not None:
            self._send(self._gone)
            return
        if agent._launcher is None or self._spawned is None:
            self._end(Outcome.LOST, "the head asks for a rank that is not there")
            return
        self._cut_rank_off()
        near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self._send(say.Reattached(self._number))
        self._pipe = BytePipe(near, self._from_rank, lambda: None)
        agent._launcher.attach(agent._rank, far)
        agent._tell(f"rank {agent._rank} goes on with another head")

    def _serve(self, serves: bool) -> None:
        if serves != self._serves:
            self._serves = serves
            self._agent._ready.show(serves)
            if serves:
                self._agent._tell(f"rank {self._agent._rank} serves")

    def _from_rank(self, data: bytes) -> None:
        for piece in pieces(data):
            self._send(say.FromRank(self._number, piece))

    def rank_exited(self, status: int, why: str) -> None:
        """The process is reaped; what it said is sent first, since that came before."""
        self._exited.set()
        self._gone = say.RankGone(self._number, status, why)
        self._send(self._gone)

    async def _end_rank(self) -> None:
        if self._exited.is_set():
            return
        assert self._agent._launcher is not None
        self._agent._launcher.kill(self._agent._rank)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._exited.wait(), _GONE_S)

    def _send(self, message: say.ToHead) -> None:
        assert self._client is not None
        try:
            self._client.send(say.encode(message))
        except NotSentError as error:
            if self._waits:
                self._cut_rank_off()
                return
            self._end(Outcome.LOST, f"the head cannot be told anything: {error}")

    def _end(self, outcome: Outcome, reason: str) -> None:
        if not self._over.done():
            self._over.set_result((outcome, reason))
