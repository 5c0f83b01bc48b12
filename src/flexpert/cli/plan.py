"""`flexpert plan`: qualify a machine with real ranks that join, leave, die and rejoin."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from flexpert.cli.options import Json, Output, duration_option, make_console
from flexpert.display.output import EXIT_FAILURE, check_outputs
from flexpert.errors import ConfigError

PLAN_EXAMPLES = (
    "flexpert plan examples/plans/rejoin.json",
    "flexpert plan examples/plans/rejoin.json --kill sigstop --at combine-wait",
    "flexpert plan --random 20 --seed 7 --channel nixl",
)


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
    dtype: Annotated[
        Literal["bfloat16", "float16", "float32"], typer.Option(help="Data type of the rows.")
    ] = "bfloat16",
    fp8: Annotated[
        Literal["none", "float32", "power2", "ue8m0"],
        typer.Option(help="Dispatch in fp8 with these scales."),
    ] = "none",
    kill: Annotated[
        Literal["sigkill", "sigstop", "sigterm"], typer.Option(help="How ranks die.")
    ] = "sigkill",
    at: Annotated[
        Literal["dispatch-send", "dispatch-wait", "combine-send", "combine-wait", "random"],
        typer.Option(help="Where in an exchange ranks die."),
    ] = "random",
    channel: Annotated[
        Literal["auto", "shm", "nixl"], typer.Option(help="How rows reach a peer.")
    ] = "auto",
    exchanges: Annotated[int, typer.Option(min=1, help="Exchanges of each phase.")] = 10,
    timeout: Annotated[
        float,
        duration_option("--timeout", "Silence until a rank is masked.", least=0.05, default="2s"),
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

    from flexpert.trials.plan.oracle import Sizes
    from flexpert.trials.plan.plan_run import NamedPlan, check_scales, run_plans
    from flexpert.trials.plan.runner import Options

    options = Options(
        Sizes(tokens, hidden, topk, experts_per_rank, getattr(torch, dtype)),
        channel=channel,
        fp8=None if fp8 == "none" else fp8,
        exchanges=exchanges,
        timeout_s=timeout,
        kill=kill,
        at=at,
    )
    check_scales(options)
    plans = (
        [NamedPlan.load(file, seed)]
        if file
        else [NamedPlan.random(seed + number) for number in range(random)]
    )
    good = run_plans(
        plans,
        options,
        console=make_console(stderr=json_),
        brief=file is None,
        as_json=json_,
        output=output,
    )
    raise typer.Exit(0 if good else EXIT_FAILURE)
