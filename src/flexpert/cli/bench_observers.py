"""`flexpert bench observers`: what the page, `flexpert top` and `/metrics` cost."""

from __future__ import annotations

from typing import Annotated

import typer

from flexpert.cli.options import Json, Output, make_console, print_note
from flexpert.display.output import EXIT_FAILURE, check_outputs, show_report

OBSERVERS_EXAMPLES = (
    "flexpert bench observers",
    "flexpert bench observers --observer metrics --rounds 5 -- --ranks 4",
)


def bench_observers(
    service: Annotated[
        list[str] | None,
        typer.Argument(metavar="[-- FLAGS]", help="More flags for the service."),
    ] = None,
    observer: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Who watches: page, top or metrics; may be repeated. Default: all three.",
        ),
    ] = None,
    concurrency: Annotated[
        list[int] | None,
        typer.Option(min=1, metavar="N", help="Concurrent requests; may be repeated. Default: 64."),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, metavar="N", help="Of each kind, in turn.")] = 9,
    answers: Annotated[
        int, typer.Option(min=1, metavar="N", help="Answers to each client in a round.")
    ] = 2,
    input_len: Annotated[int, typer.Option(min=1, metavar="N", help="Tokens of a prompt.")] = 32,
    output_len: Annotated[
        int, typer.Option(min=1, metavar="N", help="Tokens of every answer.")
    ] = 128,
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of the prompts.")] = 0,
    json_: Json = False,
    output: Output = None,
) -> None:
    """Measure what it costs to be watched: the same load alone and with observers, in turn.

    It starts a service of two ranks. A page reads the live stream and every 5 s the placement of a
    layer, /metrics is read every second. Exit status 1 if a request failed.
    """
    check_outputs(output)
    from flexpert.bench.cost_report import cost_text
    from flexpert.bench.cost_rounds import CostLoad
    from flexpert.bench.observers_cost import OBSERVERS, ObserversPlan, run_observers
    from flexpert.errors import ConfigError
    from flexpert.reading import shown

    for name in observer or ():
        if name not in OBSERVERS:
            raise ConfigError(f"--observer {shown(name)}: write {', '.join(OBSERVERS)}")
    plan = ObserversPlan(
        load=CostLoad(
            concurrencies=concurrency or (64,),
            rounds=rounds,
            answers=answers,
            input_tokens=input_len,
            output_tokens=output_len,
            seed=seed,
        ),
        observers=list(dict.fromkeys(observer or OBSERVERS)),
        flags=("--ranks", "2", "--threads", "1", "--log-level", "warning", *(service or ())),
    )
    console = make_console(stderr=True)
    report = run_observers(plan, lambda line: print_note(line, console))
    show_report(report, cost_text(report), as_json=json_, output=output)
    if report.failed:
        raise typer.Exit(EXIT_FAILURE)
