"""Events of an answer leave as they come, in order, whether the client reads or not."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from support.fake_head import FakeHead

from flexpert.cluster.journal import TokenStream
from flexpert.cluster.views import Delta
from flexpert.engine.request import SamplingParams
from flexpert.errors import FlexpertError
from flexpert.frontend.generation import Generation
from flexpert.frontend.text import TokenText
from flexpert.server.openai import ChoiceEvents
from flexpert.server.protocol import BODY_WRITER
from flexpert.server.shapes import TextShape
from flexpert.server.stream import DONE, AnswerStream


class Client:
    """Notes what is written to it and what is sent; ready: whether it reads."""

    def __init__(self) -> None:
        self.ready = True
        self.written: list[bytes] = []
        self.events: list[bytes] = []
        self.sent = 0
        self._reads = asyncio.Event()
        self._reads.set()

    def write(self, piece: bytes) -> None:
        assert self.ready
        self.written.append(piece)
        self.events += piece.split(b"\n\n")[:-1]

    def read(self, *, on: bool) -> None:
        self.ready = on
        if on:
            self._reads.set()
        else:
            self._reads.clear()

    async def send(self, message: Any) -> None:
        await self._reads.wait()
        if body := message.get("body"):
            self.sent += 1
            self.events += body.split(b"\n\n")[:-1]


class Scripted(FakeHead):
    """Its streams get what a test puts into them."""

    def submit(self, prompt, params, *, request_id=None, trace=None) -> Any:
        self.stream = TokenStream(request_id, self.cancelled.append)
        return self.stream


class Answering:
    """An answer that goes to a client."""

    def __init__(self) -> None:
        self.head = Scripted()
        self.client = Client()
        self.text = TokenText(self.head.tokenizer)
        self._word = self.head.tokenizer.encode("a")[0]

    async def begin(self) -> None:
        generation = Generation(
            self.head, self.text, [[1]], SamplingParams(max_tokens=50), request_id="x"
        )
        await generation.submit()
        events = ChoiceEvents(generation, TextShape("x", 0, "m", self.text))
        answer = AnswerStream(generation, events)
        self.task = asyncio.ensure_future(
            answer({BODY_WRITER: self.client}, asyncio.Future, self.client.send)
        )
        await asyncio.sleep(0.01)

    async def says(self, place: int, finish: str | None = None) -> None:
        self.head.stream.put(Delta(tokens=[self._word + place], finish=finish))
        await asyncio.sleep(0)
        await asyncio.sleep(0)

    def letters(self) -> str:
        marked = [event.partition(b'"text":"')[2][:1] for event in self.client.events]
        return b"".join(marked).decode()


def test_each_token_is_written_as_an_event_of_its_own_without_a_task() -> None:
    async def run() -> None:
        answering = Answering()
        await answering.begin()
        for place in range(3):
            await answering.says(place)
            assert len(answering.client.written) == place + 1
        await answering.says(3, "length")
        await answering.task
        assert answering.letters() == "abcd"
        assert answering.client.written[-1].endswith(DONE)
        assert answering.client.sent == 0
        assert answering.head.cancelled == []

    asyncio.run(run())


def test_what_comes_while_the_client_does_not_read_is_sent_in_order_when_it_does() -> None:
    async def run() -> None:
        answering = Answering()
        await answering.begin()
        await answering.says(0)
        answering.client.read(on=False)
        for place in range(1, 4):
            await answering.says(place)
        assert answering.letters() == "a"
        answering.client.read(on=True)
        await asyncio.sleep(0.01)
        await answering.says(4)
        assert answering.client.written[1:] == [answering.client.written[-1]]  # written again
        await answering.says(5, "length")
        await answering.task
        assert answering.letters() == "abcdef"

    asyncio.run(run())


@pytest.mark.parametrize("reads", [True, False])
def test_an_error_comes_behind_all_tokens_before_it(reads: bool) -> None:
    async def run() -> None:
        answering = Answering()
        await answering.begin()
        answering.client.read(on=reads)
        await answering.says(0)
        await answering.says(1)
        answering.head.stream.put(FlexpertError("rank 3 is gone"))
        answering.client.read(on=True)
        await answering.task
        assert answering.letters() == "ab"
        assert b"rank 3 is gone" in answering.client.events[2]
        assert answering.client.events[3:] == [DONE[:-2]]

    asyncio.run(run())


def test_a_client_that_goes_away_frees_the_sequence_and_is_written_nothing_more() -> None:
    async def run() -> None:
        answering = Answering()
        await answering.begin()
        await answering.says(0)
        answering.task.cancel()
        await asyncio.wait([answering.task])
        assert answering.head.cancelled == ["x-0"]
        await answering.says(1)
        assert answering.letters() == "a"

    asyncio.run(run())
