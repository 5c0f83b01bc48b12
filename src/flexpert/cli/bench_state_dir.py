"""`flexpert bench state-dir`: what a head that could be resumed costs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flexpert.cli.options import Json, Output, make_console, print_note
from flexpert.display.output import EXIT_FAILURE, check_outputs, show_report

STATE_DIR_EXAMPLES = (
    "flexpert bench state-dir",
    "flexpert bench state-dir --folder /var/lib --concurrency 64 --rounds 9 -- --ranks 4",
)


def bench_state_dir(
    service: Annotated[
        list[str] | None,
        typer.Argument(metavar="[-- FLAGS]", help="More flags for both services."),
    ] = None,
    concurrency: Annotated[
        list[int] | None,
        typer.Option(
            min=1, metavar="N", help="Concurrent requests; may be repeated. Default: 16 and 64."
        ),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, metavar="N", help="Of each service, in turn.")] = 7,
    answers: Annotated[
        int, typer.Option(min=1, metavar="N", help="Answers to each client in a round.")
    ] = 2,
    input_len: Annotated[int, typer.Option(min=1, metavar="N", help="Tokens of a prompt.")] = 32,
    output_len: Annotated[
        int, typer.Option(min=1, metavar="N", help="Tokens of every answer.")
    ] = 128,
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of the prompts.")] = 0,
    folder: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Where the state directory is made; default: the system's for temporary files.",
        ),
    ] = None,
    json_: Json = False,
    output: Output = None,
) -> None:
    """Measure what `serve --state-dir` costs: the same load without it and with it, in turn.

    It starts two services of two ranks. Exit status 1 if a request failed.
    """
    check_outputs(output)
    from flexpert.bench.cost_report import cost_text
    from flexpert.bench.cost_rounds import CostLoad
    from flexpert.bench.state_dir_cost import StateDirPlan, run_state_dir
    from flexpert.errors import ConfigError

    if folder is not None and not folder.is_dir():
        raise ConfigError(f"--folder {str(folder)!r} is no directory")
    plan = StateDirPlan(
        load=CostLoad(
            concurrencies=concurrency or (16, 64),
            rounds=rounds,
            answers=answers,
            input_tokens=input_len,
            output_tokens=output_len,
            seed=seed,
        ),
        folder=folder,
        flags=("--ranks", "2", "--threads", "1", "--log-level", "warning", *(service or ())),
    )
    console = make_console(stderr=True)
    report = run_state_dir(plan, lambda line: print_note(line, console))
    show_report(report, cost_text(report), as_json=json_, output=output)
    if report.failed:
        raise typer.Exit(EXIT_FAILURE)
