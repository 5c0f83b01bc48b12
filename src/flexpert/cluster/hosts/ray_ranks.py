"""Ranks that Ray places: the head's side.

For each rank an agent is started on a node of Ray, with a ticket. The agent joins with it like any
other (`host_sessions.py`), and the rank is started through it. What was asked of Ray is given back
when the rank is gone. Ray's calls are made by a process of its own (`ray_driver.py`).
"""

from __future__ import annotations

import asyncio
import importlib.util
import itertools
import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

from flexpert.cluster.hosts.ray_placement import NoRoomError, choose_nodes, demand_of
from flexpert.cluster.hosts.ray_protocol import (
    AgentEnded,
    ConnectRay,
    LeaveRay,
    LookAtNodes,
    RayAnswer,
    StartAgent,
    StopAgent,
    ToRay,
    decode_from_ray,
    encode,
)
from flexpert.config import Config
from flexpert.errors import ConfigError, FlexpertError, OperationRefused
from flexpert.forking.framing import Deframer, frame

log = logging.getLogger("flexpert")

_CONNECT_S = 30.0
_ANSWER_S = 20.0
_LEAVE_S = 10.0
_LOOK_AGAIN_S = 0.5  # while resources are waited for
_AVOID_S = 30.0  # a node that did not take a rank: Ray learns of a lost one late
_SECRETS = ("FLEXPERT_SERVER__", "FLEXPERT_API_KEY", "FLEXPERT_CLUSTER_TOKEN")
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # seconds that Ray looks for itself where something else answers; its own limit is 20
    "RAY_NUM_REDIS_GET_RETRIES": "5",
}


class RayOwner(Protocol):
    """Who has asked for the ranks."""

    def agent_ended(self, ticket: bytes, why: str) -> None:
        """There is no agent with this ticket, or none any more."""


@dataclass(slots=True)
class _Wanted:
    """node: where its agent was started; "": nowhere yet."""

    rank: int
    ticket: bytes
    node: str = ""


class RayRanks:
    """Used on the head's event loop.

    node_ip: of this machine, as Ray knows it; set by `connect`.
    """

    node_ip: str

    def __init__(self, config: Config, owner: RayOwner, token: str) -> None:
        """token: the cluster's. Raises: ConfigError: Ray is not installed."""
        if importlib.util.find_spec("ray") is None:
            raise ConfigError("--launcher ray needs Ray: pip install 'flexpert[ray]'")
        self._config = config
        self._owner = owner
        self._token = token
        self._demand = demand_of(config)
        self._wanted: dict[bytes, _Wanted] = {}
        self._batch: list[_Wanted] = []
        self._avoided: dict[str, float] = {}  # node → until when
        self._address = ""
        self._process: _RayProcess | None = None
        self._connecting = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False

    async def connect(self) -> None:
        """Raises: ConfigError: Ray is not there."""
        try:
            await self._connected()
        except FlexpertError as error:
            raise ConfigError(
                f"Ray cannot be reached at {self._config.cluster.ray_address!r}: {error}; start it "
                "with 'ray start --head', or name a cluster of which this machine is a node with "
                "--ray-address HOST:PORT"
            ) from None

    @property
    def own_address(self) -> str:
        """Where to listen for agents, unless the settings say it."""
        return reachable_at("tcp://*:0", self.node_ip)

    def join_at(self, address: str) -> None:
        """Where agents are to join; before the first `start`."""
        self._address = reachable_at(address, self.node_ip)

    async def check_room(self, count: int) -> None:
        """Before a change with so many newcomers.

        Raises: OperationRefused: there is no room, and it is not to be waited for.
        """
        if count and not self._config.cluster.wait_for_resources:
            try:
                await self._choose(count)
            except NoRoomError as error:
                raise OperationRefused(f"{error}; see --wait-for-resources") from None
            except FlexpertError as error:
                raise OperationRefused(f"Ray cannot be asked for room: {error}") from None

    def start(self, rank: int) -> bytes:
        """Have an agent started that will join for this rank; returns its ticket."""
        wanted = _Wanted(rank, secrets.token_bytes(16))
        self._wanted[wanted.ticket] = wanted
        if not self._batch:  # the ranks of one change are placed together
            asyncio.get_running_loop().call_soon(self._place_batch)
        self._batch.append(wanted)
        return wanted.ticket

    def stop(self, ticket: bytes) -> None:
        """Its rank is gone: give back what was asked for. Idempotent."""
        wanted = self._wanted.pop(ticket, None)
        if wanted is not None and wanted.node and not self._closed:
            self._do(self._stop(ticket))

    async def close(self) -> None:
        """Give everything back. Idempotent."""
        if self._closed:
            return
        self._closed = True
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._process is not None:
            await self._process.close()

    # ---- placing ----------------------------------------------------------------------------

    def _place_batch(self) -> None:
        batch, self._batch = self._batch, []
        self._do(self._place(batch))

    async def _place(self, batch: list[_Wanted]) -> None:
        loop = asyncio.get_running_loop()
        wait_s = self._config.cluster.wait_for_resources
        deadline = loop.time() + wait_s
        told = False
        while batch := [one for one in batch if one.ticket in self._wanted and not one.node]:
            try:
                nodes = await self._choose(len(batch))
            except NoRoomError as error:
                if loop.time() >= deadline:
                    self._fail(batch, str(error))
                    return
                if not told:
                    log.info("waiting up to %g s for room: %s", wait_s, error)
                told = True
                await asyncio.sleep(_LOOK_AGAIN_S)
                continue
            except FlexpertError as error:
                self._fail(batch, f"Ray cannot be asked for room: {error}")
                return
            for one, node in zip(batch, nodes, strict=True):
                await self._start_on(one, node)

    async def _choose(self, count: int) -> list[str]:
        """Raises: NoRoomError, FlexpertError"""
        answer = await self._ask(LookAtNodes)
        now = time.monotonic()
        self._avoided = {node: until for node, until in self._avoided.items() if until > now}
        return choose_nodes(
            answer.nodes,
            self._demand,
            count,
            self._config.cluster.ray_strategy,
            ranks=Counter(one.node for one in self._wanted.values() if one.node),
            avoided=self._avoided,
        )

    async def _start_on(self, one: _Wanted, node: str) -> None:
        """If Ray does not start it there, it is tried elsewhere."""
        if one.ticket not in self._wanted:  # it was given up meanwhile
            return
        try:
            await self._ask(
                lambda number: StartAgent(
                    number=number,
                    ticket=one.ticket,
                    rank=one.rank,
                    node=node,
                    demand=self._demand,
                    address=self._address,
                    token=self._token,
                )
            )
        except FlexpertError as error:
            log.warning("Ray does not start rank %d on node %s: %s", one.rank, node[:8], error)
            self._avoided[node] = time.monotonic() + _AVOID_S
            return
        one.node = node
        if one.ticket not in self._wanted:
            await self._stop(one.ticket)

    def _fail(self, batch: list[_Wanted], why: str) -> None:
        for one in batch:
            if self._wanted.pop(one.ticket, None) is not None:
                self._owner.agent_ended(one.ticket, why)

    async def _stop(self, ticket: bytes) -> None:
        try:
            await self._ask(lambda number: StopAgent(number, ticket))
        except FlexpertError as error:  # then its process has ended, and Ray gives back by itself
            log.warning("Ray cannot be told that a rank is gone: %s", error)

    # ---- Ray --------------------------------------------------------------------------------

    async def _ask(self, request: Callable[[int], ToRay]) -> RayAnswer:
        """Raises: FlexpertError"""
        process = await self._connected()
        return await process.ask(request, _ANSWER_S)

    async def _connected(self) -> _RayProcess:
        """A process that is connected; another one if it has ended. Raises: FlexpertError"""
        async with self._connecting:
            if self._process is None or self._process.ended:
                if self._closed:
                    raise FlexpertError("the service is stopping")
                process = _RayProcess(self._on_ended)
                address = self._config.cluster.ray_address
                try:
                    answer = await process.ask(
                        lambda number: ConnectRay(number, address), _CONNECT_S
                    )
                except BaseException:
                    process.kill()
                    raise
                if self._closed:
                    process.kill()
                    raise FlexpertError("the service is stopping")
                self._process, self.node_ip = process, answer.node_ip
            return self._process

    def _on_ended(self, event: AgentEnded) -> None:
        wanted = self._wanted.get(event.ticket)
        if wanted is not None and not self._closed:
            self._owner.agent_ended(wanted.ticket, event.why)

    def _do(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("Ray could not be asked", exc_info=error)


class _RayProcess:
    """The process that talks to Ray. on_ended(event): an agent has ended."""

    def __init__(self, on_ended: Callable[[AgentEnded], None]) -> None:
        """Raises: FlexpertError: it cannot be started."""
        self._on_ended = on_ended
        self._loop = asyncio.get_running_loop()
        self._numbers = itertools.count(1)
        self._asked: dict[int, asyncio.Future[RayAnswer]] = {}
        self._deframer = Deframer()
        self._leaving = False
        self._end, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs:
            try:
                self._process = _start(theirs)
            except OSError as error:
                self._end.close()
                raise FlexpertError(f"no process can be started: {error.strerror}") from None
        self._end.setblocking(False)
        self._loop.add_reader(self._end, self._receive)

    @property
    def ended(self) -> bool:
        return self._end.fileno() < 0

    async def ask(self, request: Callable[[int], ToRay], timeout_s: float) -> RayAnswer:
        """Raises: FlexpertError: it cannot be done, or is not answered in time."""
        if self.ended:
            raise FlexpertError("the process that talks to Ray has ended")
        number = next(self._numbers)
        asked: asyncio.Future[RayAnswer] = self._loop.create_future()
        self._asked[number] = asked
        try:
            await self._loop.sock_sendall(self._end, frame(encode(request(number))))
            async with asyncio.timeout(timeout_s):
                answer = await asked
        except TimeoutError:
            self.kill()
            raise FlexpertError(f"Ray has not answered for {timeout_s:g} s") from None
        except OSError:
            self.kill()
            raise FlexpertError("the process that talks to Ray has ended") from None
        finally:
            self._asked.pop(number, None)
        if answer.error:
            raise FlexpertError(answer.error)
        return answer

    def kill(self) -> None:
        """Ray ends what it has started. Idempotent."""
        if self.ended:
            return
        self._loop.remove_reader(self._end)
        self._end.close()
        self._process.kill()
        self._process.wait()
        for asked in self._asked.values():
            if not asked.done():
                asked.set_exception(FlexpertError("the process that talks to Ray has ended"))

    async def close(self) -> None:
        """After everything is given back."""
        self._leaving = True
        if not self.ended:
            try:
                await self.ask(LeaveRay, _LEAVE_S)
                await asyncio.to_thread(self._process.wait, _LEAVE_S)
            except (FlexpertError, subprocess.TimeoutExpired) as error:
                log.warning("Ray could not be told that the service ends: %s", error)
        self.kill()

    def _receive(self) -> None:
        try:
            data = self._end.recv(1 << 16)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            if not self._leaving:
                log.error("the process that talks to Ray has ended, and Ray ends its ranks")
            self.kill()
            return
        for message in self._deframer.feed(data):
            try:
                heard = decode_from_ray(message)
            except msgspec.MsgspecError as error:
                log.error("the process that talks to Ray is not understood: %s", error)
                self.kill()
                return
            if isinstance(heard, AgentEnded):
                self._on_ended(heard)
            elif (asked := self._asked.get(heard.number)) is not None and not asked.done():
                asked.set_result(heard)


def reachable_at(address: str, node_ip: str) -> str:
    """Where others reach a socket that listens at `address`, which may be all of this machine's."""
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    if host in ("0.0.0.0", "[::]", "*"):
        host = f"[{node_ip}]" if ":" in node_ip else node_ip
    return f"tcp://{host}:{port}"


def _start(theirs: socket.socket) -> subprocess.Popen[bytes]:
    """Raises: OSError"""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(_SECRETS)
    }
    # Ctrl-C reaches the whole terminal, and may come before it is ignored
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        return subprocess.Popen(
            [
                sys.executable,
                "-c",  # not -m: what Ray pickles must not be of __main__
                "from flexpert.cluster.hosts import ray_driver; "
                f"ray_driver.main({theirs.fileno()})",
            ],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=_ENVIRONMENT | environment,
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
