"""`flexpert bench structured`: what structured output costs, in one run with what it is without.

Both kinds of request take turns on one service: as many tokens, as many at once, the same
temperature. Those with a structure follow a schema to which no answer ends before its last token.
"""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import psutil

from flexpert.bench.load import ClientAnswer, Target, closed_loop, complete, completion_body
from flexpert.bench.machine import Machine, this_machine
from flexpert.bench.prompts import random_prompts, token_pool
from flexpert.bench.service import own_service
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


class StructuredReport(msgspec.Struct, frozen=True, kw_only=True):
    """plain, structured: the rounds, which took turns.

    ratio, cpu_ratio: with structures over without, tokens/s and processor time a token; the median
    over the pairs of rounds that followed each other.
    """

    command: str
    machine: Machine
    flags: list[str]
    concurrency: int
    output_tokens: int
    plain: list[Round]
    structured: list[Round]
    ratio: float
    cpu_ratio: float

    @property
    def failed(self) -> int:
        """Requests."""
        return sum(one.figures.failed for one in (*self.plain, *self.structured))


def run_structured(plan: StructuredPlan, note: Note) -> StructuredReport:
    """Raises: FlexpertError"""
    plain, structured = asyncio.run(_measure(plan, note))
    return StructuredReport(
        command=" ".join(["flexpert", *sys.argv[1:]]),
        machine=this_machine(),
        flags=list(plan.flags),
        concurrency=plan.concurrency,
        output_tokens=plan.output_tokens,
        plain=plain,
        structured=structured,
        ratio=_of_pairs(structured, plain, lambda one: one.figures.output_tokens_per_s),
        cpu_ratio=_of_pairs(structured, plain, lambda one: one.cpu_ms),
    )


def _of_pairs(
    above: Sequence[Round], below: Sequence[Round], value: Callable[[Round], float]
) -> float:
    pairs = zip(above, below, strict=True)
    return statistics.median(value(one) / value(other) for one, other in pairs)


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


async def _measure(plan: StructuredPlan, note: Note) -> tuple[list[Round], list[Round]]:
    rounds: dict[str, list[Round]] = {"plain": [], "structured": []}
    async with own_service(plan.flags, report=note) as service:
        pool = await token_pool(service.target)
        for number in range(plan.rounds + 1):
            for place, (kind, into) in enumerate(rounds.items()):
                seed = plan.seed + 2 * number + place
                prompts = random_prompts(pool, plan.input_tokens, plan.count, seed)
                before = _cpu_s(service.pid)
                found = figures(await _offer(service.target, plan, prompts, kind == "structured"))
                cpu_s = _cpu_s(service.pid) - before
                if found.failed == found.requests:
                    raise FlexpertError(f"the service does not answer: {found.errors[0]}")
                one = Round(figures=found, cpu_ms=cpu_s * 1e3 / found.output_tokens)
                what = "warming up" if number == 0 else f"round {number}"
                speed = (
                    f"{found.output_tokens_per_s:,.0f} tokens/s, {one.cpu_ms:.2f} ms of CPU each"
                )
                note(f"{what}, {kind}: {speed}")
                if number:
                    into.append(one)
    return rounds["plain"], rounds["structured"]


def _cpu_s(pid: int) -> float:
    """Processor time of a process and all below it."""
    service = psutil.Process(pid)
    total = 0.0
    for process in (service, *service.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system
    return total


async def _offer(
    target: Target, plan: StructuredPlan, prompts: Sequence[Any], with_structure: bool
) -> list[ClientAnswer]:
    def request(number: int) -> bytes:
        how: dict[str, Any] = {"ignore_eos": True}
        if with_structure:
            how = {"structured_outputs": {"json": endless_schema(number % SCHEMAS)}}
        body = completion_body(
            prompts[number],
            max_tokens=plan.output_tokens,
            temperature=1.0,
            seed=number,
            **how,
        )
        return target.message("POST", "/v1/completions", body)

    requests = [request(number) for number in range(plan.count)]

    async def send(number: int) -> ClientAnswer:
        return await complete(target, requests[number], stall_s=STALL_S)

    return await closed_loop(send, plan.count, plan.concurrency)
