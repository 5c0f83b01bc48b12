"""How the fork server of a service is started: also before there is anybody to hear it.

Importing torch and transformers takes the head as long as it takes the fork server. Nothing here
needs them, so that a head can start its fork server first and import them at the same time.
"""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import time
from types import TracebackType
from typing import Protocol

from flexpert.cluster.processes import fork_server_process
from flexpert.cluster.processes.fork_server_process import (
    Connected,
    children_environment,
    terminate,
)
from flexpert.config import Config
from flexpert.forking import fork_server

_OF_HEAD = {
    "ranks",
    "state_dir",
    "resume",
    "join_listen",
    "cluster_token_file",
    "launcher",
    "ray_address",
    "ray_resources",
}

RANKS_SOCKET = "ranks.sock"  # in the state directory, of the fork server

_SETUP = "flexpert.cluster.processes.model_opening:open_model"


class EarlyForkServer:
    """A fork server that imports what ranks need until a launcher takes it over.

    Used with `with` around everything up to then: a fork server that nobody has taken is terminated
    at the end of it. One that the system refuses is none; the launcher starts its own, and says
    what is in the way if it is still refused.

    began: when, in seconds of the monotonic clock.
    """

    def __init__(self, config: Config) -> None:
        self.began = time.monotonic()
        self._config = config
        self._connected: Connected | None = None
        with contextlib.suppress(OSError):  # the launcher tries again, and says what is wrong
            self._connected = start_fork_server(config)

    def take(self, config: Config) -> Connected | None:
        """The process and the head's end of its channel, to whoever asks first.

        None: it is not there (any more), or was told other settings than these.
        """
        if config != self._config:
            return None
        taken, self._connected = self._connected, None
        return taken

    def kill(self) -> None:
        """Unless it was taken, without waiting for its end; for handlers of signals."""
        if self._connected is not None:
            self._connected[0].kill()

    def __enter__(self) -> EarlyForkServer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        left, self._connected = self._connected, None
        if left is not None:
            terminate(*left)


class StartServer(Protocol):
    """See `fork_server.start_server`."""

    def __call__(
        self, theirs: socket.socket, environment: dict[str, str]
    ) -> subprocess.Popen[bytes]: ...


def start_fork_server(
    config: Config,
    *,
    reconnects: bool = False,
    start: StartServer = fork_server.start_server,
) -> Connected:
    """A fork server that has been told its model, and the head's end of its channel.

    reconnects: ranks can be given new connections; with a state directory they always can.
    start: starts its process, if none was begun.

    Raises: OSError: the system refuses.
    """
    environment = children_environment()
    folder = config.cluster.state_dir
    keep = fork_server.Keep("", 0.0) if reconnects else None
    if folder is not None:
        path = str(folder.absolute() / RANKS_SOCKET)
        keep = fork_server.Keep(path, config.cluster.orphan_timeout)
    process, ours = _begun(environment, start)
    try:
        begin = fork_server.Begin(
            _SETUP,
            for_children(config).encode(),
            keep=keep,
            log_level=config.server.log_level.upper(),
        )
        ours.send(fork_server.encode(begin))
    except BaseException:
        terminate(process, ours)
        raise
    return process, ours


def _begun(environment: dict[str, str], start: StartServer) -> Connected:
    """Its process and this end of its channel. Raises: OSError"""
    begun = fork_server_process.take_begun(environment)
    if begun is not None:
        return begun
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        try:
            return start(theirs, environment), ours
        except OSError:
            ours.close()
            raise


def for_children(config: Config) -> str:
    """The settings as JSON, without those of the HTTP server, whose keys are nobody else's."""
    return config.model_dump_json(exclude={"server"})


def for_hosts(config: Config) -> str:
    """The settings as JSON for agents on other hosts: besides, nothing that is only this one's."""
    tree = config.model_dump(mode="json", exclude={"server"})
    for name in ("machine", "interface"):
        tree["engine"].pop(name)
    for name in tree["cluster"].keys() & _OF_HEAD:
        tree["cluster"].pop(name)
    return json.dumps(tree)
