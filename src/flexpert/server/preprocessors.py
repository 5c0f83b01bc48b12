"""The head's side of preprocessing: who gets a turn, for how long, and what waits.

Two workers, each with a queue: one for small bodies and one for large ones, so that nobody who
sends a little waits behind somebody who sends much.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from collections.abc import Callable, Sequence
from typing import Protocol

from flexpert import heap
from flexpert.cluster.handover.messages import ServiceHandedOver
from flexpert.cluster.processes.helper import Helper, OnEnd, OnMessage
from flexpert.errors import Overloaded
from flexpert.forking.framing import Piece
from flexpert.frontend.request_limits import RequestLimits
from flexpert.server.http_errors import SERVER, ApiError
from flexpert.server.preprocess_worker import ENTRY
from flexpert.server.preprocessing import (
    Kind,
    Outcome,
    PreprocessReply,
    PreprocessTask,
    RefusedBody,
    Spec,
    decode_reply,
    encode,
)

log = logging.getLogger("flexpert.server")

SMALL_BODY = 32 * 2**10  # bytes
_MOST_WAITING = 128 * 2**20  # bytes of bodies, also of those that are still coming
# How a worker ends when parser or tokenizer, which are Rust, get no memory: see
# `preprocess_worker.MOST_MEMORY`.
_OUT_OF_MEMORY = f"signal {signal.SIGABRT:d}"
_RETRY_S = 2.0
# Both give way to ranks and head; large bodies to small ones, too, or on a busy machine a few of
# them would have as much of it as all who are answered.
_NICENESS = {"small": 5, "large": 10}
_TRIM_AFTER_S = 1.0  # without large bodies
_START_TIMEOUT_S = 120.0  # a large vocabulary takes seconds
_SLOW_START_S = 10.0  # from then on the service is not ready meanwhile


class Owner(Protocol):
    """A head. impaired: why parts of it do not work now."""

    impaired: dict[str, str]

    def start_helper(
        self, entry: str, spec: bytes, on_message: OnMessage, on_end: OnEnd
    ) -> Helper: ...


class Preprocessors:
    """Both workers. Each starts with the first body that it gets, that for small ones already with
    `start`: in most services nobody ever sends a large one.

    timeout_s: how long one body may take, from its turn on.
    """

    def __init__(self, owner: Owner, limits: Callable[[], RequestLimits], timeout_s: float) -> None:
        self._workers = [_Worker(owner, limits, timeout_s, name) for name in _NICENESS]
        self._waiting = 0  # bytes
        self._trimming: asyncio.TimerHandle | None = None

    async def start(self) -> None:
        """Small bodies have a worker, or the reason is logged; it is tried again when needed."""
        heap.map_large_apart()
        await self._workers[0].warm_up()

    def restart(self) -> None:
        """The next bodies find new workers, which know the limits of then."""
        for worker in self._workers:
            worker.drop()

    def close(self) -> None:
        for worker in self._workers:
            worker.close()

    def hand_over(self) -> None:
        """Another head goes on: bodies that are not prepared yet are its own."""
        for worker in self._workers:
            worker.hand_over()

    def claim(self, size: int, before: int) -> None:
        """Room for another piece of a body that is coming, and of which `before` bytes have come.

        Small bodies always have it, or a few clients with large ones that they never finish would
        keep everybody out; how many there are at once is bounded by `max_requests_per_key`.

        Raises: Overloaded
        """
        if before + size > SMALL_BODY and self._waiting + size > _MOST_WAITING:
            raise Overloaded(
                f"request bodies of {self._waiting >> 20} MiB are waiting already; try again later"
            )
        self._waiting += size

    def release(self, size: int) -> None:
        self._waiting -= size
        if size > SMALL_BODY:
            if self._trimming:
                self._trimming.cancel()
            self._trimming = asyncio.get_running_loop().call_later(_TRIM_AFTER_S, heap.trim)

    async def run(self, kind: Kind, pieces: Sequence[Piece]) -> Outcome:
        """What a body asks for. It is claimed by the caller.

        Raises:
            ApiError: it is refused, or could not be prepared.
            ServiceHandedOver
        """
        worker = self._workers[sum(map(len, pieces)) > SMALL_BODY]
        outcome = await worker.run(PreprocessTask(kind, pieces))
        if isinstance(outcome, RefusedBody):
            raise outcome.error
        return outcome


class _Ended(Exception):  # noqa: N818
    """The worker is gone before it has answered."""


class _Worker:
    def __init__(
        self, owner: Owner, limits: Callable[[], RequestLimits], timeout_s: float, name: str
    ) -> None:
        self._owner = owner
        self._limits = limits
        self._timeout_s = timeout_s
        self._name = name
        self._turn = asyncio.Lock()  # first come, first served
        self._helper: Helper | None = None
        self._answer: asyncio.Future[bytes] | None = None
        self._closed = self._handed = False
        self._retry: asyncio.Task[None] | None = None

    async def warm_up(self) -> None:
        """It is up, or the reason is logged and it is tried again."""
        async with self._turn:
            if self._helper is None and not self._closed:
                try:
                    await self._start()
                except _Ended as error:
                    if not self._closed:
                        log.warning("the worker for %s bodies did not start: %s", self._name, error)

    def close(self) -> None:
        self._closed = True
        if self._retry:
            self._retry.cancel()
        if self._helper:
            self._helper.kill()

    def hand_over(self) -> None:
        self._handed = True
        self.close()
        self._helper = None  # its end will be told to nobody here
        if self._answer and not self._answer.done():
            self._answer.set_exception(_Ended("another head goes on"))

    def _start_later(self) -> None:
        """No body may come that would start it: who sees that we are not ready sends none."""

        async def again() -> None:
            await asyncio.sleep(_RETRY_S)
            self._retry = None
            await self.warm_up()

        if self._retry is None and not self._closed:
            self._retry = asyncio.create_task(again())

    async def run(self, task: PreprocessTask) -> Outcome:
        # who goes away while it waits gives its place up: else bodies that nobody waits for pile up
        await self._turn.acquire()
        # a turn that has begun goes on to its end: only a whole one leaves the worker in order
        turn = asyncio.ensure_future(self._take_turn(task))
        turn.add_done_callback(self._turn_over)
        return await asyncio.shield(turn)

    def _turn_over(self, turn: asyncio.Future[Outcome]) -> None:
        self._turn.release()
        if not turn.cancelled():
            turn.exception()  # whoever waited may be gone

    async def _take_turn(self, task: PreprocessTask) -> Outcome:
        try:
            reply = await self._reply(task)
        except TimeoutError:
            self.drop()
            raise ApiError(
                400,
                f"the request takes longer than {self._timeout_s:g} s to prepare "
                "(--preprocess-timeout); send less of it at once",
                code="request_too_costly",
            ) from None
        except _Ended as error:
            if self._handed:
                raise ServiceHandedOver from None
            log.error("a request could not be prepared: its worker ended (%s)", error)
            if str(error) == _OUT_OF_MEMORY:
                raise ApiError(
                    413,
                    "the request takes more memory to prepare than one may have; send less of "
                    "it at once",
                    code="request_too_costly",
                ) from None
            raise ApiError(
                503 if self._closed else 500,
                f"the request could not be prepared: {error}",
                type=SERVER,
                code="preprocessing_failed",
            ) from None
        if reply.worn:
            self.drop()
            with contextlib.suppress(_Ended):  # the next body tells
                await self._start()
        return reply.outcome

    async def _reply(self, task: PreprocessTask) -> PreprocessReply:
        """Raises: TimeoutError, _Ended"""
        try:
            if self._helper is None:
                await self._start()
            return decode_reply(await self._ask(task.message, self._timeout_s))
        except _Ended as error:
            if self._closed or str(error) == _OUT_OF_MEMORY:
                raise
            # somebody may have ended it, and the request has no part in that
            log.warning(
                "the worker for %s bodies ended (%s); another one starts", self._name, error
            )
        await self._start()
        return decode_reply(await self._ask(task.message, self._timeout_s))

    async def _start(self) -> None:
        """Raises: _Ended"""
        if self._closed:
            raise _Ended("the service is stopping")
        part = f"preprocessing of {self._name} bodies"
        spec = encode(Spec(self._limits(), _NICENESS[self._name]))
        try:
            helper = self._owner.start_helper(
                ENTRY,
                spec,
                lambda message: self._received(helper, message),
                lambda why: self._ended(helper, why),
            )
        except OSError as error:
            self._owner.impaired[part] = f"no process can be started: {error.strerror}"
            self._start_later()
            raise _Ended(self._owner.impaired[part]) from None
        self._helper = helper
        slow = asyncio.get_running_loop().call_later(
            _SLOW_START_S, self._owner.impaired.setdefault, part, "its worker does not come up"
        )
        try:
            await self._ask(None, _START_TIMEOUT_S)
        except TimeoutError:
            self.drop()
            self._owner.impaired[part] = f"it was not ready within {_START_TIMEOUT_S:g} s"
            self._start_later()
            raise _Ended(self._owner.impaired[part]) from None
        except _Ended as error:
            self._owner.impaired[part] = str(error)
            self._start_later()
            raise
        finally:
            slow.cancel()
        self._owner.impaired.pop(part, None)

    async def _ask(self, message: Sequence[Piece] | None, limit_s: float) -> bytes:
        """The worker's next message. Raises: TimeoutError, _Ended"""
        if self._helper is None:
            raise _Ended("it is gone")
        self._answer = asyncio.get_running_loop().create_future()
        try:
            if message is not None:
                self._helper.send_pieces(message)
            async with asyncio.timeout(limit_s):
                return await self._answer
        finally:
            self._answer = None

    def drop(self) -> None:
        helper, self._helper = self._helper, None
        if helper:
            helper.kill()

    def _received(self, helper: Helper, message: bytes) -> None:
        # one that was dropped may have answered at the last moment: it would be taken for the
        # answer to what its successor is asked
        if helper is self._helper and self._answer and not self._answer.done():
            self._answer.set_result(message)

    def _ended(self, helper: Helper, why: str) -> None:
        if helper is not self._helper:
            return  # it was dropped, or made room for another
        self._helper = None
        if self._answer and not self._answer.done():
            self._answer.set_exception(_Ended(why))
