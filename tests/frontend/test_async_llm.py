"""Promises of the library on an event loop: `AsyncLLM` over a fake head."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

import pytest
from support.fake_head import FakeHead

from flexpert import AsyncLLM, Completion, SamplingParams
from flexpert.errors import (
    ConfigError,
    FlexpertError,
    OperationError,
    OperationRefused,
    RequestError,
    ServiceStopped,
)

Work = Callable[[AsyncLLM], Awaitable[None]]


@pytest.fixture(autouse=True)
def _fake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flexpert.cluster.head.Head", FakeHead)


def run(work: Work) -> None:
    """On a loop of its own, with a started LLM; nothing of it runs on."""

    async def whole() -> None:
        async with AsyncLLM(ranks=2) as llm:
            await work(llm)
            await until_idle(llm)
            assert not llm._running
        assert fake(llm).stops == 1
        await asyncio.sleep(0.01)  # what was cancelled gets its turn
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(whole())


def fake(llm: AsyncLLM) -> FakeHead:
    head = llm._head
    assert isinstance(head, FakeHead)
    return head


async def until_idle(llm: AsyncLLM) -> None:
    async with asyncio.timeout(5):
        while fake(llm).running:
            await asyncio.sleep(0.01)


async def every(completions: AsyncIterator[Completion]) -> list[Completion]:
    return [completion async for completion in completions]


def test_a_completion_grows_to_the_whole_answer() -> None:
    async def work(llm: AsyncLLM) -> None:
        params = SamplingParams(max_tokens=4, seed=1, logprobs=0, n=2)
        found = await every(llm.generate("one", params, "mine"))
        assert [completion.finished for completion in found].count(True) == 1
        last = found[-1]
        assert (last.prompt, last.request_id, last.finished) == ("one", "mine", True)
        assert last.prompt_token_ids == fake(llm).tokenizer.encode("one")
        for index, output in enumerate(last.outputs):
            assert (output.index, output.finish_reason) == (index, "length")
            assert len(output.text) == len(output.token_ids) == len(output.logprobs or []) == 4
            assert output.cumulative_logprob == 4 * -0.5
            lengths = [len(completion.outputs[index].token_ids) for completion in found]
            assert lengths == sorted(lengths)
            assert all(output.text.startswith(one.outputs[index].text) for one in found)
        again = await every(llm.generate([1, 2], sampling_params=params))
        assert (again[-1].prompt, again[-1].request_id) == (None, "llm-1")

    run(work)


def test_requests_run_at_the_same_time() -> None:
    async def work(llm: AsyncLLM) -> None:
        fake(llm).behaviour.gap_s = 0.02
        asked = [every(llm.generate("a", SamplingParams(max_tokens=10))) for _ in range(10)]
        async with asyncio.timeout(1.9):  # one after the other they would take 2 s
            found = await asyncio.gather(*asked)
        assert all(completions[-1].finished for completions in found)

    run(work)


@pytest.mark.parametrize("how", ["cancel", "aclose"])
def test_leaving_frees_the_request(how: str) -> None:
    async def work(llm: AsyncLLM) -> None:
        fake(llm).behaviour.gap_s = 0.01
        begun = asyncio.Event()

        async def read() -> None:
            completions = llm.generate("a", SamplingParams(max_tokens=100, n=3))
            async with aclosing(completions) as arriving:
                async for _ in arriving:
                    begun.set()
                    if how == "aclose":
                        break

        task = asyncio.create_task(read())
        await begun.wait()
        if how == "cancel":
            task.cancel()
        await asyncio.wait([task])
        assert len(fake(llm).cancelled) == 3

    run(work)


@pytest.mark.parametrize("samples", [1, 3])
def test_an_aborted_request_ends_and_says_so(samples: int) -> None:
    async def work(llm: AsyncLLM) -> None:
        fake(llm).behaviour.gap_s = 0.01
        last = None
        async for completion in llm.generate("a", SamplingParams(max_tokens=100, n=samples), "x"):
            if len(completion.token_ids) == 2:
                await llm.abort("x")
                await llm.abort("unknown")
            last = completion
        assert last is not None
        assert last.finished
        assert {output.finish_reason for output in last.outputs} == {"abort"}
        await every(llm.generate("a", None, "x"))  # the name is free again

    run(work)


def test_two_requests_of_one_name_are_refused() -> None:
    async def work(llm: AsyncLLM) -> None:
        fake(llm).behaviour.gap_s = 0.01
        async with aclosing(llm.generate("a", request_id="x")) as first:
            assert not (await anext(first)).finished
            with pytest.raises(RequestError, match="'x' is running"):
                await every(llm.generate("a", request_id="x"))
            assert [one async for one in first][-1].finished

    run(work)


def test_what_is_wrong_is_refused_and_what_fails_is_raised() -> None:
    async def work(llm: AsyncLLM) -> None:
        prompts: list[Any] = [b"a", None, {"prompt": "a"}, "x" * 300, []]
        for prompt in prompts:
            with pytest.raises(RequestError):
                await every(llm.generate(prompt))
        both = SamplingParams()
        with pytest.raises(RequestError, match="give one of them"):
            await every(llm.generate("a", both, sampling_params=both))
        wrong: Any = {"max_tokens": 1}
        with pytest.raises(RequestError, match="SamplingParams"):
            await every(llm.generate("a", wrong))
        fake(llm).behaviour.fail_after = 1
        with pytest.raises(FlexpertError, match="rank 3 is gone"):
            await every(llm.generate("a"))

    run(work)


def test_chat_renders_as_llm_does() -> None:
    async def work(llm: AsyncLLM) -> None:
        talk = [{"role": "user", "content": "hi"}]
        found = await every(llm.chat(talk, SamplingParams(max_tokens=1)))
        rendered = fake(llm).tokenizer.decode(found[-1].prompt_token_ids)
        assert rendered == "<|user|>hi<|end|><|assistant|>"
        with pytest.raises(RequestError, match="does not use"):
            await every(llm.chat(talk, chat_template_kwargs={"mood": "calm"}))

    run(work)


def test_scaling_waits_and_says_what_went_wrong() -> None:
    async def work(llm: AsyncLLM) -> None:
        assert (await llm.scale(4)).state == "done"
        assert [rank.id for rank in llm.cluster().ranks] == [0, 1, 2, 3]
        with pytest.raises(OperationRefused):
            await llm.scale(9)
        fake(llm).behaviour.operation_fails = True
        with pytest.raises(OperationError, match="out of memory"):
            await llm.scale(add=1)
        assert (await llm.scale(remove=[1], wait=False)).state == "preparing"
        for task in fake(llm)._tasks:
            await task

    run(work)


def test_before_the_start_and_after_the_end_it_says_so() -> None:
    async def work() -> None:
        llm = AsyncLLM()
        with pytest.raises(FlexpertError, match="not started: use 'async with"):
            await every(llm.generate("a"))
        async with llm:
            pass
        await llm.close()
        assert fake(llm).stops == 1
        with pytest.raises(ServiceStopped):
            await every(llm.generate("a"))
        with pytest.raises(FlexpertError, match="started already"):
            await llm.start()

    asyncio.run(work())


def test_another_loop_is_refused() -> None:
    async def work(llm: AsyncLLM) -> None:
        with pytest.raises(FlexpertError, match="belongs to the event loop"):
            await asyncio.to_thread(asyncio.run, every(llm.generate("a")))

    run(work)


def test_requests_that_run_at_the_end_are_told() -> None:
    async def work() -> None:
        async with AsyncLLM() as llm:
            fake(llm).behaviour.gap_s = 0.01
            reading = asyncio.create_task(every(llm.generate("a", SamplingParams(max_tokens=100))))
            await asyncio.sleep(0.05)
        with pytest.raises(ServiceStopped):
            await reading

    asyncio.run(work())


def test_a_start_that_fails_or_is_cancelled_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    stopped: list[FakeHead] = []

    class Slow(FakeHead):
        async def start(self, report: object = None) -> None:
            if self.config.cluster.ranks == 1:
                raise FlexpertError("no memory")
            await asyncio.sleep(60)

        async def stop(self, drain_s: float = 0.0) -> None:
            stopped.append(self)

    monkeypatch.setattr("flexpert.cluster.head.Head", Slow)

    async def work() -> None:
        with pytest.raises(FlexpertError, match="no memory"):
            await AsyncLLM(ranks=1).start()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2), AsyncLLM(ranks=2):
                pass

    asyncio.run(work())
    assert len(stopped) == 2
    with pytest.raises(ConfigError, match=r"engine\.speed"):
        AsyncLLM(engine__speed=9)
