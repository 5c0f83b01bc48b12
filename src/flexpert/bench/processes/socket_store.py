"""The store that ranks of a measurement meet through: in the process that started them.

Not torch's TCPStore: that listens on all interfaces whatever host it is told, and whoever can
connect to it can write what ranks read. Here each rank is handed one end of a socket pair. So that
gloo can use it, too, the rank's side is a torch `Store`.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import msgspec
from torch.distributed import Store  # type: ignore[attr-defined]

from flexpert.bench.processes import connection as connections
from flexpert.bench.processes.connection import Closed, StreamConnection
from flexpert.forking.framing import BadFrame, Deframer, frame

_MOST_BYTES = 1 << 28  # of a message
_FIRST_NAP_S, _LONGEST_NAP_S = 0.0005, 0.01


class _Set(msgspec.Struct, frozen=True, array_like=True, tag="set"):
    key: str
    value: bytes


class _Get(msgspec.Struct, frozen=True, array_like=True, tag="get"):
    """Answered with one value for each key, None where there is none."""

    keys: list[str]


class _Swap(msgspec.Struct, frozen=True, array_like=True, tag="swap"):
    key: str
    expected: bytes
    desired: bytes


class _Add(msgspec.Struct, frozen=True, array_like=True, tag="add"):
    key: str
    amount: int


class _Delete(msgspec.Struct, frozen=True, array_like=True, tag="delete"):
    key: str


class _Count(msgspec.Struct, frozen=True, array_like=True, tag="count"):
    pass


_Request = _Set | _Get | _Swap | _Add | _Delete | _Count
_decode = msgspec.msgpack.Decoder(_Request).decode
_encode = msgspec.msgpack.encode


class Values:
    """What is kept (pure)."""

    def __init__(self) -> None:
        self._values: dict[str, bytes] = {}

    def answer(self, packet: bytes) -> bytes:
        """Raises: msgspec.MsgspecError, ValueError: no request."""
        values = self._values
        match _decode(packet):
            case _Set(key, value):
                values[key] = value
                return _encode(None)
            case _Get(keys):
                return _encode([values.get(key) for key in keys])
            case _Swap(key, expected, desired):
                # as torch's: a missing key is like an empty one, and is told as what was expected
                found = values.get(key, b"")
                if found != expected:
                    return _encode(found or expected)
                values[key] = desired
                return _encode(desired)
            case _Add(key, amount):
                total = int(values.get(key, b"0")) + amount
                values[key] = b"%d" % total
                return _encode(total)
            case _Delete(key):
                return _encode(values.pop(key, None) is not None)
            case _Count():
                return _encode(len(values))
        raise AssertionError("every request has a case")


class StoreServer:
    """A thread that answers those who were handed a socket by `hand_out`. A context manager."""

    def __init__(self) -> None:
        self._values = Values()
        self._selector = selectors.DefaultSelector()
        self._wake, self._woken = connections.pair()
        self._wake.setblocking(False)
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._new: list[socket.socket] = []
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="bench-store", daemon=True)
        self._thread.start()

    def hand_out(self) -> socket.socket:
        """For `SocketStore`, in this process or another."""
        ours, theirs = connections.pair()
        ours.setblocking(False)
        self._new.append(ours)
        self._rouse()
        return theirs

    def close(self) -> None:
        """Idempotent."""
        if self._thread.is_alive():
            self._closing = True
            self._rouse()
            self._thread.join()
            self._wake.close()

    def __enter__(self) -> StoreServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _rouse(self) -> None:
        # it has not yet come round to the last one, or has just ended
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            self._wake.send(b"!")

    def _run(self) -> None:
        while not self._closing:
            for key, events in self._selector.select():
                if key.fileobj is self._woken:
                    self._woken.recv(64)
                    while self._new:
                        client = _Client(self._new.pop(0), self._values)
                        self._selector.register(client.end, selectors.EVENT_READ, client)
                    continue
                client = key.data
                try:
                    client.go_on(events)
                except (
                    OSError,
                    Closed,
                    BadFrame,
                    ValueError,
                    msgspec.MsgspecError,
                ):  # gone or mad
                    self._selector.unregister(client.end)
                    client.end.close()
                else:
                    self._selector.modify(client.end, client.awaited, client)
        for key in list(self._selector.get_map().values()):
            assert isinstance(key.fileobj, socket.socket)
            key.fileobj.close()
        self._selector.close()


class _Client:
    """One socket, never waited for: its process may be stopped in the middle of anything."""

    def __init__(self, end: socket.socket, values: Values) -> None:
        self.end = end
        self._values = values
        self._deframer, self._due = Deframer(_MOST_BYTES), bytearray()

    @property
    def awaited(self) -> int:
        return selectors.EVENT_READ | (selectors.EVENT_WRITE if self._due else 0)

    def go_on(self, events: int) -> None:
        """Raises: OSError, Closed, BadFrame, ValueError, msgspec.MsgspecError"""
        if events & selectors.EVENT_READ:
            piece = self.end.recv(1 << 16)
            if not piece:
                raise Closed("the rank is gone")
            for packet in self._deframer.feed(piece):
                self._due += frame(self._values.answer(packet))
        if self._due:
            with contextlib.suppress(BlockingIOError):
                del self._due[: self.end.send(self._due)]


class SocketStore(Store):
    """A rank's side: the calls of a torch `Store`, and so gloo's store, too. For any thread.

    Raises, from every call: RuntimeError, as torch's: the process that keeps the store is gone.
    """

    def __init__(self, end: socket.socket, timeout_s: float = 300.0) -> None:
        """end: of `StoreServer.hand_out`; timeout_s: of `get` and `wait`."""
        super().__init__()
        self._connection = StreamConnection(end)
        self._timeout_s = timeout_s
        self._lock = threading.Lock()

    def _ask(self, request: _Request) -> Any:
        with self._lock:
            try:
                self._connection.send(_encode(request))
                return msgspec.msgpack.decode(self._connection.receive())
            except Closed as error:
                raise RuntimeError(f"the store cannot be asked: {error}") from None

    def set(self, key: str, value: str | bytes) -> None:
        self._ask(_Set(key, _bytes(value)))

    def get(self, key: str) -> bytes:
        """Waits for it. Raises: TimeoutError"""
        return self.multi_get([key])[0]

    def multi_get(self, keys: Sequence[str]) -> list[bytes]:
        """Waits for all of them. Raises: TimeoutError"""
        self.wait(keys)
        found: list[bytes] = self._ask(_Get(list(keys)))
        return found

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        """Until all of them are there. Raises: TimeoutError"""
        limit_s = self._timeout_s if timeout is None else timeout.total_seconds()
        deadline, nap_s = time.monotonic() + limit_s, _FIRST_NAP_S
        while not self.check(keys):
            if time.monotonic() >= deadline:
                raise TimeoutError(f"no {', '.join(keys)} within {limit_s:g} s")
            time.sleep(nap_s)
            nap_s = min(1.5 * nap_s, _LONGEST_NAP_S)

    def check(self, keys: Sequence[str]) -> bool:
        """Whether all of them are there."""
        return None not in self._ask(_Get(list(keys)))

    def compare_set(self, key: str, expected: str | bytes, desired: str | bytes) -> bytes:
        """What the key holds afterwards; `expected` if it is missing and that is not empty."""
        found: bytes = self._ask(_Swap(key, _bytes(expected), _bytes(desired)))
        return found

    def add(self, key: str, amount: int) -> int:
        total: int = self._ask(_Add(key, amount))
        return total

    def delete_key(self, key: str) -> bool:
        """Whether there was one."""
        found: bool = self._ask(_Delete(key))
        return found

    deleteKey = delete_key  # noqa: N815 - as torch's C++ calls it

    def num_keys(self) -> int:
        count: int = self._ask(_Count())
        return count

    getNumKeys = num_keys  # noqa: N815 - as torch's C++ calls it

    def has_extended_api(self) -> bool:
        return False


def _bytes(value: str | bytes) -> bytes:
    return value.encode() if isinstance(value, str) else bytes(value)
