"""The process that talks to Ray; the only module that imports it.

A process of its own, because Ray's calls block, for as long as they like, and because Ray ends the
process of a driver when its GCS has been away for a minute. The head with all requests must not be
that process. Another one starts anew; so this one exits when its node is lost, since Ray has ended
its job then. It is started by `RayRanks` as `ray_driver.main(FD)`, FD one end of a socket pair.
When the other end closes it gives everything back and exits; however it ends, Ray ends its actors
and removes its placement groups.
"""

from __future__ import annotations

import contextlib
import os
import re
import selectors
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
from ray._private import services, state
from ray.exceptions import RayError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from flexpert.cluster.hosts.ray_protocol import (
    AgentEnded,
    ConnectRay,
    FromRay,
    LeaveRay,
    LookAtNodes,
    RayAnswer,
    RayNode,
    StartAgent,
    StopAgent,
    ToRay,
    decode_to_ray,
    encode,
)
from flexpert.errors import FlexpertError
from flexpert.forking.framing import Deframer, frame

_REACH_S = 3.0  # for a connection to Ray's GCS
_PLACE_S = 3.0  # for a node to take a bundle for which it has room
_END_S = 2.0  # for an agent to end by itself
_SETTLE_S = 0.3  # until GCS counts what was given back; it is told every 0.1 s
_LOOK_S, _LOOK_OFTEN_S = 0.5, 0.1  # for agents that have ended
_CAUSE = re.compile(r"^\w*(?:Error|Exception)\b.*", re.MULTILINE)  # a traceback's last line
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_NODE_LABEL = "ray.io/node-id"
_MOST_WHY = 300


class RayAgent:
    """The actor: one agent of `flexpert join`, in the main thread of a worker process of Ray."""

    def run(self, address: str, rank: int, ticket: bytes, host: str, token: str) -> str:
        """Until its rank is gone, or it cannot join; returns why it has ended."""
        import asyncio

        from flexpert.cluster.processes import caches

        caches.keep_private(os.environ)  # before torch is imported
        from flexpert.cluster.hosts.agent import Agent, AgentOptions
        from flexpert.cluster.hosts.cluster_token import keys_of

        options = AgentOptions(address, rank, {}, 0.0, ticket=ticket, host=host)

        async def join() -> str:
            agent = Agent(options, keys_of(token), lambda line: print(line, flush=True))
            status = await agent.run()
            return agent.failure or f"its agent has ended with status {status}"

        return asyncio.run(join())


@dataclass(slots=True)
class _Hosted:
    """What Ray was asked for. ends_at: when the actor is killed at the latest, once it may end."""

    group: Any
    actor: Any
    run: Any
    over: bool = False
    ends_at: float | None = None


class RayDriver:
    """Requests, one after the other. tell: an event for the head."""

    def __init__(self, tell: Callable[[FromRay], None]) -> None:
        self._tell = tell
        self._hosted: dict[bytes, _Hosted] = {}
        self._own_node = ""
        self._released = float("-inf")

    def answer(self, request: ToRay) -> RayAnswer:
        """Errors of Ray and of the system are part of the answer."""
        try:
            match request:
                case ConnectRay(number, address):
                    return RayAnswer(number=number, node_ip=self._connect(address))
                case LookAtNodes(number):
                    return RayAnswer(number=number, nodes=self._nodes())
                case StartAgent():
                    self._start(request)
                case StopAgent(_, ticket):
                    self._let_end(ticket)
                case LeaveRay():
                    self.close()
        except (RayError, FlexpertError, OSError, RuntimeError, ValueError) as error:
            return RayAnswer(number=request.number, error=_in_short(error))
        return RayAnswer(number=request.number)

    # ---- requests ---------------------------------------------------------------------------

    def _connect(self, address: str) -> str:
        found = services.canonicalize_bootstrap_address(address)
        host, _, port = str(found).rpartition(":")
        with contextlib.closing(socket.create_connection((host.strip("[]"), int(port)), _REACH_S)):
            pass
        ray.init(
            address=found,
            namespace="flexpert",
            log_to_driver=False,
            configure_logging=False,
            logging_level="ERROR",
        )
        self._own_node = ray.get_runtime_context().get_node_id()
        return str(ray.util.get_node_ip_address())

    def _nodes(self) -> list[RayNode]:
        self._settle()
        living = [node for node in ray.nodes() if node["Alive"]]
        if self._own_node not in {node["NodeID"] for node in living}:
            # Ray has ended this job with it; what would be placed now would never start
            raise SystemExit("the node of this process is lost")
        free, total = state.available_resources_per_node(), state.total_resources_per_node()
        return [
            RayNode(
                id=node["NodeID"],
                host=node["NodeManagerHostname"],
                free=free.get(node["NodeID"], {}),
                total=total.get(node["NodeID"], {}),
            )
            for node in living
        ]

    def _settle(self) -> None:
        """Until what is being given back is counted as free."""
        while any(hosted.ends_at is not None for hosted in self._hosted.values()):
            self.poll()
            time.sleep(_LOOK_OFTEN_S)
        time.sleep(max(0.0, self._released + _SETTLE_S - time.monotonic()))

    def _start(self, request: StartAgent) -> None:
        group = placement_group(
            [request.demand],
            strategy="PACK",
            name=f"flexpert rank {request.rank}",
            bundle_label_selector=[{_NODE_LABEL: request.node}],
        )
        try:
            if not group.wait(_PLACE_S):
                raise FlexpertError(f"node {request.node[:8]} did not take it in {_PLACE_S:g} s")
            actor = ray.remote(RayAgent).options(
                **_options(request.demand),
                max_restarts=0,
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, 0),
            )
            actor = actor.remote()
        except BaseException:
            remove_placement_group(group)
            raise
        host = f"{_host_of(request.node)}, Ray node {request.node[:8]}"
        run = actor.run.remote(request.address, request.rank, request.ticket, host, request.token)
        self._hosted[request.ticket] = _Hosted(group, actor, run)

    def _let_end(self, ticket: bytes) -> None:
        hosted = self._hosted.get(ticket)
        if hosted is not None and hosted.ends_at is None:
            hosted.ends_at = time.monotonic() + _END_S
            self.poll()

    def close(self) -> None:
        """Give everything back. Idempotent."""
        for ticket in list(self._hosted):
            self._let_end(ticket)
        while self._hosted:
            self.poll()
            time.sleep(_LOOK_OFTEN_S)
        ray.shutdown()

    # ---- what happens meanwhile --------------------------------------------------------------

    @property
    def poll_s(self) -> float | None:
        """Seconds until the next `poll`; None: there is nothing to look for."""
        if not self._hosted:
            return None
        ending = any(hosted.ends_at is not None for hosted in self._hosted.values())
        return _LOOK_OFTEN_S if ending else _LOOK_S

    def poll(self) -> None:
        """Tell which agents have ended, and give back what was asked for those that may."""
        running = {hosted.run: ticket for ticket, hosted in self._hosted.items() if not hosted.over}
        done, _ = (
            ray.wait(list(running), num_returns=len(running), timeout=0) if running else ((), ())
        )
        for run in done:
            ticket = running[run]
            self._hosted[ticket].over = True
            self._tell(AgentEnded(ticket, _outcome(run)))
        now = time.monotonic()
        for ticket, hosted in list(self._hosted.items()):
            if hosted.ends_at is not None and (hosted.over or now >= hosted.ends_at):
                del self._hosted[ticket]
                ray.kill(hosted.actor, no_restart=True)
                remove_placement_group(hosted.group)
                self._released = now


def _outcome(run: Any) -> str:
    try:
        return str(ray.get(run))
    except (RayError, OSError, RuntimeError, ValueError, ImportError) as error:
        return _in_short(error)


def _options(demand: dict[str, float]) -> dict[str, Any]:
    """Of an actor that takes the whole of its bundle."""
    others = {name: amount for name, amount in demand.items() if name not in _OWN_OPTIONS}
    own = {option: demand[name] for name, option in _OWN_OPTIONS.items() if name in demand}
    return {"num_cpus": 0, **own, "resources": others}


_OWN_OPTIONS = {"CPU": "num_cpus", "GPU": "num_gpus", "memory": "memory"}


def _host_of(node: str) -> str:
    return next((n["NodeManagerHostname"] for n in ray.nodes() if n["NodeID"] == node), "?")


def _in_short(error: BaseException) -> str:
    """One line: Ray's messages have many, among them the traceback of what went wrong elsewhere."""
    text = _COLOURS.sub("", str(error))
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    causes = _CAUSE.findall(text)
    found = causes[-1] if causes else lines[0] if lines else type(error).__name__
    return str(found)[:_MOST_WHY]


def main(descriptor: int) -> None:
    """Serve the head until it has nothing more to ask."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the head's: it ends this process
    end = socket.socket(fileno=descriptor)

    def tell(message: FromRay) -> None:
        with contextlib.suppress(OSError):  # the head is gone: seen when it is read
            end.sendall(frame(encode(message)))

    driver, deframer = RayDriver(tell), Deframer()
    with selectors.DefaultSelector() as selector:
        selector.register(end, selectors.EVENT_READ)
        while True:
            if not selector.select(driver.poll_s):
                driver.poll()
                continue
            data = end.recv(1 << 16)
            if not data:
                driver.close()
                return
            for message in deframer.feed(data):
                request = decode_to_ray(message)
                tell(driver.answer(request))
                if isinstance(request, LeaveRay):
                    return
            driver.poll()
