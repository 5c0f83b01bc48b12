"""`flexpert bench prefix`: what it is worth that requests go to the rank that has their prefix.

Two services, one for each way of routing, are measured in turn with the same requests:

    groups          prompts with a long prefix that all of a group share, in a random order
    conversations   each turn's prompt is all that was said before, and something new

A round begins with prefixes that nobody has computed yet. When half of it is answered a rank
leaves, while each group or conversation is in the middle of a long answer, which is not measured;
the other half is measured without that rank. Then it joins again.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import sys
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import msgspec

from flexpert.bench.load import (
    ClientAnswer,
    Target,
    call,
    closed_loop,
    complete,
    completion_body,
)
from flexpert.bench.machine import Machine, this_machine
from flexpert.bench.prompts import token_pool
from flexpert.bench.routing_cost import choice_us
from flexpert.bench.service import own_service
from flexpert.bench.statistics import Figures, figures
from flexpert.errors import FlexpertError

ROUTINGS = ("fewest", "prefix")
WORKLOADS = ("groups", "conversations")
_STALL_S = 300.0
_CHANGE_S = 600.0
_LOOK_S = 0.1
_SHORT, _VERY_LONG = 128, 16384  # tokens of prompts for which a rank is chosen
_LONG = 256  # tokens of an answer that is cut off

Note = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixPlan:
    """What is measured. prompts: of each group. turns: of each conversation, each with `own_tokens`
    of its own; the first of a conversation and every prompt of a group has `prefix_tokens` before
    that. flags: of both services."""

    rounds: int
    groups: int
    prompts: int
    conversations: int
    turns: int
    prefix_tokens: int
    own_tokens: int
    output_tokens: int
    concurrency: int
    ranks: int
    seed: int
    flags: tuple[str, ...] = ()


class PrefixHalf(msgspec.Struct, frozen=True, kw_only=True):
    """One routing, half a round. cached: share of the prompts' tokens that was found in caches."""

    figures: Figures
    cached: float


class PrefixGain(msgspec.Struct, frozen=True, kw_only=True):
    """Routing by prefix over the fewest requests: requests/s and mean time to the first token, the
    medians of the rounds' ratios."""

    requests_per_s: float
    first_token: float


class PrefixCase(msgspec.Struct, frozen=True, kw_only=True):
    """A workload on all ranks, or after one of them has left. halves: of each routing, one of each
    round."""

    workload: str
    ranks: int
    halves: dict[str, list[PrefixHalf]]
    gain: PrefixGain


class PrefixReport(msgspec.Struct, frozen=True, kw_only=True):
    """choice_us: processor time of the head for the choice of a rank, by tokens of a prompt."""

    command: str
    machine: Machine
    flags: list[str]
    cases: list[PrefixCase]
    choice_us: dict[int, float] = {}

    @property
    def failed(self) -> int:
        """Requests."""
        return sum(
            half.figures.failed
            for case in self.cases
            for halves in case.halves.values()
            for half in halves
        )


def run_prefix(plan: PrefixPlan, note: Note) -> PrefixReport:
    """Raises: FlexpertError"""
    lengths = sorted({_SHORT, plan.prefix_tokens + plan.own_tokens, _VERY_LONG})
    choice = {tokens: round(choice_us(tokens, plan.ranks), 1) for tokens in lengths}
    note(f"choice of a rank, by tokens of the prompt: {choice} µs")
    halves = asyncio.run(_measure(plan, note))
    cases = [
        PrefixCase(workload=workload, ranks=ranks, halves=found, gain=gain_of(found))
        for (workload, ranks), found in halves.items()
    ]
    return PrefixReport(
        command=" ".join(["flexpert", *sys.argv[1:]]),
        machine=this_machine(),
        flags=list(plan.flags),
        cases=cases,
        choice_us=choice,
    )


def gain_of(halves: Mapping[str, Sequence[PrefixHalf]]) -> PrefixGain:
    pairs = list(zip(halves["prefix"], halves["fewest"], strict=True))
    return PrefixGain(
        requests_per_s=statistics.median(
            ours.figures.requests_per_s / theirs.figures.requests_per_s for ours, theirs in pairs
        ),
        first_token=statistics.median(
            _first_ms(ours) / _first_ms(theirs) for ours, theirs in pairs
        ),
    )


def _first_ms(half: PrefixHalf) -> float:
    first = half.figures.first_token_ms
    return first.mean if first else float("inf")


Halves = dict[tuple[str, int], dict[str, list[PrefixHalf]]]


async def _measure(plan: PrefixPlan, note: Note) -> Halves:
    found: Halves = {
        (workload, ranks): {routing: [] for routing in ROUTINGS}
        for workload in WORKLOADS
        for ranks in (plan.ranks, plan.ranks - 1)
    }
    async with AsyncExitStack() as stack:
        targets = {}
        for routing in ROUTINGS:
            flags = (*plan.flags, "--ranks", str(plan.ranks), "--routing", routing)
            service = await stack.enter_async_context(own_service(flags, report=note))
            targets[routing] = service.target
        pool = await token_pool(targets[ROUTINGS[0]])
        for number in range(plan.rounds):
            for workload in WORKLOADS:
                # who is first takes turns as well
                for routing in ROUTINGS if number % 2 == 0 else ROUTINGS[::-1]:
                    target = targets[routing]
                    offered = OfferedPrefixes(
                        plan, pool, f"{plan.seed} {number} {workload}", target
                    )
                    for ranks, half in ((plan.ranks, 0), (plan.ranks - 1, 1)):
                        one = await offered.measure(workload, half)
                        found[workload, ranks][routing].append(one)
                        note(
                            f"round {number + 1}, {workload}, {ranks} ranks, {_line(routing, one)}"
                        )
                        if half == 0:
                            async with offered.speaking(workload):
                                await _scale(target, {"remove": [plan.ranks - 1]})
                    await _scale(target, {"ranks": plan.ranks})
    return found


def _line(routing: str, half: PrefixHalf) -> str:
    return (
        f"{routing}: {half.figures.requests_per_s:.1f} requests/s, first token after "
        f"{_first_ms(half):.0f} ms, {half.cached:.0%} cached"
    )


async def _scale(target: Target, body: dict[str, Any]) -> None:
    """Raises: FlexpertError"""
    status, operation = await call(target, "POST", "/cluster/operations", body)
    async with asyncio.timeout(_CHANGE_S):
        while status < 300 and operation["state"] in ("preparing", "committing"):
            await asyncio.sleep(_LOOK_S)
            status, operation = await call(target, "GET", f"/cluster/operations/{operation['id']}")
    if status >= 300 or operation["state"] != "done":
        raise FlexpertError(f"the ranks could not be changed: {operation}")


class OfferedPrefixes:
    """The requests of one round, the same for both services: random tokens, drawn from a seed.

    prompts: of all groups, in the order in which they are asked.
    """

    def __init__(self, plan: PrefixPlan, pool: Sequence[int], seed: str, target: Target) -> None:
        self._plan = plan
        self._pool = pool
        self._target = target
        self._draw = random.Random(seed)
        self._prefixes = [self._tokens(plan.prefix_tokens) for _ in range(plan.groups)]
        self.prompts = [
            [*prefix, *self._tokens(plan.own_tokens)]
            for prefix in self._prefixes
            for _ in range(plan.prompts)
        ]
        self._draw.shuffle(self.prompts)
        self._talks = [self._tokens(plan.prefix_tokens) for _ in range(plan.conversations)]
        self._said = [
            [self._tokens(plan.own_tokens) for _ in range(plan.turns)] for _ in self._talks
        ]

    def _tokens(self, count: int) -> list[int]:
        return self._draw.choices(self._pool, k=count)

    async def measure(self, workload: str, half: int) -> PrefixHalf:
        """Raises: FlexpertError: nothing is answered."""
        answers = await (self._groups(half) if workload == "groups" else self._turns(half))
        found = figures(answers)
        if found.failed == found.requests:
            raise FlexpertError(f"the service does not answer: {found.errors[0]}")
        tokens = sum(answer.prompt_tokens for answer in answers)
        cached = sum(answer.cached_tokens for answer in answers)
        return PrefixHalf(figures=found, cached=cached / max(1, tokens))

    async def _groups(self, half: int) -> list[ClientAnswer]:
        middle = len(self.prompts) // 2
        prompts = self.prompts[middle:] if half else self.prompts[:middle]
        requests = [self._request(prompt) for prompt in prompts]

        async def send(number: int) -> ClientAnswer:
            return await complete(self._target, requests[number], stall_s=_STALL_S)

        return await closed_loop(send, len(requests), self._plan.concurrency)

    async def _turns(self, half: int) -> list[ClientAnswer]:
        middle = self._plan.turns // 2
        turns = range(middle, self._plan.turns) if half else range(middle)
        answers: list[ClientAnswer] = []

        async def talk(number: int) -> None:
            """A turn of a conversation, behind the one before it."""
            tokens = self._talks[number]
            for turn in turns:
                tokens += self._said[number][turn]
                request = self._request(tokens, return_token_ids=True)
                answer = await complete(self._target, request, stall_s=_STALL_S)
                tokens += answer.token_ids
                answers.append(answer)

        await closed_loop(talk, len(self._talks), self._plan.concurrency)
        return answers

    @asynccontextmanager
    async def speaking(self, workload: str) -> AsyncIterator[None]:
        """While the block runs each group or conversation has an answer under way; it is cut off
        then."""
        prompts = self._prefixes if workload == "groups" else self._talks
        begun, errors = [asyncio.Event() for _ in prompts], list[str]()

        async def speak(number: int, prompt: list[int]) -> None:
            request, heard = self._request(prompt, max_tokens=_LONG), begun[number]

            def tell(events: int) -> None:
                if events:
                    heard.set()

            answer = await complete(self._target, request, stall_s=_STALL_S, on_tokens=tell)
            heard.set()
            if answer.error:
                errors.append(answer.error)

        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(speak(number, [*prompt, *self._tokens(self._plan.own_tokens)]))
                for number, prompt in enumerate(prompts)
            ]
            for event in begun:
                await event.wait()
            yield
            for task in tasks:
                task.cancel()
        if errors:
            raise FlexpertError(f"the service does not answer: {errors[0]}")

    def _request(self, prompt: list[int], **more: Any) -> bytes:
        body = completion_body(
            prompt,
            **{"max_tokens": self._plan.output_tokens, "temperature": 0, "ignore_eos": True} | more,
        )
        return self._target.message("POST", "/v1/completions", body)
