"""`flexpert bench load`: how fast ranks load a checkpoint, beside dd."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from typing import Annotated, Literal

import typer

from flexpert.cli.options import Json, Output, make_console, print_note
from flexpert.config import parse_bytes
from flexpert.display.output import EXIT_FAILURE, check_outputs, show_report
from flexpert.errors import ConfigError

EXAMPLES = (
    "flexpert bench load ./olmoe",
    "flexpert bench load --random 15GB --folder /data",
    "flexpert bench load ./olmoe --ranks 4 --cache cold --repeats 5 --output load.json",
)


def bench_load(
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="A checkpoint's directory.", show_default=False),
    ] = None,
    random: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Instead of MODEL: one with random weights, in layers of Qwen3-30B-A3B (2.5 GB "
            "with one), deleted at the end.",
        ),
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Where that is written; default: for temporary files."),
    ] = None,
    ranks: Annotated[
        int, typer.Option(min=1, max=64, help="Processes that share the experts.")
    ] = 2,
    repeats: Annotated[int, typer.Option(min=1, help="Turns of each kind.")] = 3,
    cache: Annotated[
        Literal["both", "cold", "warm"], typer.Option(help="What the page cache has of the files.")
    ] = "both",
    dtype: Annotated[
        Literal["auto", "bfloat16", "float32"], typer.Option(help="Arithmetic and weights.")
    ] = "auto",
    map_experts: Annotated[
        Literal["auto", "on", "off"], typer.Option(help="As `serve --map-experts`.")
    ] = "auto",
    json_: Json = False,
    output: Output = None,
) -> None:
    """Measure how fast CPU ranks open, check and load a checkpoint, in turn with dd.

    A cold turn begins with files that are dropped from the page cache, a warm one with files that
    were just read. Exit status 1 if a rank had more memory than is planned.
    """
    if (model is None) == (random is None):
        raise ConfigError("name a checkpoint's directory, or --random SIZE")
    nbytes = None if random is None else _size(random)
    check_outputs(output)
    from flexpert.bench.checkpoint_loading import LoadPlan, run_loading
    from flexpert.bench.checkpoint_loading_report import loading_text

    caches: tuple[Literal["cold", "warm"], ...] = ("cold", "warm") if cache == "both" else (cache,)
    console = make_console(stderr=True)

    def note(line: str) -> None:
        print_note(line, console)

    with contextlib.ExitStack() as stack:
        if nbytes is not None:
            from flexpert.bench.random_checkpoint import make_random_checkpoint

            note(f"writing a checkpoint of {random}")
            model = stack.enter_context(tempfile.TemporaryDirectory("-flexpert-load", dir=folder))
            make_random_checkpoint(Path(model), nbytes)
        assert model is not None  # by the check above
        report = run_loading(LoadPlan(model, ranks, repeats, caches, dtype, map_experts), note)
    show_report(report, loading_text(report), as_json=json_, output=output)
    if not report.within_plan:
        raise typer.Exit(EXIT_FAILURE)


def _size(text: str) -> int:
    try:
        size = parse_bytes(text)
    except ValueError as error:
        raise ConfigError(f"--random: {error}") from None
    if not isinstance(size, int) or size < 1:
        raise ConfigError(f"--random {text} is no size; write 15GB")
    return size
