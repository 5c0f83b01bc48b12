"""What docs/performance.md says of answers that differ, and of what a change computes again.

python tools/answers.py rounding    no change: alone, beside others, on 1, 2 and 4 ranks
python tools/answers.py changes     12 changes under load; --clients 100: more than one rank may run
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter

from flexpert.cluster.head import Head
from flexpert.cluster.views import OperationView
from flexpert.config import load_config
from flexpert.engine.request import SamplingParams
from flexpert.trials.demo import MANY_CHANGES, demo_requests
from flexpert.trials.demo_report import DemoPlan

CHANGES = (*MANY_CHANGES, {"ranks": 4}, {"ranks": 1})

Request = tuple[list[int], SamplingParams]


@dataclass
class Answered:
    """place: of the request. moved: it ran on more than one rank."""

    place: int
    began: float
    ended: float = 0.0
    tokens: list[int] = field(default_factory=list)
    moved: bool = False


def requests_of(head: Head, count: int) -> list[Request]:
    """Those of `flexpert demo`: half of them greedy, half sampled with a seed."""
    return [
        (
            head.tokenizer.encode(body["prompt"]),
            SamplingParams(
                max_tokens=body["max_tokens"], temperature=body["temperature"], seed=body["seed"]
            ),
        )
        for body in demo_requests(DemoPlan(requests=count))
    ]


async def ask(head: Head, request: Request, place: int) -> Answered:
    answer = Answered(place, perf_counter())
    ranks = set()
    async with head.submit(*request) as stream:
        async for delta in stream:
            ranks.add(head._journal.rank_of(stream.id))
            answer.tokens += delta.tokens
    answer.ended, answer.moved = perf_counter(), len(ranks - {None}) > 1
    return answer


async def load(
    head: Head, requests: list[Request], clients: int, over: Callable[[int], bool]
) -> list[Answered]:
    """The requests again and again, `clients` at a time, until `over` of the next number."""
    numbers, answers = itertools.count(), []

    async def client() -> None:
        while not over(number := next(numbers)):
            place = number % len(requests)
            answers.append(await ask(head, requests[place], place))

    await asyncio.gather(*(client() for _ in range(clients)))
    return answers


async def once(head: Head, requests: list[Request], clients: int) -> list[list[int]]:
    answers = await load(head, requests, clients, lambda number: number >= len(requests))
    return [answer.tokens for answer in sorted(answers, key=lambda answer: answer.place)]


async def change(head: Head, **target: object) -> OperationView:
    return await head.wait_operation(head.begin_operation(**target).id)  # type: ignore[arg-type]


async def rounding(head: Head, count: int, _clients: int) -> None:
    requests = requests_of(head, count)
    await change(head, ranks=1)
    alone = await once(head, requests, 1)
    for ranks, clients in ((1, 1), (1, 16), (1, 64), (2, 16), (4, 16)):
        await change(head, ranks=ranks)
        found = await once(head, requests, clients)
        differ = sum(a != b for a, b in zip(found, alone, strict=True))
        print(f"{ranks} ranks, {clients:2} at once: {differ} of {count} unlike alone on 1 rank")


async def changes(head: Head, count: int, clients: int) -> None:
    requests = requests_of(head, count)
    expected = await once(head, requests, clients)
    again = await once(head, requests, clients)
    differ = sum(a != b for a, b in zip(again, expected, strict=True))
    print(f"2 ranks twice, no change: {differ} of {count} differ")
    operations: list[tuple[float, float, OperationView]] = []
    over = asyncio.Event()

    async def scale() -> None:
        for target in CHANGES:
            await asyncio.sleep(1.0)
            began = perf_counter()
            operations.append((began, 0.0, await change(head, **target)))
            operations[-1] = (began, perf_counter(), operations[-1][2])
        over.set()

    scaling = asyncio.create_task(scale())
    answers = await load(head, requests, clients, lambda number: over.is_set() and number >= count)
    await scaling
    for _, _, done in operations:
        print(
            f"→ ranks {done.target}: {done.state}, {done.moved_requests} requests moved, "
            f"{done.moved_with_kv} with their KV, at most {done.recomputed_tokens} tokens "
            "computed again"
        )
    total, unlike = Counter[str](), Counter[str]()
    for answer in answers:
        lived = any(answer.began < end and answer.ended > begin for begin, end, _ in operations)
        kind = "moved" if answer.moved else "stayed in a change" if lived else "between changes"
        total[kind] += 1
        unlike[kind] += answer.tokens != expected[answer.place]
    print(f"{len(answers)} answers, {sum(unlike.values())} unlike the first run on 2 ranks:")
    for kind in total:
        print(f"  {kind}: {unlike[kind]} of {total[kind]}")


async def main(arguments: argparse.Namespace) -> None:
    settings = {
        "cluster.ranks": 2,
        "cluster.max_ranks": 6,
        "engine.kv_memory": arguments.kv_memory,
        "engine.deterministic": arguments.deterministic,
    }
    head = Head(load_config(environment={}, overrides=settings))
    await head.start()
    try:
        what = {"rounding": rounding, "changes": changes}[arguments.what]
        await what(head, arguments.requests, arguments.clients)
    finally:
        await head.stop()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["rounding", "changes"])
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--requests", type=int, default=192)
    parser.add_argument("--kv-memory", default="32MiB")
    parser.add_argument("--deterministic", action="store_true")
    asyncio.run(main(parser.parse_args()))
