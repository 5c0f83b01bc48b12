"""A real service for tests: the head on a loop of its own thread, real ranks, and a load."""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from flexpert.cluster.head import Head
from flexpert.cluster.views import OperationView
from flexpert.config import Config, load_config
from flexpert.engine.request import SamplingParams
from support.warm import WarmForkServer

T = TypeVar("T")


@dataclass
class Service:
    """A running head; `run` awaits something on its loop."""

    head: Head
    loop: asyncio.AbstractEventLoop

    def run(self, work: Coroutine[Any, Any, T], timeout_s: float = 100) -> T:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(timeout_s)

    def change(self, **target: Any) -> OperationView:
        return self.run(change(self.head, **target))


@contextmanager
def running(**settings: Any) -> Iterator[Service]:
    """A service with these dotted settings (underscore for the dot's double underscore)."""
    config: Config = load_config(
        environment={}, overrides={k.replace("__", "."): v for k, v in settings.items()}
    )
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    service = Service(Head(config, fork_server=WarmForkServer()), loop)  # type: ignore[arg-type]
    try:
        service.run(service.head.start())
        yield service
    finally:
        service.run(service.head.stop())
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


async def change(head: Head, **target: Any) -> OperationView:
    """One change, start to end."""
    operation = head.begin_operation(**target)
    return await head.wait_operation(operation.id)


@dataclass
class Answer:
    tokens: list[int] = field(default_factory=list)
    finish: str | None = None
    degraded: bool = False


async def answer(head: Head, prompt: list[int], params: SamplingParams) -> Answer:
    """One sequence in full."""
    result = Answer()
    async with head.submit(prompt, params) as stream:
        async for delta in stream:
            result.tokens += delta.tokens
            result.finish, result.degraded = delta.finish, delta.degraded
    return result


async def answer_all(
    head: Head, requests: list[tuple[list[int], SamplingParams]], clients: int
) -> list[Answer]:
    """All of them, `clients` at a time, in order of the requests."""
    gate = asyncio.Semaphore(clients)

    async def one(prompt: list[int], params: SamplingParams) -> Answer:
        async with gate:
            return await answer(head, prompt, params)

    return list(await asyncio.gather(*(one(*request) for request in requests)))


def active(head: Head) -> set[int]:
    """Ids of the ranks that are active, when nothing is under way."""
    cluster = head.cluster()
    return set() if cluster.operation else {r.id for r in cluster.ranks if r.state == "active"}


async def until(condition: Callable[[], object], timeout_s: float = 20) -> None:
    """Wait until a condition that other tasks bring about holds.

    Raises AssertionError with the condition's source: asyncio drops the traceback of a TimeoutError
    on its way to another thread.
    """
    try:
        async with asyncio.timeout(timeout_s):
            while not condition():
                await asyncio.sleep(0.01)
    except TimeoutError:
        source = inspect.getsource(condition).strip()  # type: ignore[arg-type]
        raise AssertionError(f"not within {timeout_s} s: {source}") from None


def requests(count: int, tokens: int = 40) -> list[tuple[list[int], SamplingParams]]:
    """A fixed mixture: short and long prompts, shared prefixes, greedy and seeded."""
    result = []
    for number in range(count):
        shared = [(17 * i + 3) % 3000 + 10 for i in range(40 if number % 3 == 0 else 5)]
        own = [(31 * number + 7 * i) % 3000 + 10 for i in range(1 + 13 * number % 90)]
        params = SamplingParams(
            max_tokens=tokens + number % 17,
            temperature=0.0 if number % 2 else 0.8,
            top_p=0.95,
            seed=number,
            ignore_eos=True,
        )
        result.append((shared + own, params))
    return result
