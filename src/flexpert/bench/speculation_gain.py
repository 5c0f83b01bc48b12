"""`flexpert bench speculate`: what speculative decoding gains, in one run with what it is without.

Two services run, one that speculates, and have the same requests in turn; the one that waits
sleeps. There are these kinds of request:

    repeating   a prompt that says a phrase again and again, and an answer that may have tokens of
                the phrase only, so that it repeats itself whatever the model is
    random      a prompt of random tokens, and whatever the model says to it
    file        prompts of a file, in place of both

All are asked for the most likely tokens and for drawn ones, with seeds; and the answers of the two
services are compared token by token.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from statistics import median

import msgspec
from prometheus_client.parser import text_string_to_metric_families

from flexpert.bench.cost_rounds import WITH, WITHOUT
from flexpert.bench.load import ClientAnswer, Target, call, closed_loop, complete, completion_body
from flexpert.bench.machine import Machine, this_machine
from flexpert.bench.processor_time import service_processor_seconds
from flexpert.bench.prompts import Prompt, token_pool
from flexpert.bench.service import Service, own_service
from flexpert.bench.statistics import figures
from flexpert.errors import FlexpertError

STALL_S = 120.0
REPEATING, RANDOM, FILE = "repeating", "random", "file"

Note = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeculatePlan:
    """What is measured. texts: REPEATING, RANDOM, or FILE with its prompts. rounds: of each kind
    and service. answers: of each client in a round.
    phrase_tokens: of what is repeated. temperature: where tokens are drawn. how: `--speculate`.
    flags: of both services."""

    texts: Sequence[str]
    concurrencies: Sequence[int]
    rounds: int
    answers: int
    input_tokens: int
    phrase_tokens: int
    output_tokens: int
    temperature: float
    seed: int
    how: str
    flags: tuple[str, ...] = ()
    prompts: tuple[Prompt, ...] = ()


class SpeculationRound(msgspec.Struct, frozen=True, kw_only=True):
    """cpu_us: processor time of all of the service's processes for a token. drafted, accepted:
    tokens that were proposed, and those of them that came true."""

    tokens_per_s: float
    cpu_us: float
    failed: int
    drafted: int = 0
    accepted: int = 0


class SpeculationGain(msgspec.Struct, frozen=True, kw_only=True):
    """One kind of request. text: of its prompts. temperature: 0: the most likely tokens. rounds:
    without and with. equal, answers: how many answers were token by token the same, of how many.
    """

    text: str
    temperature: float
    concurrency: int
    rounds: dict[str, list[SpeculationRound]]
    equal: int
    answers: int

    @property
    def tokens_ratios(self) -> list[float]:
        """tokens/s with over without, of each pair of rounds."""
        pairs = zip(self.rounds[WITH], self.rounds[WITHOUT], strict=True)
        return [one.tokens_per_s / other.tokens_per_s for one, other in pairs]

    @property
    def cpu_ratio(self) -> float:
        """The same of the processor time for a token, median."""
        pairs = zip(self.rounds[WITH], self.rounds[WITHOUT], strict=True)
        return median(one.cpu_us / other.cpu_us for one, other in pairs)

    @property
    def drafted(self) -> int:
        return sum(one.drafted for one in self.rounds[WITH])

    @property
    def accepted(self) -> int:
        return sum(one.accepted for one in self.rounds[WITH])


class SpeculationReport(msgspec.Struct, frozen=True, kw_only=True):
    command: str
    machine: Machine
    flags: list[str]
    how: str
    output_tokens: int
    gains: list[SpeculationGain]

    @property
    def failed(self) -> int:
        """Requests."""
        kinds = [kind for gain in self.gains for kind in gain.rounds.values()]
        return sum(one.failed for kind in kinds for one in kind)


def run_speculate(plan: SpeculatePlan, note: Note) -> SpeculationReport:
    """Raises: FlexpertError"""
    return SpeculationReport(
        command=" ".join(["flexpert", *sys.argv[1:]]),
        machine=this_machine(),
        flags=list(plan.flags),
        how=plan.how,
        output_tokens=plan.output_tokens,
        gains=asyncio.run(_measure(plan, note)),
    )


async def _measure(plan: SpeculatePlan, note: Note) -> list[SpeculationGain]:
    async with AsyncExitStack() as stack:
        services = {
            kind: await stack.enter_async_context(own_service((*plan.flags, *more), report=note))
            for kind, more in ((WITHOUT, ()), (WITH, ("--speculate", plan.how)))
        }
        pool = await token_pool(services[WITHOUT].target)
        return [
            await _gain(plan, services, pool, text, temperature, concurrency, note)
            for text, temperature, concurrency in itertools.product(
                plan.texts, (0.0, plan.temperature), plan.concurrencies
            )
        ]


async def _gain(
    plan: SpeculatePlan,
    services: Mapping[str, Service],
    pool: Sequence[int],
    text: str,
    temperature: float,
    concurrency: int,
    note: Note,
) -> SpeculationGain:
    rounds: dict[str, list[SpeculationRound]] = {kind: [] for kind in services}
    equal = 0
    count = plan.answers * concurrency
    for number in range(plan.rounds + 1):
        # other prompts each time, which the prefix cache does not know
        prompts = speculation_prompts(plan, pool, text, count, number)
        said: dict[str, list[list[int]]] = {}
        for kind in list(services)[:: -1 if number % 2 else 1]:
            one, said[kind] = await _round(
                services[kind], plan, text, prompts, temperature, concurrency
            )
            what = "warming up" if number == 0 else f"round {number}"
            note(
                f"{text}, temperature {temperature:g}, {concurrency} at once, {what}, {kind}: "
                f"{one.tokens_per_s:,.0f} tokens/s"
            )
            if number:
                rounds[kind].append(one)
        if number:
            equal += sum(a == b for a, b in zip(said[WITH], said[WITHOUT], strict=True))
    return SpeculationGain(
        text=text,
        temperature=temperature,
        concurrency=concurrency,
        rounds=rounds,
        equal=equal,
        answers=count * plan.rounds,
    )


def speculation_prompts(
    plan: SpeculatePlan, pool: Sequence[int], text: str, count: int, number: int
) -> list[Prompt]:
    """Those of the file that are next, or token ids drawn from the pool; repeated, if the text
    repeats itself. number: of the round."""
    if text == FILE:
        first = number * count
        return [plan.prompts[at % len(plan.prompts)] for at in range(first, first + count)]
    source = random.Random(plan.seed + number)
    phrase = plan.phrase_tokens if text == REPEATING else plan.input_tokens
    times = -(-plan.input_tokens // phrase)
    return [(source.choices(pool, k=phrase) * times)[: plan.input_tokens] for _ in range(count)]


async def _round(
    service: Service,
    plan: SpeculatePlan,
    text: str,
    prompts: Sequence[Prompt],
    temperature: float,
    concurrency: int,
) -> tuple[SpeculationRound, list[list[int]]]:
    """And the tokens of each answer. Raises: FlexpertError: the service answers none."""
    target = service.target

    def message(number: int, prompt: Prompt) -> bytes:
        few = {"allowed_token_ids": sorted({*prompt})} if text == REPEATING else {}
        body = completion_body(
            prompt,
            **few,
            max_tokens=plan.output_tokens,
            temperature=temperature,
            seed=number,
            ignore_eos=True,
            return_token_ids=True,
        )
        return target.message("POST", "/v1/completions", body)

    requests = list(itertools.starmap(message, enumerate(prompts)))
    answers: list[ClientAnswer | None] = [None] * len(requests)

    async def send(number: int) -> ClientAnswer:
        answers[number] = answer = await complete(target, requests[number], stall_s=STALL_S)
        return answer

    counted, cpu_s = await _draft_tokens(target), service_processor_seconds(service.pid)[1]
    found = figures(await closed_loop(send, len(requests), concurrency))
    cpu_s = service_processor_seconds(service.pid)[1] - cpu_s
    drafted, accepted = await _draft_tokens(target)
    if found.failed == found.requests:
        raise FlexpertError(f"the service does not answer: {found.errors[0]}")
    one = SpeculationRound(
        tokens_per_s=found.output_tokens_per_s,
        cpu_us=1e6 * cpu_s / found.output_tokens,
        failed=found.failed,
        drafted=drafted - counted[0],
        accepted=accepted - counted[1],
    )
    return one, [answer.token_ids if answer else [] for answer in answers]


async def _draft_tokens(target: Target) -> tuple[int, int]:
    """Proposed and accepted since the service's start."""
    status, text = await call(target, "GET", "/metrics")
    if status != 200:
        raise FlexpertError(f"GET /metrics answered {status}")
    values = {
        sample.name: int(sample.value)
        for family in text_string_to_metric_families(str(text))
        for sample in family.samples
        if sample.name in (_DRAFTED, _ACCEPTED)
    }
    return values[_DRAFTED], values[_ACCEPTED]


_DRAFTED = "flexpert_draft_tokens_total"
_ACCEPTED = "flexpert_accepted_draft_tokens_total"
