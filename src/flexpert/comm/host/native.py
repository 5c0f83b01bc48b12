"""Exchanges that C walks on its own (native.c), as far as all is as usual; Python does the rest."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from flexpert.comm.buffer import NativeExchange, Point
from flexpert.comm.host._kernels import ffi, lib
from flexpert.comm.host.changes import Changes
from flexpert.comm.host.codes import COMBINE, DISPATCH, POINTS
from flexpert.comm.host.core import Core, State
from flexpert.comm.host.members import Members
from flexpert.comm.host.waits import Waiter


@ffi.def_extern(name="fx_ask", error=-1)  # type: ignore[untyped-decorator]
def _ask(python: Any, what: int, begun_ns: int) -> int:
    exchanges: NativeExchanges = ffi.from_handle(python)
    return exchanges.ask(what, begun_ns)


class NativeExchanges(AbstractContextManager[NativeExchange | None]):
    """What `HostBuffer.native` gives, the same each time. Holds `Core.exchanging` while entered."""

    def __init__(self, core: Core, changes: Changes, members: Members, waiter: Waiter) -> None:
        self._core = core
        self._changes = changes
        self._members = members
        self._waiter = waiter
        self._tell: Callable[[Point], None] | None = None
        self._raised: BaseException | None = None
        self._counted = 0
        self._entered = False
        self._handle = core.b.python = ffi.new_handle(self)
        function = int(ffi.cast("intptr_t", ffi.addressof(lib, "fx_exchange")))
        self._given = NativeExchange(function, int(ffi.cast("intptr_t", core.b)))

    def within(self, tell: Callable[[Point], None] | None) -> NativeExchanges:
        self._tell = tell
        return self

    def __enter__(self) -> NativeExchange | None:
        core = self._core
        core.exchanging.acquire()
        try:
            self._changes.begin("exchanges in C before combine of the last")
            self._entered = not (core.lenient or core.must_vote or self._members.far)
        except BaseException:
            core.exchanging.release()
            raise
        if not self._entered:
            return None
        b = core.b
        self._raised = None
        self._counted = b.native_exchanges
        b.native_phase = -1
        b.native_tells = self._tell is not None
        b.native_slice_ns = self._waiter.first_slice_ns()
        core.received = None
        core.state = State.BROKEN  # until all that is begun is whole
        return self._given

    def __exit__(self, *_: object) -> None:
        core, b = self._core, self._core.b
        try:
            if not self._entered:
                return
            core.sequence += b.native_exchanges - self._counted
            if self._raised is not None:
                raise self._raised
            if b.native_phase == DISPATCH:
                raise core.bad_rows(b.native_why, b.native_bad)
            if b.native_phase == COMBINE:
                raise core.bad_results(b.native_why, b.native_bad)
            core.state = State.BETWEEN
        finally:
            self._entered = False
            core.exchanging.release()

    def ask(self, what: int, begun_ns: int) -> int:
        """What C does not do itself, in the middle of an exchange; nonzero: it ends here."""
        try:
            if what in POINTS:
                if self._tell is not None:
                    self._tell(POINTS[what])
            else:
                self._waiter.wait(what, None, begun_ns)
        except BaseException as error:  # noqa: BLE001 - C is between; it is raised when C has returned
            self._raised = error
            return -1
        return 0
