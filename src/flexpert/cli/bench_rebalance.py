"""`flexpert bench rebalance`: what moving experts by their load gains, and what streams feel."""

from __future__ import annotations

from typing import Annotated

import typer

from flexpert.cli.options import Json, Output, duration_option, make_console, print_note
from flexpert.display.output import EXIT_FAILURE, check_outputs, show_report

EXAMPLES = (
    "flexpert bench rebalance",
    "flexpert bench rebalance --rounds 5 --clients 32 -- --redundant-experts 4",
    "flexpert bench rebalance --large --ranks 2 --clients 64 --prompt 1500 --tokens 8 -- "
    "--device cuda --no-prefix-cache",
)


def bench_rebalance(
    service: Annotated[
        list[str] | None,
        typer.Argument(metavar="[-- FLAGS]", help="More flags for the services it starts."),
    ] = None,
    ranks: Annotated[int, typer.Option(min=2, max=64, help="Of each service.")] = 4,
    clients: Annotated[int, typer.Option(min=1, max=1024, help="Concurrent streams.")] = 16,
    prompt: Annotated[int, typer.Option(min=1, max=1900, help="Tokens of each prompt.")] = 32,
    tokens: Annotated[int, typer.Option(min=2, max=1500, help="Tokens of each answer.")] = 200,
    large: Annotated[
        bool, typer.Option("--large", help="A model of 6.5 GB, whose experts keep GPUs busy.")
    ] = False,
    rounds: Annotated[int, typer.Option(min=1, help="Of both services in turn.")] = 3,
    seconds: Annotated[
        float, duration_option("--seconds", "Of each measurement.", least=1, default="10s")
    ] = 10.0,
    settle: Annotated[
        float,
        duration_option(
            "--settle",
            "At most, until --balance auto has moved what it moves.",
            least=1,
            default="2m",
        ),
    ] = 120.0,
    json_: Json = False,
    output: Output = None,
) -> None:
    """Measure what moving experts by their load gains, and what streams feel of it.

    It makes a small model whose router prefers few experts, and starts it twice, with --balance
    off and auto. Exit status 1 if an answer was lost.
    """
    check_outputs(output)
    from flexpert.bench.rebalance_runs import RebalancePlan, rebalance_text, run_rebalance

    plan = RebalancePlan(
        ranks=ranks,
        clients=clients,
        prompt=prompt,
        tokens=tokens,
        large=large,
        rounds=rounds,
        seconds=seconds,
        balance_s=settle,
        flags=tuple(service or ()),
    )
    console = make_console(stderr=True)
    report = run_rebalance(plan, lambda line: print_note(line, console))
    show_report(report, rebalance_text(report), as_json=json_, output=output)
    if report.lost:
        raise typer.Exit(EXIT_FAILURE)
