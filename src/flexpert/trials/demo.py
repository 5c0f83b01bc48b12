"""`flexpert demo`: ranks change under traffic, and every answer is compared with a quiet run's."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from time import perf_counter
from typing import Any, Protocol

import msgspec
from rich.console import Console

from flexpert.bench.cluster_history import cluster_now
from flexpert.bench.load import (
    ClientAnswer,
    LoadError,
    Target,
    call,
    closed_loop,
    complete,
    completion_body,
    error_message,
)
from flexpert.bench.machine import this_machine
from flexpert.bench.service import own_service
from flexpert.cluster.views import OperationView
from flexpert.display.output import write_report
from flexpert.errors import FlexpertError
from flexpert.trials.demo_report import DemoChange, DemoPlan, DemoProgress, DemoResult, demo_result
from flexpert.trials.demo_view import LineView, LiveView, summary

__all__ = ["DemoPlan", "run_demo"]

EXIT_OK = 0
EXIT_BAD = 1
EXIT_INTERRUPTED = 130

REFRESH_S = 0.25
POLL_S = 0.05
STALL_S = 60.0

SERVE = (
    *("--model", "tiny", "--ranks", "2", "--max-ranks", "6", "--deterministic"),
    # these ranks fit into a small machine, and nobody waits for answers when we are done
    *("--kv-memory", "32MiB", "--shutdown-timeout", "0", "--log-level", "warning"),
)

# 2 → 4 → 3 → 1: a rank out of the middle leaves a hole, and at the end rank 0 is gone as well
CHANGES: tuple[dict[str, Any], ...] = (
    {"ranks": 4},
    {"remove": [1]},
    {"remove": [0, 2]},
)

# up, down, out of the middle, and ids swapped in one operation
MANY_CHANGES: tuple[dict[str, Any], ...] = (
    {"ranks": 4},
    {"remove": [1]},
    {"ranks": 1},
    {"add": 1, "remove": [0]},
    {"ranks": 3},
    {"remove": [0]},
    {"add": 2},
    {"add": 1, "remove": [2]},
    {"ranks": 5},
    {"ranks": 2},
)

OPENINGS = (
    "In the beginning God created the heaven and the earth. And the earth was",
    "And it came to pass in those days, that",
    "Blessed is the man that",
    "And the LORD spake unto Moses, saying,",
    "Now there was a man in the land of",
    "We hold these truths to be self-evident, that",
    "And when the king heard these words, he",
    "Then Jesus answered and said unto them,",
    "The words of the wise are as",
    "And David said unto Jonathan,",
    "Behold, the days come, saith the LORD, that",
    "He that hath an ear, let him hear what",
    "Go to the ant, thou sluggard; consider her ways, and",
    "Four score and seven years ago our fathers brought forth",
    "And there went out a champion out of the camp of",
    "To every thing there is a season, and a time to",
)


class DemoView(Protocol):
    """What shows the run while it lasts."""

    def note(self, line: str) -> None: ...
    def refresh(self, progress: DemoProgress) -> None: ...


def run_demo(plan: DemoPlan, *, console: Console, as_json: bool) -> int:
    """The whole demonstration; the exit status."""
    try:
        if console.is_terminal:
            with LiveView(console) as view:
                result = asyncio.run(_demonstrate(plan, view))
        else:
            result = asyncio.run(_demonstrate(plan, LineView(console)))
    except KeyboardInterrupt:
        console.print("interrupted; the service is stopped")
        return EXIT_INTERRUPTED
    if as_json:
        write_report(result, as_json=True, output=None)
    else:
        console.print(summary(result))
    return EXIT_OK if result.good else EXIT_BAD


def demo_requests(plan: DemoPlan) -> list[dict[str, Any]]:
    """The fixed set: every other request samples with a seed of its own, the others are greedy."""
    bodies = []
    for number in range(plan.requests):
        # every round over the openings swaps who samples, so that none is asked twice the same
        sampled = (number + number // len(OPENINGS)) % 2 == 1
        bodies.append(
            completion_body(
                OPENINGS[number % len(OPENINGS)],
                max_tokens=plan.max_tokens,
                temperature=0.8 if sampled else 0.0,
                seed=1000 + number,
            )
        )
    return bodies


async def _demonstrate(plan: DemoPlan, view: DemoView) -> DemoResult:
    progress = DemoProgress()
    async with own_service(SERVE, report=view.note) as service:
        target = service.target
        requests = [target.message("POST", "/v1/completions", body) for body in demo_requests(plan)]
        progress.model = (await cluster_now(target)).model
        async with _shown(target, progress, view):
            progress.stage = "undisturbed run: 2 ranks"
            expected = await _undisturbed(target, requests, plan, progress)
            progress.stage = f"traffic of {plan.clients} clients"
            return await _disturbed(target, requests, expected, plan, progress)


async def _undisturbed(
    target: Target, requests: list[bytes], plan: DemoPlan, progress: DemoProgress
) -> list[ClientAnswer]:
    answers: dict[int, ClientAnswer] = {}

    async def send(number: int) -> None:
        answers[number] = await complete(
            target, requests[number], stall_s=STALL_S, on_tokens=progress.count
        )

    await closed_loop(send, len(requests), plan.clients)
    ordered = [answers[number] for number in range(len(requests))]
    broken = next((answer.error for answer in ordered if answer.error), None)
    if broken:
        raise FlexpertError(f"the undisturbed run failed already: {broken}")
    return ordered


async def _disturbed(
    target: Target,
    requests: list[bytes],
    expected: list[ClientAnswer],
    plan: DemoPlan,
    progress: DemoProgress,
) -> DemoResult:
    began = perf_counter()
    answers: list[tuple[int, ClientAnswer]] = []
    scaling = asyncio.create_task(_change(target, plan, began, progress))

    async def send(number: int) -> None:
        place = number % len(requests)
        progress.sent += 1
        answer = await complete(target, requests[place], stall_s=STALL_S, on_tokens=progress.count)
        progress.answered += answer.whole
        progress.lost += not answer.whole
        progress.equal += answer.whole and same(answer, expected[place])
        answers.append((place, answer))

    def jobs() -> Iterator[int]:
        for number in itertools.count():
            over = scaling.done() and perf_counter() - began >= plan.duration_s
            if over and number >= len(requests):
                return
            yield number

    prompts = [str(body["prompt"]) for body in demo_requests(plan)]
    try:
        await closed_loop(send, jobs(), plan.clients)
        await scaling
    finally:
        scaling.cancel()
    return demo_result(plan, this_machine(), progress, answers, prompts, began)


def same(answer: ClientAnswer, expected: ClientAnswer) -> bool:
    """Word for word, token for token, ended for the same reason."""
    return (answer.text, answer.tokens, answer.finish) == (
        expected.text,
        expected.tokens,
        expected.finish,
    )


async def _change(target: Target, plan: DemoPlan, began: float, progress: DemoProgress) -> None:
    """The changes, spread over the duration; each leaves the next a steady stretch before it."""
    changes = MANY_CHANGES if plan.many else CHANGES
    steady_s = plan.duration_s / (len(changes) + 1)
    for number, body in enumerate(changes, 1):
        at = max(began + number * steady_s, perf_counter() + steady_s / 4)
        await asyncio.sleep(at - perf_counter())
        change = DemoChange(began=perf_counter())
        progress.changes.append(change)
        status, answer = await call(target, "POST", "/cluster/operations", body)
        if status != 202:
            change.ended = perf_counter()
            change.error = f"HTTP {status}: {error_message(msgspec.json.encode(answer))}"
            continue
        change.operation = msgspec.convert(answer, OperationView)
        while change.operation.state in ("preparing", "committing"):
            await asyncio.sleep(POLL_S)
            path = f"/cluster/operations/{change.operation.id}"
            change.operation = msgspec.convert((await call(target, "GET", path))[1], OperationView)
        change.ended = perf_counter()


@asynccontextmanager
async def _shown(target: Target, progress: DemoProgress, view: DemoView) -> AsyncIterator[None]:
    async def show() -> None:
        while True:
            with suppress(LoadError):  # the view may be late; what counts is counted elsewhere
                progress.cluster = await cluster_now(target)
            progress.tick(perf_counter())
            view.refresh(progress)
            await asyncio.sleep(REFRESH_S)

    task = asyncio.create_task(show())
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        view.refresh(progress)
