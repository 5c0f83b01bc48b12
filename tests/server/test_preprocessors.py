"""The head's side of preprocessing: how a worker ends tells what its body is answered with."""

from __future__ import annotations

import asyncio
import gc
import signal
import weakref
from collections.abc import Sequence

import pytest
from support.raw import answers, connection, read_all, request
from support.served_head import Running

from flexpert.cluster.processes.helper import OnEnd, OnMessage
from flexpert.forking.framing import Piece
from flexpert.frontend.request_limits import RequestLimits
from flexpert.server.http_errors import ApiError
from flexpert.server.preprocessing import Kind, Outcome, PreprocessReply, Rendered, encode
from flexpert.server.preprocessors import Preprocessors


class Dying:
    """A helper that is ready, and ends with its first body."""

    def __init__(self, why: str, on_message: OnMessage, on_end: OnEnd) -> None:
        self._why = why
        self._on_end = on_end
        asyncio.get_running_loop().call_soon(on_message, b"")

    def send_pieces(self, pieces: Sequence[Piece]) -> None:
        asyncio.get_running_loop().call_soon(self._on_end, self._why)

    def kill(self) -> None:
        pass


class Busy:
    """A helper that takes bodies, and answers when it is told to."""

    def __init__(self, on_message: OnMessage) -> None:
        self._on_message = on_message
        self.bodies: list[bytes] = []
        asyncio.get_running_loop().call_soon(on_message, b"")

    def send_pieces(self, pieces: Sequence[Piece]) -> None:
        self.bodies.append(b"".join(pieces))

    def answer(self) -> None:
        self._on_message(encode(PreprocessReply(Rendered(b"{}"))))

    def kill(self) -> None:
        pass


class Owner:
    def __init__(self, why: str) -> None:
        self.impaired: dict[str, str] = {}
        self.started = 0
        self._why = why

    def start_helper(self, entry: str, spec: bytes, on_message: OnMessage, on_end: OnEnd) -> Dying:
        self.started += 1
        return Dying(self._why, on_message, on_end)


@pytest.mark.parametrize(
    ("number", "status", "code", "tries"),
    [
        (signal.SIGABRT, 413, "request_too_costly", 1),  # as Rust ends where memory is refused
        (signal.SIGKILL, 500, "preprocessing_failed", 2),  # anybody may have sent it: once more
    ],
)
def test_a_worker_that_gave_up_for_memory_is_the_bodys_fault(
    number: int, status: int, code: str, tries: int
) -> None:
    async def scenario() -> None:
        owner = Owner(f"signal {number:d}")
        limits = RequestLimits("m", 10, 10, 1, 10)
        workers = Preprocessors(owner, lambda: limits, 5.0)
        for body in (b"{}", b"{}"):
            with pytest.raises(ApiError) as refused:
                await workers.run("completions", [body])
            assert refused.value.status_code == status
            assert refused.value.code == code
        assert owner.started == 2 * tries, "the next body finds a new worker"

    asyncio.run(scenario())


def test_a_client_that_goes_while_it_waits_leaves_no_body_behind() -> None:
    class Body(bytearray):
        """One that can be asked after."""

    async def scenario() -> None:
        helpers: list[Busy] = []

        class BusyOwner(Owner):
            def start_helper(
                self, entry: str, spec: bytes, on_message: OnMessage, on_end: OnEnd
            ) -> Busy:
                helpers.append(Busy(on_message))
                return helpers[-1]

        workers = Preprocessors(BusyOwner(""), lambda: RequestLimits("m", 10, 10, 1, 10), 5.0)
        first = asyncio.create_task(workers.run("tokenize", [b"first"]))
        body = Body(b"gone")
        kept = weakref.ref(body)
        gone = asyncio.create_task(workers.run("tokenize", [body]))
        last = asyncio.create_task(workers.run("tokenize", [b"last"]))
        async with asyncio.timeout(5):
            while not (helpers and helpers[0].bodies):
                await asyncio.sleep(0)
        del body
        gone.cancel()
        await asyncio.wait([gone])
        del gone
        gc.collect()
        assert kept() is None
        # one whose turn has begun leaves the worker in order, whoever waits for it
        first.cancel()
        await asyncio.wait([first])
        helpers[0].answer()
        async with asyncio.timeout(5):
            while len(helpers[0].bodies) < 2:
                await asyncio.sleep(0)
        helpers[0].answer()
        assert await last == Rendered(b"{}")
        assert helpers[0].bodies == [b"tokenize\nfirst", b"tokenize\nlast"]

    asyncio.run(scenario())


def test_a_body_in_crumbs_is_not_kept_as_crumbs(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each would be an object of its own, and a call to send it on."""
    body = b'{"prompt": "a", "max_tokens": 2' + b" " * 3000 + b"}"
    crumbs = b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n"
    kept: list[int] = []
    run = server.app.state.preprocessors.run

    async def watched(kind: Kind, pieces: Sequence[Piece]) -> Outcome:
        kept.append(len(pieces))
        assert b"".join(pieces) == body
        return await run(kind, pieces)

    monkeypatch.setattr(server.app.state.preprocessors, "run", watched)
    head = request(
        "POST",
        "/v1/completions",
        transfer_encoding="chunked",
        content_type="application/json",
        connection="close",
    )
    with connection(server.url) as raw:
        raw.sendall(head)
        for at in range(0, len(crumbs), 600):
            raw.sendall(crumbs[at : at + 600])
        assert [answer.status for answer in answers(read_all(raw))] == [200]
    assert kept == [1]
