"""Workers that prepare bodies: their turns, what they answer too late, how they end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import pytest

from flexpert.cluster.handover.messages import ServiceHandedOver
from flexpert.errors import Overloaded
from flexpert.forking.framing import Piece
from flexpert.frontend.request_limits import RequestLimits
from flexpert.server import preprocessors
from flexpert.server.http_errors import ApiError
from flexpert.server.preprocessing import PreprocessReply, Rendered, encode
from flexpert.server.preprocessors import SMALL_BODY, Preprocessors


class Helper:
    """One that does nothing by itself; the test speaks for it."""

    def __init__(self, hear: Callable[[bytes], None], end: Callable[[str], None]) -> None:
        self.hear, self.end = hear, end
        self.asked: asyncio.Queue[bytes] = asyncio.Queue()
        self.killed = False

    def send_pieces(self, pieces: Sequence[Piece]) -> None:
        self.asked.put_nowait(b"".join(pieces[1:]))

    def kill(self) -> None:
        self.killed = True

    def answer(self, text: str) -> None:
        self.hear(encode(PreprocessReply(Rendered(text.encode()))))


class Owner:
    """Starts helpers that are ready at once. refused: whether the system has no process left."""

    def __init__(self) -> None:
        self.impaired: dict[str, str] = {}
        self.helpers: list[Helper] = []
        self.refused = False
        self.silent = False  # they are not ready until the test says so
        self.started = asyncio.Event()

    def start_helper(
        self,
        entry: str,
        spec: bytes,
        on_message: Callable[[bytes], None],
        on_end: Callable[[str], None],
    ) -> Helper:
        if self.refused:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        helper = Helper(on_message, on_end)
        self.helpers.append(helper)
        if not self.silent:
            asyncio.get_running_loop().call_soon(on_message, b"")
        self.started.set()
        return helper


def make(timeout_s: float = 5.0) -> tuple[Owner, Preprocessors]:
    owner = Owner()
    limits = RequestLimits("m", vocab=300, max_model_len=128, max_choices=8, max_prompt_tokens=128)
    return owner, Preprocessors(owner, lambda: limits, timeout_s)


def ask(workers: Preprocessors, body: bytes) -> asyncio.Task[object]:
    return asyncio.ensure_future(workers.run("detokenize", [body]))


def test_an_answer_that_comes_too_late_is_nobody_elses() -> None:
    async def scenario() -> None:
        owner, workers = make(timeout_s=0.05)
        first = ask(workers, b"first")
        second = ask(workers, b"second")
        await asyncio.wait((first,))
        assert isinstance(first.exception(), ApiError)
        # the dropped worker's answer was on its way already
        owner.helpers[0].answer("of the first")
        while len(owner.helpers) < 2:
            await asyncio.sleep(0)
        owner.helpers[0].answer("of the first")
        assert await owner.helpers[1].asked.get() == b"second"
        owner.helpers[0].answer("of the first")
        owner.helpers[1].answer("of the second")
        assert await second == Rendered(b"of the second")

    asyncio.run(scenario())


def test_who_goes_away_in_the_queue_leaves_nothing_in_it() -> None:
    async def scenario() -> None:
        owner, workers = make()
        turns = [ask(workers, b"%d" % number) for number in range(5)]
        await owner.started.wait()
        helper = owner.helpers[0]
        assert await helper.asked.get() == b"0"
        for turn in turns[:4]:  # one that has begun, and three that wait
            turn.cancel()
        await asyncio.wait(turns[:4])
        helper.answer("0")
        assert await helper.asked.get() == b"4"
        helper.answer("4")
        assert await turns[4] == Rendered(b"4")
        assert not helper.killed

    asyncio.run(scenario())


def test_large_bodies_that_never_end_leave_room_for_small_ones() -> None:
    async def scenario() -> None:
        _, workers = make()
        workers.claim(128 * 2**20, 0)
        workers.claim(SMALL_BODY, 0)
        with pytest.raises(Overloaded):
            workers.claim(1, SMALL_BODY)
        with pytest.raises(Overloaded):
            workers.claim(SMALL_BODY + 1, 0)

    asyncio.run(scenario())


def test_a_body_for_which_memory_does_not_last_is_refused() -> None:
    async def scenario() -> None:
        owner, workers = make()
        turn = ask(workers, b"x")
        await owner.started.wait()
        await owner.helpers[0].asked.get()
        owner.helpers[0].end("signal 6")
        with pytest.raises(ApiError) as refused:
            await turn
        assert (refused.value.status_code, refused.value.code) == (413, "request_too_costly")

    asyncio.run(scenario())


def test_a_body_whose_worker_is_killed_is_prepared_by_the_next_and_by_no_third() -> None:
    async def scenario() -> None:
        owner, workers = make()
        turns = [ask(workers, b"good"), ask(workers, b"bad")]
        await owner.started.wait()
        await owner.helpers[0].asked.get()
        owner.helpers[0].end("signal 9")
        while len(owner.helpers) < 2:
            await asyncio.sleep(0)
        assert await owner.helpers[1].asked.get() == b"good"
        owner.helpers[1].answer("good")
        assert await turns[0] == Rendered(b"good")
        for place in (1, 2):
            while len(owner.helpers) <= place:
                await asyncio.sleep(0)
            assert await owner.helpers[place].asked.get() == b"bad"
            owner.helpers[place].end("signal 9")
        with pytest.raises(ApiError) as failed:
            await turns[1]
        assert failed.value.status_code == 500

    asyncio.run(scenario())


def test_a_worker_that_cannot_be_started_is_tried_again_without_a_body(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """While the service says that it is not ready nobody sends it any."""
    monkeypatch.setattr(preprocessors, "_RETRY_S", 0.01)

    async def scenario() -> None:
        owner, workers = make()
        owner.refused = True
        await workers.start()
        assert len(owner.impaired) == 1
        owner.refused = False
        async with asyncio.timeout(5):
            while owner.impaired:
                await asyncio.sleep(0.01)
        workers.close()

    asyncio.run(scenario())


def test_while_a_worker_does_not_come_up_the_service_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(preprocessors, "_SLOW_START_S", 0.01)

    async def scenario() -> None:
        owner, workers = make()
        owner.silent = True
        turn = ask(workers, b"x")
        async with asyncio.timeout(5):
            while not owner.impaired:
                await asyncio.sleep(0.01)
            owner.helpers[0].hear(b"")  # it is up after all
            assert await owner.helpers[0].asked.get() == b"x"
        assert not owner.impaired
        owner.helpers[0].answer("x")
        assert await turn == Rendered(b"x")

    asyncio.run(scenario())


def test_bodies_that_are_not_prepared_when_another_head_goes_on_are_its_own() -> None:
    async def scenario() -> None:
        _, workers = make()
        asked = [ask(workers, b"runs"), ask(workers, b"waits")]
        await asyncio.sleep(0.02)
        workers.hand_over()
        asked.append(ask(workers, b"comes later"))
        ends = await asyncio.wait_for(asyncio.gather(*asked, return_exceptions=True), 2)
        assert [type(end) for end in ends] == [ServiceHandedOver] * 3

    asyncio.run(scenario())
