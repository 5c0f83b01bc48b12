"""`flexpert bench serve --compare llama.cpp`: a service and llama.cpp's server in turn, as many
threads each, at several numbers of streams.

Both are there all the time, and whoever is not asked sleeps. First their answers are compared.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import msgspec
import uvloop

from flexpert.bench.llama.greedy_agreement import (
    GreedyAgreement,
    check_same_model,
    greedy_agreement,
)
from flexpert.bench.llama.llama_server import (
    GREEDY,
    LlamaServer,
    LlamaSettings,
    llama_server,
    write_model,
)
from flexpert.bench.load import Target
from flexpert.bench.machine import Machine, this_machine
from flexpert.bench.offered_load import OfferedLoad, offer
from flexpert.bench.other_server import ServerTurn
from flexpert.bench.process_memory import held_memory
from flexpert.bench.prompts import Prompt, tokenize
from flexpert.bench.serve import ServeMeasured
from flexpert.bench.service import Service, own_service
from flexpert.bench.statistics import figures
from flexpert.errors import ConfigError

CHECKED_PROMPTS = 8
CHECKED_TOKENS = 16
_FEWEST = 4  # requests of a turn
_ROUND = 256  # llama.cpp's contexts are multiples

Note = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaPlan:
    """load: of which each number of streams gets its count and concurrency. requests: of a turn;
    None: two for each stream. pairs: turns of each server at each number of streams."""

    load: OfferedLoad
    measured: ServeMeasured
    program: Path
    streams: Sequence[int]
    pairs: int
    requests: int | None = None

    @property
    def threads(self) -> int:
        """Of either server."""
        return self.measured.threads_per_rank * self.measured.ranks

    def turn(self, streams: int) -> OfferedLoad:
        """What each server is asked in a turn."""
        count = self.requests or max(_FEWEST, 2 * streams)
        return replace(self.load, concurrency=streams, count=count)


class HeldMemory(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes (PSS) that all processes of each server hold; mapped files count."""

    ours: int
    theirs: int


class StreamsComparison(msgspec.Struct, frozen=True, kw_only=True):
    """At one number of streams. ratios: our output tokens/s over theirs, of each pair of turns;
    ratio: their median. memory: after them."""

    streams: int
    pairs: list[ServerTurn]
    ratios: list[float]
    ratio: float
    memory: HeldMemory

    @classmethod
    def of(cls, streams: int, pairs: list[ServerTurn], memory: HeldMemory) -> StreamsComparison:
        ratios = [
            pair.ours.output_tokens_per_s / pair.theirs.output_tokens_per_s
            for pair in pairs
            if pair.theirs.output_tokens_per_s
        ]
        return cls(
            streams=streams,
            pairs=pairs,
            ratios=ratios,
            ratio=median(ratios) if ratios else 0.0,
            memory=memory,
        )


class LlamaReport(msgspec.Struct, frozen=True, kw_only=True):
    """threads: of each server. llama_tokens: for which llama.cpp has room in its KV cache. prompts,
    output_tokens: of each request."""

    command: str
    machine: Machine
    model: str
    ranks: int
    threads: int
    llama_tokens: int
    prompts: str
    output_tokens: int
    agreement: GreedyAgreement
    streams: list[StreamsComparison]

    @property
    def failed(self) -> int:
        """Requests of either server."""
        pairs = [pair for one in self.streams for pair in one.pairs]
        return sum(pair.ours.failed + pair.theirs.failed for pair in pairs)


def run_llama_comparison(plan: LlamaPlan, note: Note) -> LlamaReport:
    """Raises: FlexpertError: a server does not run, or they do not compute the same model."""
    if plan.measured.dtype not in ("auto", "bfloat16"):
        raise ConfigError(
            f"--dtype {plan.measured.dtype}: the comparison with llama.cpp is one in bfloat16"
        )
    return uvloop.run(_compare(plan, note))


async def _compare(plan: LlamaPlan, note: Note) -> LlamaReport:
    load = plan.load
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="flexpert-gguf-")))
        note("writing the model as GGUF")
        await write_model(plan.measured.model, folder / "model.gguf")
        service = await stack.enter_async_context(
            own_service(plan.measured.arguments(), report=note)
        )
        most = max(plan.streams)
        count = max(plan.turn(most).count, CHECKED_PROMPTS)
        prompts = await _token_ids(service.target, replace(load, count=count))
        slot_tokens = _slot_tokens(prompts, load.output_tokens)
        note("starting llama-server")
        theirs = await stack.enter_async_context(
            llama_server(
                LlamaSettings(
                    program=plan.program,
                    model=folder / "model.gguf",
                    threads=plan.threads,
                    slots=most,
                    slot_tokens=slot_tokens,
                )
            )
        )
        agreement = await greedy_agreement(
            service.target, theirs.target, prompts[:CHECKED_PROMPTS], CHECKED_TOKENS
        )
        note(f"{agreement.first} of {agreement.prompts} first tokens are the same")
        check_same_model(agreement)
        streams = [await _at(count, plan, service, theirs, note) for count in plan.streams]
    return LlamaReport(
        command=" ".join(["flexpert", *sys.argv[1:]]),
        machine=this_machine(),
        model=plan.measured.model,
        ranks=plan.measured.ranks,
        threads=plan.threads,
        llama_tokens=most * slot_tokens,
        prompts=load.what,
        output_tokens=load.output_tokens,
        agreement=agreement,
        streams=streams,
    )


def _slot_tokens(prompts: Sequence[Sequence[int]], output_tokens: int) -> int:
    longest = max(map(len, prompts)) + max(output_tokens, CHECKED_TOKENS)
    return -(-(longest + 1) // _ROUND) * _ROUND


async def _token_ids(target: Target, load: OfferedLoad) -> list[list[int]]:
    """The prompts of a load as ids, so that both servers are asked just the same."""
    asked = await load.asked(target, load.seed)
    return [
        await tokenize(target, prompt) if isinstance(prompt, str) else prompt for prompt in asked
    ]


async def _at(
    streams: int, plan: LlamaPlan, ours: Service, theirs: LlamaServer, note: Note
) -> StreamsComparison:
    """Pairs of turns with so many streams, after one that is not counted."""
    pairs = []
    for number in range(plan.pairs + 1):
        load = plan.turn(streams)
        if number == 0:
            load = replace(load, count=streams)
        load = replace(load, seed=plan.load.seed + number)
        prompts: list[Prompt] = list(await _token_ids(ours.target, load))
        found = {}
        for whose in ("ours", "theirs")[:: -1 if number % 2 else 1]:
            server, fields = (ours, None) if whose == "ours" else (theirs, GREEDY)
            found[whose] = figures(await offer(server.target, load, prompts, fields))
        pair = ServerTurn(**found)
        what = f"pair {number} of {plan.pairs}" if number else "warming up"
        speeds = f"{pair.ours.output_tokens_per_s:.1f} and {pair.theirs.output_tokens_per_s:.1f}"
        note(f"{streams} streams, {what}: {speeds} tokens/s")
        if number:
            pairs.append(pair)
    memory = HeldMemory(ours=held_memory(ours.pid), theirs=held_memory(theirs.pid))
    return StreamsComparison.of(streams, pairs, memory)
