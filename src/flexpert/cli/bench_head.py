"""`flexpert bench head`: what a streamed token costs the head."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flexpert.cli.options import Json, Output, make_console, print_note
from flexpert.display.output import EXIT_FAILURE, check_outputs, show_report

HEAD_EXAMPLES = (
    "flexpert bench head",
    "flexpert bench head --streams 64 --rounds 5 --before ../flexpert-before",
    "flexpert bench head --streams 256 -- --device cuda --model ./model",
)


def bench_head(
    service: Annotated[
        list[str] | None,
        typer.Argument(metavar="[-- FLAGS]", help="More flags for the service."),
    ] = None,
    streams: Annotated[
        list[int] | None,
        typer.Option(
            min=1, metavar="N", help="At once; may be repeated. Default: 1, 16, 64 and 256."
        ),
    ] = None,
    before: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Another checkout of flexpert, measured in turn."),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, metavar="N", help="At each number of streams.")] = 3,
    input_len: Annotated[int, typer.Option(min=1, metavar="N", help="Tokens of a prompt.")] = 32,
    output_len: Annotated[
        int, typer.Option(min=1, metavar="N", help="Tokens of every answer.")
    ] = 300,
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of the prompts.")] = 0,
    json_: Json = False,
    output: Output = None,
) -> None:
    """Measure the processor time that a streamed token takes of head, ranks and client.

    It starts a service of one rank. Exit status 1 if a request failed.
    """
    check_outputs(output)
    from flexpert.bench.cost_rounds import CostLoad
    from flexpert.bench.head_cost import HeadCostPlan, head_cost_text, run_head_cost

    plan = HeadCostPlan(
        load=CostLoad(
            concurrencies=streams or (1, 16, 64, 256),
            rounds=rounds,
            answers=1,
            input_tokens=input_len,
            output_tokens=output_len,
            seed=seed,
        ),
        before=before,
        flags=("--ranks", "1", "--threads", "1", "--log-level", "warning", *(service or ())),
    )
    console = make_console(stderr=True)
    report = run_head_cost(plan, lambda line: print_note(line, console))
    show_report(report, head_cost_text(report), as_json=json_, output=output)
    if report.failed:
        raise typer.Exit(EXIT_FAILURE)
