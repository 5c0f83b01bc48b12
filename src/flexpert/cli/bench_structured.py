"""`flexpert bench structured`: what structured output costs."""

from __future__ import annotations

from typing import Annotated

import typer

from flexpert.cli.options import Json, Output, make_console, print_note
from flexpert.display.output import EXIT_FAILURE, check_outputs, show_report

STRUCTURED_EXAMPLES = (
    "flexpert bench structured",
    "flexpert bench structured --rounds 5 --output-len 256 -- --ranks 2",
)


def bench_structured(
    service: Annotated[
        list[str] | None,
        typer.Argument(metavar="[-- FLAGS]", help="More flags for the service it starts."),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Of each kind, in turn.")] = 5,
    num_prompts: Annotated[int, typer.Option(min=1, metavar="N", help="Requests of a round.")] = 32,
    concurrency: Annotated[int, typer.Option(min=1, metavar="N", help="Concurrent requests.")] = 16,
    input_len: Annotated[int, typer.Option(min=1, metavar="N", help="Tokens of a prompt.")] = 32,
    output_len: Annotated[
        int, typer.Option(min=2, metavar="N", help="Tokens of every answer.")
    ] = 128,
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of the prompts.")] = 0,
    json_: Json = False,
    output: Output = None,
) -> None:
    """Measure what structured output costs: a load without a structure and with two, in turn.

    It starts a service of one rank and thread. Exit status 1 if a request failed.
    """
    check_outputs(output)
    from flexpert.bench.structured_overhead import StructuredPlan, run_structured
    from flexpert.bench.structured_report import structured_text

    plan = StructuredPlan(
        rounds=rounds,
        count=num_prompts,
        concurrency=concurrency,
        input_tokens=input_len,
        output_tokens=output_len,
        seed=seed,
        flags=("--ranks", "1", "--threads", "1", "--log-level", "warning", *(service or ())),
    )
    console = make_console(stderr=True)
    report = run_structured(plan, lambda line: print_note(line, console))
    show_report(report, structured_text(report), as_json=json_, output=output)
    if report.failed:
        raise typer.Exit(EXIT_FAILURE)
