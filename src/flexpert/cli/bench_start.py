"""`flexpert bench start`: how long a service takes until it is ready."""

from __future__ import annotations

from typing import Annotated

import typer

from flexpert.cli.options import Json, Output, make_console, print_note
from flexpert.display.output import check_outputs, show_report

START_EXAMPLES = (
    "flexpert bench start",
    "flexpert bench start --starts 9 -- ./olmoe --ranks 4",
)


def bench_start(
    service: Annotated[
        list[str] | None,
        typer.Argument(metavar="[-- FLAGS]", help="Flags of the service."),
    ] = None,
    starts: Annotated[int, typer.Option(min=1, metavar="N", help="One after the other.")] = 5,
    json_: Json = False,
    output: Output = None,
) -> None:
    """Measure the start of a service: the time until it is ready, and its processes then.

    It starts 'flexpert serve' several times, without flags with the embedded model on one rank.
    """
    check_outputs(output)
    from flexpert.bench.service_start import run_starts
    from flexpert.bench.start_report import start_text

    console = make_console(stderr=True)
    report = run_starts(starts, service or [], lambda line: print_note(line, console))
    show_report(report, start_text(report), as_json=json_, output=output)
