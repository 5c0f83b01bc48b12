"""`flexpert bench structured`: what structured output costs, in one run with what it is without.

Three kinds of request take turns on one service: as many tokens, as many at once, the same
temperature and seeds.

    plain      no structure, and no end before the last token
    any text   a structure that any long text follows: the same text as without, or nearly, so that
               what differs is the cost of matchers and masks
    schema     JSON of a schema that no answer comes to the end of: other text, whose tokens go to
               other experts, so that a step without masks would take another time as well
"""

from __future__ import annotations

import asyncio
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from flexpert.bench.load import ClientAnswer, Target, closed_loop, complete, completion_body
from flexpert.bench.machine import Machine, this_machine
from flexpert.bench.processor_time import service_processor_seconds
from flexpert.bench.prompts import random_prompts, token_pool
from flexpert.bench.service import Service, own_service
from flexpert.bench.statistics import Figures, figures
from flexpert.errors import FlexpertError

STALL_S = 120.0
SCHEMAS = 16  # different ones, in turn

Note = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredPlan:
    """What is measured. rounds: of each kind. count: requests of a round. flags: of the service."""

    rounds: int
    count: int
    concurrency: int
    input_tokens: int
    output_tokens: int
    seed: int
    flags: tuple[str, ...] = ()


class Round(msgspec.Struct, frozen=True, kw_only=True):
    """cpu_ms: processor time of all of the service's processes for a token; unlike the time that
    passes, it says the same on a machine that does something else besides."""

    figures: Figures
    cpu_ms: float


class Cost(msgspec.Struct, frozen=True, kw_only=True):
    """A kind over plain, tokens/s and processor time a token: the median over the rounds, each with
    the plain one before it."""

    tokens_per_s: float
    cpu: float


class StructuredReport(msgspec.Struct, frozen=True, kw_only=True):
    """rounds: of each kind. costs: of each kind but plain."""

    command: str
    machine: Machine
    flags: list[str]
    concurrency: int
    output_tokens: int
    rounds: dict[str, list[Round]]
    costs: dict[str, Cost]

    @property
    def failed(self) -> int:
        """Requests."""
        return sum(one.figures.failed for kind in self.rounds.values() for one in kind)


def run_structured(plan: StructuredPlan, note: Note) -> StructuredReport:
    """Raises: FlexpertError"""
    rounds = asyncio.run(_measure(plan, note))
    return StructuredReport(
        command=" ".join(["flexpert", *sys.argv[1:]]),
        machine=this_machine(),
        flags=list(plan.flags),
        concurrency=plan.concurrency,
        output_tokens=plan.output_tokens,
        rounds=rounds,
        costs={kind: _cost(rounds[kind], rounds[PLAIN]) for kind in KINDS if kind != PLAIN},
    )


def _cost(rounds: Sequence[Round], plain: Sequence[Round]) -> Cost:
    pairs = list(zip(rounds, plain, strict=True))
    return Cost(
        tokens_per_s=statistics.median(
            one.figures.output_tokens_per_s / other.figures.output_tokens_per_s
            for one, other in pairs
        ),
        cpu=statistics.median(one.cpu_ms / other.cpu_ms for one, other in pairs),
    )


def _without(number: int) -> dict[str, Any]:
    return {"ignore_eos": True}


def _any_text(number: int) -> dict[str, Any]:
    return {"structured_outputs": {"regex": "(.|\n){50000,}"}}


def _of_a_schema(number: int) -> dict[str, Any]:
    return {"structured_outputs": {"json": endless_schema(number % SCHEMAS)}}


PLAIN = "plain"
KINDS: Mapping[str, Callable[[int], dict[str, Any]]] = {
    PLAIN: _without,
    "any text": _any_text,
    "schema": _of_a_schema,
}
"""What a request of each kind has in its body; given its number."""


def endless_schema(number: int) -> dict[str, Any]:
    """A list of records of an API that never has enough of them; the number makes it another."""
    record = {
        "type": "object",
        "properties": {
            f"id_{number}": {"type": "integer", "minimum": 0, "maximum": 99999},
            "state": {"enum": ["open", "paid", "shipped", "returned"]},
            "code": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{4}$"},
            "note": {"type": "string", "maxLength": 40},
            "total": {"type": "number", "minimum": 0},
            "tags": {"type": "array", "items": {"type": "string", "maxLength": 10}, "maxItems": 3},
        },
        "additionalProperties": False,
    }
    record["required"] = list(record["properties"])  # type: ignore[call-overload]
    return {"type": "array", "items": record, "minItems": 100_000}


async def _measure(plan: StructuredPlan, note: Note) -> dict[str, list[Round]]:
    rounds: dict[str, list[Round]] = {kind: [] for kind in KINDS}
    async with own_service(plan.flags, report=note) as service:
        pool = await token_pool(service.target)
        for number in range(plan.rounds + 1):
            for kind, into in rounds.items():
                # each time others, which the prefix cache does not know
                seed = plan.seed + len(KINDS) * number + len(into)
                prompts = random_prompts(pool, plan.input_tokens, plan.count, seed)
                one = await _round(service, plan, prompts, KINDS[kind])
                what = "warming up" if number == 0 else f"round {number}"
                speed = f"{one.figures.output_tokens_per_s:,.0f} tokens/s"
                note(f"{what}, {kind}: {speed}, {one.cpu_ms:.2f} ms of CPU each")
                if number:
                    into.append(one)
    return rounds


async def _round(
    service: Service,
    plan: StructuredPlan,
    prompts: Sequence[Any],
    kind: Callable[[int], dict[str, Any]],
) -> Round:
    before = service_processor_seconds(service.pid)[1]
    found = figures(await _offer(service.target, plan, prompts, kind))
    cpu_s = service_processor_seconds(service.pid)[1] - before
    if found.failed == found.requests:
        raise FlexpertError(f"the service does not answer: {found.errors[0]}")
    return Round(figures=found, cpu_ms=cpu_s * 1e3 / found.output_tokens)


async def _offer(
    target: Target,
    plan: StructuredPlan,
    prompts: Sequence[Any],
    kind: Callable[[int], dict[str, Any]],
) -> list[ClientAnswer]:
    def request(number: int) -> bytes:
        body = completion_body(
            prompts[number],
            max_tokens=plan.output_tokens,
            temperature=1.0,
            seed=number,
            **kind(number),
        )
        return target.message("POST", "/v1/completions", body)

    requests = [request(number) for number in range(plan.count)]

    async def send(number: int) -> ClientAnswer:
        return await complete(target, requests[number], stall_s=STALL_S)

    return await closed_loop(send, plan.count, plan.concurrency)
