"""What a load asks, and when: of chance, a file of prompts, or a trace."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flexpert.bench.arrival_times import RateRamp, gamma_arrivals, ramp_arrivals
from flexpert.bench.load import (
    ClientAnswer,
    LoadError,
    Target,
    call,
    closed_loop,
    complete,
    completion_body,
    open_loop,
)
from flexpert.bench.prompts import Prompt, random_prompts, read_prompts, token_pool
from flexpert.bench.traffic_trace import TrafficTrace

STALL_S = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class OfferedLoad:
    """What is asked, and how fast. prompts: a file; trace: requests with their times and lengths;
    neither: random ones.

    request_rate: arrivals a second, or ramp: a rate that changes, both with `burstiness`; neither:
    `concurrency` clients without a pause.
    """

    prompts: Path | None = None
    trace: TrafficTrace | None = None
    trace_speedup: float = 1.0
    count: int
    input_tokens: int
    output_tokens: int
    concurrency: int
    request_rate: float | None = None
    ramp: RateRamp | None = None
    burstiness: float = 1.0
    temperature: float = 0.0
    warmup: int
    seed: int

    @property
    def timed(self) -> bool:
        """Whether requests arrive at times of their own."""
        return self.request_rate is not None or self.ramp is not None or self.trace is not None

    def arrivals(self) -> list[float] | None:
        """Seconds from the begin; None: they follow each other."""
        if self.trace is not None:
            return [request.at for request in self.trace.requests]
        if self.ramp is not None:
            return ramp_arrivals(self.ramp, self.count, self.seed, self.burstiness)
        if self.request_rate is not None:
            return gamma_arrivals(self.request_rate, self.count, self.seed, self.burstiness)
        return None

    def describe(self) -> str:
        """In words."""
        if self.trace is not None:
            trace = self.trace
            left_out = f", {trace.left_out} left out" if trace.left_out else ""
            speed = f", {self.trace_speedup:g} times as fast" if self.trace_speedup != 1 else ""
            return f"{self.count} requests of {trace.file}{left_out}{speed}, seed {self.seed}"
        if self.ramp is not None:
            how = f"{self.ramp} arrive"
        elif self.request_rate is not None:
            how = f"{self.request_rate:g} arrive a second"
        else:
            how = f"{self.concurrency} at once"
        if self.burstiness != 1.0:
            how += f", burstiness {self.burstiness:g}"
        if self.temperature:
            how += f", temperature {self.temperature:g}"
        out = self.output_tokens
        return f"{self.count} requests, {self.what}, {out} out, {how}, seed {self.seed}"

    @property
    def what(self) -> str:
        """Is asked, if it is no trace."""
        if self.prompts is not None:
            return f"prompts of {self.prompts}"
        return f"{self.input_tokens} random tokens in"

    async def fitting(self, target: Target) -> OfferedLoad:
        """Without the requests of a trace that are longer than this service takes.

        Raises: ConfigError: it takes none.
        """
        if self.trace is None:
            return self
        trace = self.trace.fitting(await _most_tokens(target))
        return replace(self, trace=trace, count=len(trace.requests))

    async def asked(self, target: Target, seed: int) -> list[Prompt]:
        """The prompts of all requests."""
        if self.prompts is not None:
            return read_prompts(self.prompts, self.count)
        pool = await token_pool(target)
        if self.trace is not None:
            return self.trace.prompts(pool, seed)
        return random_prompts(pool, self.input_tokens, self.count, seed)

    def answer_tokens(self) -> list[int]:
        """Of each request."""
        if self.trace is not None:
            return [request.output_tokens for request in self.trace.requests]
        return [self.output_tokens] * self.count


async def _most_tokens(target: Target) -> int | None:
    """The longest prompt and answer together; None: it does not say."""
    status, answer = await call(target, "GET", "/v1/models")
    try:
        found = answer["data"][0]["max_model_len"] if status == 200 else None
    except (KeyError, IndexError, TypeError):
        return None
    return found if isinstance(found, int) else None


async def offer(
    target: Target,
    load: OfferedLoad,
    prompts: list[Prompt],
    fields: Mapping[str, Any] | None = None,
) -> list[ClientAnswer]:
    """The load itself. fields: of each request besides, as other servers want them."""
    requests = _messages(target, load, prompts, load.answer_tokens(), fields)

    async def send(number: int) -> ClientAnswer:
        return await complete(target, requests[number], stall_s=STALL_S)

    arrivals = load.arrivals()
    if arrivals is not None:
        return await open_loop(send, arrivals)
    return await closed_loop(send, len(requests), load.concurrency)


async def warm_up(
    target: Target, load: OfferedLoad, seed: int, fields: Mapping[str, Any] | None = None
) -> None:
    """With other prompts than those measured, else the prefix cache would know them.

    Raises: LoadError: nothing is answered.
    """
    if not load.warmup:
        return
    pool = await token_pool(target)
    prompts = random_prompts(pool, load.input_tokens, load.warmup, seed)
    tokens = [load.output_tokens] * len(prompts)
    requests = _messages(target, load, prompts, tokens, fields)

    async def send(number: int) -> ClientAnswer:
        return await complete(target, requests[number], stall_s=STALL_S)

    warmed = await closed_loop(send, len(requests), load.concurrency)
    if all(answer.error for answer in warmed):
        where = f"{target.host}:{target.port}"
        raise LoadError(f"the service at {where} does not answer: {warmed[0].error}")


def _messages(
    target: Target,
    load: OfferedLoad,
    prompts: list[Prompt],
    tokens: list[int],
    fields: Mapping[str, Any] | None,
) -> list[bytes]:
    more = {"ignore_eos": True, "temperature": load.temperature, **(fields or {})}
    return [
        target.message(
            "POST",
            "/v1/completions",
            completion_body(prompt, max_tokens=most, **more),
        )
        for prompt, most in zip(prompts, tokens, strict=True)
    ]
