"""What something costs a service: the same load without it and with it, in turn.

Which comes first changes from round to round, since a machine is not the same from one minute to
the next; what differs is taken within the pairs of a round.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass
from statistics import median
from typing import Any

import msgspec

from flexpert.bench.load import closed_loop, complete, completion_body
from flexpert.bench.machine import Machine, this_machine
from flexpert.bench.processor_time import processor_seconds, service_processor_seconds
from flexpert.bench.prompts import random_prompts, token_pool
from flexpert.bench.service import Service
from flexpert.bench.statistics import Figures, figures
from flexpert.errors import FlexpertError

STALL_S = 120.0
WITHOUT, WITH = "without", "with"

Note = Callable[[str], None]
ServiceOf = Callable[[], AbstractAsyncContextManager[Service]]


@dataclass(frozen=True, slots=True, kw_only=True)
class CostLoad:
    """concurrencies: one after the other. rounds: at each, of both. answers: of each client in a
    round."""

    concurrencies: Sequence[int]
    rounds: int
    answers: int
    input_tokens: int
    output_tokens: int
    seed: int


class CostRound(msgspec.Struct, frozen=True, kw_only=True):
    """Processor time for a token, in microseconds: of the head, of it and all below it, of
    ourselves, and of those who watch the service."""

    figures: Figures
    head_us: float
    service_us: float
    client_us: float
    observers_us: float = 0.0


class CostComparison(msgspec.Struct, frozen=True, kw_only=True):
    """At one concurrency. rounds: without and with. tokens_ratio: tokens/s with over without;
    tokens_ratios: of each pair of rounds; head_us, service_us: more processor time for a token;
    service_share: of what it is without. Each is the median over pairs of rounds."""

    concurrency: int
    rounds: dict[str, list[CostRound]]
    tokens_ratio: float
    tokens_ratios: list[float]
    head_us: float
    service_us: float
    service_share: float

    @classmethod
    def of(cls, concurrency: int, rounds: dict[str, list[CostRound]]) -> CostComparison:
        pairs = list(zip(rounds[WITH], rounds[WITHOUT], strict=True))
        ratios = [
            one.figures.output_tokens_per_s / other.figures.output_tokens_per_s
            for one, other in pairs
        ]
        return cls(
            concurrency=concurrency,
            rounds=rounds,
            tokens_ratio=median(ratios),
            tokens_ratios=ratios,
            head_us=median(one.head_us - other.head_us for one, other in pairs),
            service_us=median(one.service_us - other.service_us for one, other in pairs),
            service_share=median(one.service_us / other.service_us - 1 for one, other in pairs),
        )


class CostReport(msgspec.Struct, frozen=True, kw_only=True):
    """of: what it is that costs."""

    command: str
    machine: Machine
    of: str
    flags: list[str]
    output_tokens: int
    costs: list[CostComparison]

    @property
    def rounds(self) -> list[CostRound]:
        """All of them."""
        return [one for cost in self.costs for kind in cost.rounds.values() for one in kind]

    @property
    def failed(self) -> int:
        """Requests."""
        return sum(one.figures.failed for one in self.rounds)


def always(service: Service) -> ServiceOf:
    """One that nothing has to be done for."""
    return lambda: nullcontext(service)


def cost_report(
    of: str, flags: Sequence[str], load: CostLoad, costs: list[CostComparison]
) -> CostReport:
    """Of this command on this machine."""
    return CostReport(
        command=" ".join(["flexpert", *sys.argv[1:]]),
        machine=this_machine(),
        of=of,
        flags=list(flags),
        output_tokens=load.output_tokens,
        costs=costs,
    )


async def compare(
    load: CostLoad, services: Mapping[str, ServiceOf], note: Note
) -> list[CostComparison]:
    """services: WITHOUT and WITH → the service to load, for the time of one round."""
    async with services[WITHOUT]() as service:
        pool = await token_pool(service.target)
    costs = []
    for concurrency in load.concurrencies:
        rounds: dict[str, list[CostRound]] = {kind: [] for kind in services}
        for number in range(load.rounds + 1):
            # other prompts each time, which the prefix cache does not know
            seed, count = load.seed + number, load.answers * concurrency
            prompts = random_prompts(pool, load.input_tokens, count, seed)
            order = list(services)[:: -1 if number % 2 else 1]
            for kind in order:
                async with services[kind]() as service:
                    one = await cost_round(service, load, prompts, concurrency)
                what = "warming up" if number == 0 else f"round {number}"
                speed = f"{one.figures.output_tokens_per_s:,.0f} tokens/s"
                cpu = f"{one.head_us:.0f} µs of CPU in the head"
                note(f"{concurrency} at once, {what}, {kind}: {speed}, {cpu}")
                if number:
                    rounds[kind].append(one)
        costs.append(CostComparison.of(concurrency, rounds))
    return costs


async def cost_round(
    service: Service, load: CostLoad, prompts: Sequence[Any], concurrency: int
) -> CostRound:
    """These prompts asked of a service, so many at once.

    Raises: FlexpertError: it answers none.
    """
    requests = [
        service.target.message(
            "POST",
            "/v1/completions",
            completion_body(
                prompt, max_tokens=load.output_tokens, temperature=0.0, ignore_eos=True
            ),
        )
        for prompt in prompts
    ]

    async def send(number: int) -> Any:
        return await complete(service.target, requests[number], stall_s=STALL_S)

    before = _processor_seconds(service)
    answers = await closed_loop(send, len(requests), concurrency)
    after = _processor_seconds(service)
    found = figures(answers)
    if found.failed == found.requests:
        raise FlexpertError(f"the service does not answer: {found.errors[0]}")
    head_us, service_us, client_us, observers_us = (
        1e6 * (end - begin) / found.output_tokens for end, begin in zip(after, before, strict=True)
    )
    return CostRound(
        figures=found,
        head_us=head_us,
        service_us=service_us,
        client_us=client_us,
        observers_us=observers_us,
    )


def _processor_seconds(service: Service) -> tuple[float, float, float, float]:
    """Of the head, the service, ourselves, and those who watch."""
    observers = sum(map(processor_seconds, service.observers))
    return (*service_processor_seconds(service.pid), time.process_time(), observers)
