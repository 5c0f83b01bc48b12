"""`flexpert plan`: qualify a machine with real ranks that join, leave, die and rejoin."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from flexpert.cli.command import Json, Output, duration
from flexpert.display.output import check_outputs, write_output
from flexpert.errors import ConfigError


class KillSignal(StrEnum):
    SIGKILL = "sigkill"
    SIGSTOP = "sigstop"
    SIGTERM = "sigterm"


class At(StrEnum):
    DISPATCH_SEND = "dispatch-send"
    DISPATCH_WAIT = "dispatch-wait"
    COMBINE_SEND = "combine-send"
    COMBINE_WAIT = "combine-wait"
    RANDOM = "random"


class ChannelName(StrEnum):
    AUTO = "auto"
    SHM = "shm"
    NIXL = "nixl"


class Dtype(StrEnum):
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT32 = "float32"


class Fp8(StrEnum):
    NONE = "none"
    FLOAT32 = "float32"
    POWER2 = "power2"
    UE8M0 = "ue8m0"


def plan(
    file: Annotated[
        Path | None, typer.Argument(metavar="PLAN.json", help="The plan.", show_default=False)
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Most tokens that a rank sends.")] = 64,
    hidden: Annotated[int, typer.Option(min=1, help="Elements of a row.")] = 2048,
    topk: Annotated[
        int, typer.Option(min=1, max=64, help="Experts that a token is routed to.")
    ] = 8,
    experts_per_rank: Annotated[int, typer.Option(min=1, help="Experts that each rank holds.")] = 4,
    dtype: Annotated[Dtype, typer.Option(help="Data type of the rows.")] = Dtype.BFLOAT16,
    fp8: Annotated[Fp8, typer.Option(help="Dispatch in fp8 with these scales.")] = Fp8.NONE,
    kill: Annotated[KillSignal, typer.Option(help="How ranks die.")] = KillSignal.SIGKILL,
    at: Annotated[At, typer.Option(help="Where in an exchange ranks die.")] = At.RANDOM,
    channel: Annotated[ChannelName, typer.Option(help="How rows reach a peer.")] = ChannelName.AUTO,
    exchanges: Annotated[int, typer.Option(min=1, help="Exchanges of each phase.")] = 10,
    timeout: Annotated[
        float,
        typer.Option(
            metavar="DURATION",
            parser=duration("--timeout", 0.05),
            help="Silence until a rank is masked.",
        ),
    ] = 2.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of data and chance.")] = 0,
    random: Annotated[
        int, typer.Option(min=0, metavar="N", help="Run N random plans, no file.")
    ] = 0,
    json_: Json = False,
    output: Output = None,
) -> None:
    """Run real rank processes through the phases of a plan and check every exchange.

    A plan is a JSON list of phases, each a list of rank ids: a new id joins, a missing one leaves,
    a negative one is killed during the phase; or {"ranks": [...], "kill": [...]}. Ranks use nothing
    but flexpert.comm; every row, weight and sum is held against a float64 oracle, also in the
    exchange in which a rank dies. Exit status: 0 all was right, 1 not, 2 a bad plan or flag.
    """
    if (file is None) == (random == 0):
        raise ConfigError("name a plan file, or --random N; see flexpert plan --help")
    check_outputs(output)
    import torch
    from rich.console import Console

    from flexpert.bench.machine import this_machine
    from flexpert.comm import quant
    from flexpert.trials.plan import plan_file, runner
    from flexpert.trials.plan import plan_report as report
    from flexpert.trials.plan.oracle import Sizes

    scales = None if fp8 is Fp8.NONE else fp8.value
    if scales is not None:
        try:
            quant.check(hidden, scales)  # type: ignore[arg-type]
        except ValueError as error:
            raise ConfigError(str(error)) from error
    plans = (
        [(str(file), seed, plan_file.load(file))]
        if file
        else [
            (f"random plan {seed + n}", seed + n, plan_file.random_plan(seed + n))
            for n in range(random)
        ]
    )
    sizes = Sizes(tokens, hidden, topk, experts_per_rank, getattr(torch, dtype.value))
    console = Console(stderr=json_)
    everything: list[runner.PhaseResult] = []
    written = []
    for name, own_seed, phases in plans:
        options = runner.Options(
            sizes,
            channel=channel.value,
            fp8=scales,  # type: ignore[arg-type]
            exchanges=exchanges,
            timeout_s=timeout,
            kill=kill.value,
            at=at.value,
            seed=own_seed,
        )
        table = report.new_table(f"{name}: {tokens} tokens of {hidden} {dtype.value}")
        with console.status(f"{name}: starting") as status:

            def done(result: runner.PhaseResult, name: str = name) -> None:
                status.update(f"{name}: phase {result.phase} done")

            results = runner.run(phases, options, done)
        for result in results:
            report.add(table, result)
        if file or any(result.errors for result in results):
            console.print(table)
        else:
            console.print(f"{name}: " + " → ".join(result.phase for result in results))
        everything += results
        written.append({"plan": name, "seed": own_seed, "phases": runner.as_json(results)})
    good = report.verdict(console, everything)
    if json_ or output:
        told = {
            "pass": good,
            "machine": msgspec.to_builtins(this_machine()),
            "options": {
                "tokens": tokens,
                "hidden": hidden,
                "topk": topk,
                "experts_per_rank": experts_per_rank,
                "dtype": dtype.value,
                "fp8": scales,
                "kill": kill.value,
                "at": at.value,
                "channel": channel.value,
                "exchanges": exchanges,
                "timeout_s": timeout,
            },
            "runs": written,
        }
        encoded = json.dumps(told, indent=1)
        if json_:
            print(encoded)
        if output:
            write_output(output, encoded.encode())
    raise typer.Exit(0 if good else 1)
