"""The process of a fork server before it is told its model: started as early as can be.

It imports what needs no settings meanwhile. Little is imported here, so that a command that is to
serve can start it before anything else.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import resource
import socket
import subprocess

from flexpert.cluster.processes import caches
from flexpert.forking import fork_server

_IMPORTS = "flexpert.cluster.processes.model_opening:import_all"

_ENVIRONMENT = {
    # threads that wait for the next parallel region must sleep: ranks share the cores
    "OMP_WAIT_POLICY": "PASSIVE",
    # whether there is a GPU is asked without CUDA: a process that used it cannot be forked
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # numpy's would start its threads when it is imported; and a fork has but the one that forks
    "OPENBLAS_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "2",
}

# not for children: the keys of the HTTP server and of its clients (see `for_children`)
_SECRETS = ("FLEXPERT_SERVER__", "FLEXPERT_API_KEY")

Connected = tuple[subprocess.Popen[bytes], socket.socket]

_begun: tuple[Connected, dict[str, str]] | None = None


def children_environment() -> dict[str, str]:
    """Of a fork server, and so of all its children."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(_SECRETS)
    }
    environment.update(_ENVIRONMENT)
    caches.keep_private(environment)
    return environment


def begin() -> None:
    """Start one, for whoever asks for it first. One that the system refuses is none, and one that
    nobody takes is ended with this process."""
    global _begun
    if _begun is not None:
        return
    environment = children_environment()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        try:
            process = fork_server.start_server(theirs, environment, preload=_IMPORTS)
        except OSError:
            ours.close()
            return
    _begun = (process, ours), environment
    atexit.register(discard)


def take_begun(environment: dict[str, str]) -> Connected | None:
    """The one that was begun, if its environment is this one; else it is ended."""
    global _begun
    if _begun is None:
        return None
    connected, of = _begun
    if of != environment:
        discard()
        return None
    _begun = None
    with contextlib.suppress(OSError):  # it has ended, as who takes it will see
        here = resource.getrlimit(resource.RLIMIT_NOFILE)  # it may have been raised since
        resource.prlimit(connected[0].pid, resource.RLIMIT_NOFILE, here)
    return connected


def kill_begun() -> None:
    """Without waiting for its end; for handlers of signals."""
    if _begun is not None:
        _begun[0][0].kill()


def discard() -> None:
    """End the one that was begun, if nobody has taken it."""
    global _begun
    begun, _begun = _begun, None
    if begun is not None:
        terminate(*begun[0])


def terminate(process: subprocess.Popen[bytes], channel: socket.socket) -> None:
    """SIGKILL, and wait for its end."""
    channel.close()
    with contextlib.suppress(ProcessLookupError):
        process.kill()
    process.wait()
