"""What two heads say to each other at a takeover, without ranks: refusals, links, answers."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from flexpert.cluster.handover import head_socket, running_head
from flexpert.cluster.handover import messages as hand
from flexpert.cluster.handover.follower import Follower, LinkLost
from flexpert.cluster.handover.messages import Conversation
from flexpert.cluster.handover.running_head import RunningHead
from flexpert.cluster.handover.succession import Succession
from flexpert.cluster.journal import TokenStream
from flexpert.cluster.state_directory import StateDirectory
from flexpert.cluster.views import Delta
from flexpert.config import Config
from flexpert.errors import ConfigError, FlexpertError, RequestError, ServiceStopped
from flexpert.forking.framing import PROTOCOL, frame

SETTINGS: dict[str, object] = {"engine.kv_block_size": 16}
WELCOME = hand.HeadWelcome("0.0.9", 1, 1, SETTINGS, "127.0.0.1", 8000)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Of a head that runs."""
    directory = StateDirectory(tmp_path / "state")
    yield directory.path
    directory.close()


@contextmanager
def old_head(folder: Path, *answers: hand.OfTakeover | bytes | None) -> Iterator[None]:
    """Says these one after the other, each when it is asked something; None: nothing more."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(folder / hand.HEAD_SOCKET))
    listener.listen()
    over = threading.Event()

    def speak() -> None:
        channel, _ = listener.accept()
        with channel:
            conversation = Conversation(channel, 5.0)
            for answer in answers:
                conversation.receive()
                if answer is None:
                    over.wait(5)
                    return
                if isinstance(answer, bytes):
                    channel.sendall(answer)
                else:
                    given = [os.open("/dev/null", os.O_RDONLY)] * isinstance(answer, hand.Handed)
                    conversation.send(answer, *given)

    thread = threading.Thread(target=speak)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        listener.close()


def test_there_must_be_a_head_that_runs_and_answers(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"no head runs .* --resume"):
        RunningHead(tmp_path / "other", SETTINGS, 1)
    with pytest.raises(ConfigError, match=r"starts, stops or hangs; .* --resume"):
        RunningHead(folder, SETTINGS, 1)
    monkeypatch.setattr(running_head, "_PATIENCE_S", 0.1)
    with old_head(folder, None), pytest.raises(ConfigError, match=r"it hangs; .* --resume"):
        RunningHead(folder, SETTINGS, 1)


@pytest.mark.parametrize(
    ("answer", "settings", "why"),
    [
        (WELCOME, {"engine.kv_block_size": 32}, "kv_block_size: the running ranks have 16, not 32"),
        (hand.Declined("it stops"), SETTINGS, "does not hand over: it stops"),
        (
            struct.pack("<HI", PROTOCOL + 1, 0),
            SETTINGS,
            f"version {PROTOCOL + 1} is spoken there, and version {PROTOCOL} here",
        ),
        (
            hand.HeadWelcome("0.0.9", 1, 7, SETTINGS, "", 1),
            SETTINGS,
            r"flexpert 0.0.9\) writes its state in format 7, and this flexpert reads 1",
        ),
    ],
)
def test_a_head_that_cannot_go_on_says_so_before_anything_changes(
    folder: Path, answer: hand.OfTakeover | bytes, settings: dict[str, object], why: str
) -> None:
    with old_head(folder, answer), pytest.raises(ConfigError, match=why):
        RunningHead(folder, settings, 1)


def test_what_goes_wrong_up_to_the_end_leaves_the_running_head(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    with old_head(folder, WELCOME, hand.Declined("a disk is full")):
        running = RunningHead(folder, SETTINGS, 1)
        with pytest.raises(FlexpertError, match="does not hand over: a disk is full"):
            running.take(said.append)
    (folder / hand.HEAD_SOCKET).unlink()
    monkeypatch.setattr(running_head, "_PATIENCE_S", 0.1)
    with old_head(folder, WELCOME, None):
        running = RunningHead(folder, SETTINGS, 1)
        with pytest.raises(FlexpertError, match=r"hangs; end it .* --resume"):
            running.take(said.append)


# ---- a link that follows ------------------------------------------------------------------------


class Goes:
    """The head that goes on, as `Succession` sees it."""

    changing = None

    def __init__(self, folder: Path) -> None:
        self.answers: dict[str, TokenStream] = {}
        self.cancelled: list[str] = []
        self.succession = Succession(Config(), self)
        self.socket = head_socket.HeadSocket(
            folder, self.succession.on_ask, self.succession.on_follow
        )

    def answer(self, name: str, *tokens: int) -> None:
        self.answers[name] = TokenStream(name, self.cancelled.append)
        for token in tokens:
            self.says(name, token)

    def says(self, name: str, *tokens: int, finish: str | None = None) -> None:
        self.answers[name].put(Delta(tokens=list(tokens), finish=finish))

    def adopt(self, sequence_id: str) -> TokenStream | None:
        return self.answers.get(sequence_id)

    async def end(self) -> None:
        """Like a process: nobody is told."""
        self.socket.close(remove=False)
        self.succession.handed.set()
        await self.socket.end()

    def refusal(self) -> str | None:
        return None

    def freeze(self) -> Any:
        raise NotImplementedError


async def next_of(stream: TokenStream) -> list[int]:
    async with asyncio.timeout(5):
        return (await anext(aiter(stream))).tokens


def test_tokens_go_on_after_the_last_one_also_when_the_head_that_goes_on_ends(
    tmp_path: Path,
) -> None:
    async def run() -> None:
        stopped: list[str] = []
        mine, other = (TokenStream(name, stopped.append) for name in ("a-1", "b-2"))
        follower = Follower(tmp_path, {mine: 2, other: 0}, 5.0)
        follower.start()
        head = Goes(tmp_path)
        head.answer("a-1", 10, 11)
        head.answer("b-2")
        head.says("a-1", 12)
        assert await next_of(mine) == [12]
        await head.end()
        second = Goes(tmp_path)  # it has the first tokens in another cut
        second.answer("a-1")
        second.answer("b-2", 20)
        second.says("a-1", 10, 11, 12, 13, 14)
        assert await next_of(mine) == [13, 14]
        assert await next_of(other) == [20]
        mine.cancel()
        assert stopped == ["a-1"]
        follower.cancel("a-1")
        second.answers["b-2"].put(RequestError("no"))
        with pytest.raises(RequestError, match="no"):
            await next_of(other)
        async with asyncio.timeout(5):
            while second.cancelled != ["a-1"]:
                await asyncio.sleep(0.01)
        assert len(follower) == 0
        await follower.close(ServiceStopped("stops"))
        await second.end()

    asyncio.run(run())


def test_requests_are_answered_by_the_other_heads_application(tmp_path: Path) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        body = b""
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                gone.set()
                return
            body += message["body"]
            if not message["more_body"]:
                break
        if scope["path"] == "/wait":
            await asyncio.Event().wait()
        headers = [(b"x-path", scope["path"].encode())]
        await send({"type": "http.response.start", "status": 201, "headers": headers})
        await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": b"!", "more_body": False})

    gone = asyncio.Event()

    async def run() -> None:
        follower = Follower(tmp_path, {}, 5.0)
        follower.start()
        told: list[dict[str, Any]] = []

        async def tell(message: dict[str, Any]) -> None:
            told.append(message)

        def asked(*messages: dict[str, Any], path: str = "/echo", body: Any = None) -> Any:
            left = list(messages)
            scope = {
                "type": "http",
                "method": "POST",
                "scheme": "http",
                "http_version": "1.1",
                "path": path,
                "raw_path": path.encode(),
                "query_string": b"",
                "headers": [(b"a", b"b")],
                "client": ("127.0.0.1", 1),
            }

            async def receive() -> dict[str, Any]:
                return left.pop(0) if left else await asyncio.Future()

            return follower.forward(scope, receive, tell, body)

        part = {"type": "http.request", "body": b"one", "more_body": True}
        last = {"type": "http.request", "body": b"two", "more_body": False}
        waits = asyncio.ensure_future(asked(part, last))  # nobody goes on yet
        await asyncio.sleep(0.05)
        head = Goes(tmp_path)
        head.succession.serve_app(app)
        async with asyncio.timeout(5):
            await waits
            assert (told[0]["status"], told[0]["headers"]) == (201, [(b"x-path", b"/echo")])
            assert b"".join(message["body"] for message in told[1:]) == b"onetwo!"
            told.clear()
            await asked(body=[b"read ", bytearray(b"before")])
            assert b"".join(message["body"] for message in told[1:]) == b"read before!"
            assert not head.succession.waits_for_links
            leaves = asyncio.ensure_future(asked(part, {"type": "http.disconnect"}))
            await gone.wait()
            await leaves
            lost = asyncio.ensure_future(asked(last, path="/wait"))
            await asyncio.sleep(0.05)
            await head.end()
            with pytest.raises(LinkLost):
                await lost
            late = asyncio.ensure_future(asked(last))  # nobody goes on again
            await asyncio.sleep(0.05)
            assert len(follower) == 1
            await follower.close(ServiceStopped("stops"))
            with pytest.raises(LinkLost, match="stops"):
                await late
            assert len(follower) == 0

    asyncio.run(run())


def test_at_another_takeover_answers_move_and_requests_stay(tmp_path: Path) -> None:
    release = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await release.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"first"})

    async def run() -> None:
        stream = TokenStream("a-1", lambda name: None)
        follower = Follower(tmp_path, {stream: 0}, 5.0)
        follower.start()
        first = Goes(tmp_path)
        first.succession.serve_app(app)
        first.answer("a-1", 1)
        assert await next_of(stream) == [1]
        told: list[dict[str, Any]] = []

        async def tell(message: dict[str, Any]) -> None:
            told.append(message)

        async def receive() -> Any:
            await asyncio.Future()

        scope = {
            "method": "GET",
            "scheme": "http",
            "http_version": "1.1",
            "path": "/",
            "query_string": b"",
            "headers": [],
        }
        asked = asyncio.ensure_future(follower.forward(scope, receive, tell, []))
        while not first.succession.waits_for_links:
            await asyncio.sleep(0.01)
        first.socket.close(remove=False)
        first.succession.handed.set()
        first.succession.move_links()
        second = Goes(tmp_path)
        second.answer("a-1", 1, 2)
        assert await next_of(stream) == [2]
        assert first.cancelled == [], "its stream is not its own any more"
        release.set()
        await asked
        assert told[1]["body"] == b"first"
        await follower.close(ServiceStopped("stops"))
        await first.end()
        await second.end()

    asyncio.run(run())


def test_who_speaks_another_protocol_is_refused_and_both_versions_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def run() -> bytes:
        head = Goes(tmp_path)
        reader, writer = await asyncio.open_unix_connection(str(tmp_path / hand.HEAD_SOCKET))
        asked = bytearray(frame(hand.encode(hand.our_ask())))
        asked[0] += 1
        writer.write(asked)
        answer = await reader.read()
        writer.close()
        await head.end()
        return answer

    answer = asyncio.run(run())
    declined = hand.decode_takeover(answer[6:])
    assert isinstance(declined, hand.Declined)
    assert f"version {PROTOCOL + 1} is spoken there, and version {PROTOCOL} here" in declined.why
    assert "another head was refused" in caplog.text
