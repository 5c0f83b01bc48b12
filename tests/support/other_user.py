"""What another user of the machine tries against a service; run by test_other_user.py, as root.

`python other_user.py UID` reads what to try as JSON from standard input, becomes UID, and writes
what worked: a list of lines, which is to be empty.
"""

from __future__ import annotations

import ctypes
import http.client
import json
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable

LIBC = ctypes.CDLL(None, use_errno=True)
PTRACE_ATTACH, PTRACE_SEIZE = 16, 0x4206
PIDFD_OPEN, PIDFD_GETFD, PIDFD_SEND_SIGNAL, KCMP = 434, 438, 424, 312
SECRET_FILES = (
    *("fd", "fdinfo", "map_files", "task/{pid}/fd", "root", "cwd", "exe"),
    *("mem", "environ", "maps", "smaps", "smaps_rollup", "auxv", "stack", "syscall", "io"),
    *("pagemap", "clear_refs", "oom_score_adj", "personality"),
)


class IoVec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("size", ctypes.c_size_t))


found: list[str] = []
tried = 0


def try_(what: str, action: Callable[[], object]) -> None:
    """It must be refused."""
    global tried
    tried += 1
    try:
        result = action()
    except OSError:
        return
    found.append(f"{what}: {result!r}"[:300])


def call(function: Callable[..., int], *arguments: object) -> int:
    """Raises: OSError: it is refused."""
    result = function(*arguments)
    if result == -1:
        raise OSError(ctypes.get_errno(), "")
    return result


def read(path: str) -> object:
    if os.path.isdir(path):
        return os.listdir(path)
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        return os.read(descriptor, 1 << 16)
    finally:
        os.close(descriptor)


def write(path: str) -> object:
    os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
    return "can be written"


def attack_process(pid: int, descriptors: list[int], address: int) -> None:
    for name in SECRET_FILES:
        path = f"/proc/{pid}/{name.format(pid=pid)}"
        if name in ("root", "cwd", "exe"):
            try_(path, lambda path=path: os.readlink(path))
        elif name in ("clear_refs", "oom_score_adj"):
            try_(path, lambda path=path: write(path))
        else:
            try_(path, lambda path=path: read(path))
    for descriptor in descriptors:
        path = f"/proc/{pid}/fd/{descriptor}"
        try_(path, lambda path=path: os.readlink(path))
        for flags in (os.O_RDONLY, os.O_RDWR):
            try_(path, lambda p=path, f=flags: os.open(p, f | os.O_NONBLOCK))
    for request in (PTRACE_ATTACH, PTRACE_SEIZE):
        try_(f"ptrace {pid}", lambda r=request: call(LIBC.ptrace, r, pid, None, None))
    for number in (0, signal.SIGCONT, signal.SIGSTOP, signal.SIGTERM, signal.SIGKILL):
        try_(f"kill {pid} {number}", lambda n=number: os.kill(pid, n))
    memory = ctypes.create_string_buffer(64)
    here, there = IoVec(ctypes.addressof(memory), 64), IoVec(address, 64)
    for name in ("process_vm_readv", "process_vm_writev"):
        arguments = (pid, ctypes.byref(here), 1, ctypes.byref(there), 1, 0)
        try_(name, lambda n=name, a=arguments: call(getattr(LIBC, n), *a))
    pidfd = os.pidfd_open(pid)
    for descriptor in descriptors:
        try_("pidfd_getfd", lambda d=descriptor: call(LIBC.syscall, PIDFD_GETFD, pidfd, d, 0))
    try_("pidfd_send_signal", lambda: signal.pidfd_send_signal(pidfd, signal.SIGKILL))
    try_("kcmp", lambda: call(LIBC.syscall, KCMP, pid, pid, 1, 0, 0))
    try_("sched_setaffinity", lambda: os.sched_setaffinity(pid, {0}))
    try_("sched_setscheduler", lambda: os.sched_setscheduler(pid, os.SCHED_IDLE, os.sched_param(0)))
    try_("setpriority", lambda: os.setpriority(os.PRIO_PROCESS, pid, 19))
    try_("prlimit", lambda: resource.prlimit(pid, resource.RLIMIT_NOFILE))
    try_("prlimit", lambda: resource.prlimit(pid, resource.RLIMIT_NOFILE, (0, 0)))


def attack_socket(name: str, messages: list[bytes]) -> None:
    address = "\0" + name[1:] if name.startswith("@") else name
    for kind in (socket.SOCK_STREAM, socket.SOCK_SEQPACKET, socket.SOCK_DGRAM):
        with socket.socket(socket.AF_UNIX, kind) as mine:
            mine.settimeout(1)

            def talk(mine: socket.socket = mine) -> str:
                mine.connect(address)
                for message in messages:
                    mine.send(message)
                return "connected"

            try_(f"Unix socket {name!r}", talk)


def attack_http(port: int, requests: list[tuple[str, str]], key: str | None) -> None:
    for method, path in requests:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        headers = {"content-type": "application/json"}
        if key:
            headers["authorization"] = f"Bearer {key}"

        def ask(c: http.client.HTTPConnection = connection, m: str = method, p: str = path) -> str:
            c.request(m, p, b"{}" if m == "POST" else None, headers)  # noqa: B023
            status = c.getresponse().status
            if status == 401:
                raise PermissionError
            return f"status {status}"

        try_(f"{method} {path}", ask)
        connection.close()


def main() -> None:
    told = json.load(sys.stdin)
    "".encode("idna")  # what is imported later could not be read
    uid = int(sys.argv[1])
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    messages = [bytes(range(256)) * 16, *map(bytes.fromhex, told["messages"])]
    for process in told["processes"]:
        attack_process(process["pid"], process["descriptors"], process["address"])
    for name in told["sockets"]:
        attack_socket(name, messages)
    for path in told["files"]:
        try_(path, lambda path=path: write(path))
    for path in told["folders"]:
        mine = os.path.join(path, "mine")
        try_(path, lambda mine=mine: os.close(os.open(mine, os.O_CREAT | os.O_WRONLY)))
    for key in (None, "wrong", ""):
        attack_http(told["port"], told["requests"], key)
    json.dump({"found": found, "tried": tried}, sys.stdout)


if __name__ == "__main__":
    main()
