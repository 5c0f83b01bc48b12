"""`flexpert check`: what `flexpert serve` with the same flags would do."""

from __future__ import annotations

from typing import Annotated

import typer

from flexpert.cli.options import Json
from flexpert.cli.serve_command import ServeCommand
from flexpert.cli.settings import with_settings
from flexpert.config import Config

CHECK_EXAMPLES = (
    "flexpert check ./olmoe --ranks 4",
    "flexpert check ./qwen3-fp8 --device cuda --ranks 2 --max-ranks 4 --json",
    "flexpert check ./mixtral --read-weights",
)


class CheckCommand(ServeCommand):
    """Takes what `flexpert serve` takes."""

    interruptible = True


@with_settings
def check(
    config: Config,
    read_weights: Annotated[
        bool,
        typer.Option(
            "--read-weights",
            help="Read all weights, too, and name one that is not finite; takes as long as loading",
        ),
    ] = False,
    json_: Json = False,
) -> None:
    """Say what serving a model with these settings would do, and why; nothing is started.

    Every tensor of the checkpoint is accounted for: used, skipped with the reason, or what it is
    refused for. Takes the flags of 'flexpert serve'. Exit status: 0 it would be served, 1 it is
    refused, 2 wrong settings.
    """
    from flexpert.cluster.model_check import check_model
    from flexpert.display.model_check_text import check_text
    from flexpert.display.output import EXIT_FAILURE, show_report

    found = check_model(config, read_weights=read_weights)
    show_report(found, check_text(found), as_json=json_, output=None)
    raise typer.Exit(0 if found.served else EXIT_FAILURE)
