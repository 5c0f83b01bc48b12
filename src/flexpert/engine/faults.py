"""Faults on purpose: a rank harms itself at an exact point of the protocol.

Only with FLEXPERT_FAULTS=FOLDER in a service's environment; without it nothing here is installed.
Each file in the folder is one `Fault`. A rank looks into it at every point it passes, counts the
planted faults that fit, removes the file of the one that is due, and strikes: a file that is gone
has struck, and a rank's replacement is not struck again.
"""

from __future__ import annotations

import contextlib
import os
import resource
import secrets
import signal
import threading
from collections.abc import Callable, Container, Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast, get_args

import msgspec

from flexpert.comm import Buffer
from flexpert.comm.buffer import NativeExchange
from flexpert.comm.buffer import Point as ExchangePoint
from flexpert.engine import rank_protocol as msg

VARIABLE = "FLEXPERT_FAULTS"

Taken: TypeAlias = "tuple[bytearray, Taken] | None"  # memory that a starved process may not have

Point = Literal[
    # one step
    "vote",  # before its vote is posted
    "vote_wait",  # before it waits for the others' votes
    "forward",  # of its own tokens, before anything is computed
    "dispatch_send",  # of a layer, before anything is sent
    "dispatch_wait",  # sent, nothing received
    "combine_send",
    "combine_wait",
    "publish",  # the step is whole, nobody knows
    "published",  # the head was told
    # prepare
    "spawn",  # forked, nothing loaded
    "connect",  # before it opens its links
    "load",  # a layer's experts are read
    "warm_up",  # a newcomer walks the model alone: each of its dispatches
    "prepared",  # ready, the head was not told
    "offer",  # a leaver knows what KV could move, the head was not told
    "fetch",  # an destination has copied it, the head was not told
    # commit and release
    "armed",  # it will vote for the new epoch, or enter it
    "switch",  # all have voted for it, nothing has changed
    "first_vote",  # in the new epoch, its first vote is not posted
    "switched",  # the first vote is whole, the head was not told
    "hand_over",  # a leaver has left, the head was not told
    "handed_over",  # the head was told
    "adopt",  # an destination goes on with what a leaver left, the head was not told
    "release",  # told to stop: before its window closes
]

# a report → the points before and after it
_REPORT_POINTS: Mapping[type, tuple[Point, Point | None]] = {
    msg.Published: ("publish", "published"),
    msg.Progress: ("load", None),
    msg.Prepared: ("prepared", None),
    msg.Offered: ("offer", None),
    msg.Fetched: ("fetch", None),
    msg.Adopted: ("adopt", None),
    msg.Switched: ("switched", None),
    msg.HandedOver: ("hand_over", "handed_over"),
}


class Fault(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """count: it strikes when the rank passes the point for this time since it was planted.

    action: "kill" and "stop" are SIGKILL and SIGSTOP. "starve": a leak takes all that the process
    may still get, and it may get no more. "cut": the rank and the head do not hear each other for
    so many `seconds`; what they say arrives afterwards. "fail" is an error that nobody expects.
    token: if given, only a step that computes it is meant, at the point "forward".
    pid: if given, another process of that id is not meant.
    """

    rank: int
    point: Point
    count: int = 1
    action: Literal["kill", "stop", "starve", "cut", "fail"] = "kill"
    token: int | None = None
    seconds: float = 0.0
    pid: int | None = None

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"count is {self.count}, must be at least 1")
        if (self.seconds > 0) != (self.action == "cut"):
            raise ValueError(f"{self.action} for {self.seconds:g} seconds: only a cut takes time")
        if self.token is not None and self.point != "forward":
            raise ValueError(f"token {self.token} at {self.point}: tokens are known at forward")

    def means(self, rank: int, pid: int) -> bool:
        return rank == self.rank and self.pid in (None, pid)

    def plant(self, folder: Path) -> Path:
        """From now on it is due; the file is gone when it has struck."""
        name = secrets.token_hex(8)
        unseen = folder / f".{name}"
        unseen.write_bytes(msgspec.json.encode(self))
        return unseen.rename(folder / f"{name}.json")


class Faults:
    """Those that are planted for one rank; callable from any of its threads.

    cut: what keeps the rank and the head from hearing each other for so many seconds.
    Raises: ValueError: a file in the folder is no fault; from any point.
    """

    def __init__(self, rank: int, folder: Path) -> None:
        self.cut: Callable[[float], None] | None = None
        self._leaked: Taken = None
        self._rank = rank
        self._folder = folder
        self._known: dict[str, Fault] = {}
        self._passed: dict[str, int] = {}
        self._lock = threading.Lock()

    @classmethod
    def of_environment(cls, rank: int) -> Faults | None:
        """None, unless the variable names a folder."""
        folder = os.environ.get(VARIABLE)
        return cls(rank, Path(folder)) if folder else None

    def at(self, point: Point, tokens: Container[int] = ()) -> None:
        """The rank passes a point; it may not return. tokens: those that it computes then."""
        with self._lock:
            for name in self._planted():
                fault = self._known[name]
                if not fault.means(self._rank, os.getpid()) or fault.point != point:
                    continue
                if fault.token is not None and fault.token not in tokens:
                    continue
                passed = self._passed[name] = self._passed.get(name, 0) + 1
                if passed == fault.count and self._take(name):
                    self._strike(fault)

    def _take(self, name: str) -> bool:
        """Whether a fault is still there; from now on it is not."""
        try:
            (self._folder / name).unlink()
        except FileNotFoundError:
            return False
        return True

    def _strike(self, fault: Fault) -> None:
        match fault.action:
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            case "fail":
                raise RuntimeError(f"a fault was planted at {fault.point}")
            case "starve":
                self._leaked = starve()
            case "cut" if self.cut:
                self.cut(fault.seconds)

    def _planted(self) -> Iterable[str]:
        names = [name for name in os.listdir(self._folder) if name.endswith(".json")]
        for name in names:
            if name not in self._known:
                with contextlib.suppress(FileNotFoundError):  # it has just struck another rank
                    self._known[name] = _read(self._folder / name)
        return [name for name in names if name in self._known]

    def around(self, buffer: Buffer) -> Buffer:
        """The buffer, whose calls pass the points of a step."""
        return cast(Buffer, _FaultyBuffer(buffer, self))

    def around_reports(self, report: Callable[[msg.Report], None]) -> Callable[[msg.Report], None]:
        """The same, but some reports pass points before and after."""

        def passing(what: msg.Report) -> None:
            before, after = _REPORT_POINTS.get(type(what), (None, None))
            if before is not None:
                self.at(before)
            report(what)
            if after is not None:
                self.at(after)

        return passing


class _FaultyBuffer:
    """Everything but these calls is the buffer's own."""

    def __init__(self, buffer: Buffer, faults: Faults) -> None:
        self._buffer = buffer
        self._at = faults.at
        self._entered = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._buffer, name)

    def connect(self, *args: Any, **options: Any) -> None:
        self._at("connect")
        self._buffer.connect(*args, **options)

    def set_active(self, ids: Iterable[int], epoch: int) -> None:
        self._at("switch")
        self._buffer.set_active(ids, epoch)
        self._entered = True

    def post_vote(self, payload: bytes, *, wait: bool = True) -> None:
        self._at("first_vote" if self._entered else "vote")
        self._entered = False
        self._buffer.post_vote(payload, wait=wait)

    def collect_votes(self, timeout_s: float) -> dict[int, bytes]:
        self._at("vote_wait")
        return self._buffer.collect_votes(timeout_s)

    def dispatch(self, *args: Any, timeout_s: float | None = None, **options: Any) -> Any:
        self._at("dispatch_send" if self._buffer.epoch else "warm_up")
        pending = self._buffer.begin_dispatch(*args, **options)
        if self._buffer.epoch:
            self._at("dispatch_wait")
        return pending(timeout_s)

    def combine(self, *args: Any, timeout_s: float | None = None, **options: Any) -> Any:
        if self._buffer.epoch:
            self._at("combine_send")
        pending = self._buffer.begin_combine(*args, **options)
        if self._buffer.epoch:
            self._at("combine_wait")
        return pending(timeout_s)

    def native(
        self, tell: Callable[[ExchangePoint], None] | None = None
    ) -> AbstractContextManager[NativeExchange | None]:
        assert tell is None
        return self._buffer.native(self._passed)

    def _passed(self, point: ExchangePoint) -> None:
        if self._buffer.epoch:
            self._at(point)
        elif point == "dispatch_send":
            self._at("warm_up")

    def close(self) -> None:
        self._at("release")
        self._buffer.close()


def starve() -> Taken:
    """The address space may not grow any more, and what the allocators still hold is taken.

    A limit alone is hardly felt: whoever has served for a while gets all it needs from memory that
    was freed before. This takes no more of the machine than the process has mapped already.
    Returns what was taken: a chain of pairs, because a list would need ever larger pieces to grow
    and would leave every small hole once there is no large one.
    """
    taken: Taken = None
    with open("/proc/self/statm") as statm:
        mapped = int(statm.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (mapped, resource.getrlimit(resource.RLIMIT_AS)[1]))
    size = 1 << 20
    while size >= 64:
        try:
            taken = bytearray(size), taken
        except MemoryError:
            size //= 2
    return taken


def _read(path: Path) -> Fault:
    try:
        return msgspec.json.decode(path.read_bytes(), type=Fault)
    except msgspec.MsgspecError as error:
        raise ValueError(f"{path} is no fault: {error}") from error


POINTS: tuple[Point, ...] = get_args(Point)
