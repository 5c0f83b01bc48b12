"""`flexpert demo` and `flexpert chaos`: the service under changes and faults."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flexpert.cli.options import ApiKey, Json, Output, duration_option, make_console
from flexpert.display.output import check_outputs

DEMO_EXAMPLES = (
    "flexpert demo",
    "flexpert demo --many --clients 16 --requests 200 --duration 30s",
    "flexpert demo --json > run.json",
)


def demo(
    clients: Annotated[int, typer.Option(min=1, help="Concurrent streams.")] = 8,
    requests: Annotated[int, typer.Option(min=1, help="How many different requests.")] = 32,
    max_tokens: Annotated[int, typer.Option(min=2, help="Longest answer, in tokens.")] = 64,
    duration: Annotated[
        float,
        duration_option("--duration", "How long traffic lasts.", least=1, default="20s"),
    ] = 20.0,
    many: Annotated[bool, typer.Option("--many", help="Ten changes instead of three.")] = False,
    json_: Json = False,
) -> None:
    """Watch the ranks change from 2 to 4 to 3 to 1 under traffic, and count what it cost.

    Needs nothing but this package: it starts a service with the embedded model, takes the answers
    of an undisturbed run, then asks the same again while the ranks change, and compares. Exit
    status 1 if an answer was lost or differs.
    """
    from flexpert.trials.demo import DemoPlan, run_demo

    plan = DemoPlan(
        clients=clients, requests=requests, max_tokens=max_tokens, duration_s=duration, many=many
    )
    raise typer.Exit(run_demo(plan, console=make_console(stderr=json_), as_json=json_))


CHAOS_EXAMPLES = (
    "flexpert chaos",
    "flexpert chaos --faults kill --rate 0.5 --duration 5m --plot kills.png",
    "flexpert chaos --pairs --during-scaling --seed 7 --output run.json",
    "flexpert chaos --ranks 3 -- --stall-timeout 500ms",
)


def chaos(
    service: Annotated[
        list[str] | None,
        typer.Argument(metavar="[-- FLAGS]", help="More flags for the service it starts."),
    ] = None,
    url: Annotated[
        str | None,
        typer.Option(
            metavar="URL", help="A deterministic service of this machine, instead of a new one."
        ),
    ] = None,
    api_key: ApiKey = None,
    faults: Annotated[
        str | None,
        typer.Option(
            metavar="KIND[,KIND…]",
            help="kill, stop, slow, oom, partition; default: all; with --url the first three.",
        ),
    ] = None,
    rate: Annotated[float, typer.Option(min=0.01, max=20, help="Faults per second.")] = 0.5,
    duration: Annotated[
        float,
        duration_option(
            "--duration", "How long faults strike.", least=1, most=86400, default="30s"
        ),
    ] = 30.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of what strikes whom, and when.")] = 0,
    ranks: Annotated[int, typer.Option(min=1, max=64, help="Ranks of the service it starts.")] = 4,
    clients: Annotated[int, typer.Option(min=1, help="Concurrent streams.")] = 16,
    requests: Annotated[int, typer.Option(min=1, help="How many different requests.")] = 64,
    max_tokens: Annotated[int, typer.Option(min=2, help="Longest answer, in tokens.")] = 64,
    pairs: Annotated[bool, typer.Option("--pairs", help="Strike two ranks at once.")] = False,
    during_scaling: Annotated[
        bool, typer.Option("--during-scaling", help="Ranks join and leave all the time.")
    ] = False,
    json_: Json = False,
    output: Output = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Tokens over time, .png or .svg.")
    ] = None,
) -> None:
    """Kill, stop, slow and starve ranks under traffic, and count what it cost.

    It takes the answers of an undisturbed run, then asks the same again while faults strike by
    seed, and compares. kill: SIGKILL. stop: SIGSTOP, for good. slow: stopped half of the time for a
    second; nobody may be evicted for it. oom: a leak takes all memory that the rank may have.
    partition: rank and head do not hear each other for a while. Exit status 1 if an answer was lost
    or altered, a rank exited that was not harmed or has grown, or not all came back.
    """
    check_outputs(output, plot)
    from flexpert.bench.comm.plot import check_plot
    from flexpert.trials.chaos import ChaosPlan, check_flags, parse_faults, run_chaos

    if plot:
        check_plot(plot)
    plan = ChaosPlan(
        faults=parse_faults(faults, own=url is None),
        rate=rate,
        duration_s=duration,
        seed=seed,
        ranks=ranks,
        clients=clients,
        requests=requests,
        max_tokens=max_tokens,
        pairs=pairs,
        scaling=during_scaling,
        plot=plot,
        flags=check_flags(service, url),
        url=url,
        key=api_key,
    )
    raise typer.Exit(
        run_chaos(plan, console=make_console(stderr=json_), as_json=json_, output=output)
    )
