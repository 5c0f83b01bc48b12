"""`flexpert bench speculate`: what speculative decoding gains."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from flexpert.cli.options import Json, Output, make_console, print_note
from flexpert.display.output import EXIT_FAILURE, check_outputs, show_report

Text = Literal["repeating", "random"]

SPECULATE_EXAMPLES = (
    "flexpert bench speculate",
    "flexpert bench speculate --concurrency 1 --rounds 9 -- --deterministic",
    "flexpert bench speculate --speculate mtp --prompts prompts.txt -- --model out/tiny-mtp",
)


def bench_speculate(
    service: Annotated[
        list[str] | None,
        typer.Argument(metavar="[-- FLAGS]", help="More flags for both services."),
    ] = None,
    concurrency: Annotated[
        list[int] | None,
        typer.Option(
            min=1, metavar="N", help="Concurrent requests; may be repeated. Default: 1 and 16."
        ),
    ] = None,
    text: Annotated[
        Text | None, typer.Option(help="Answers that repeat themselves, or to random prompts only.")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Prompts in place of both: lines of text, or JSON lines."
        ),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, metavar="N", help="Of each service, in turn.")] = 5,
    answers: Annotated[
        int, typer.Option(min=1, metavar="N", help="Answers to each client in a round.")
    ] = 2,
    input_len: Annotated[int, typer.Option(min=1, metavar="N", help="Tokens of a prompt.")] = 96,
    phrase_len: Annotated[
        int, typer.Option(min=1, metavar="N", help="Tokens of what a repeating prompt repeats.")
    ] = 8,
    output_len: Annotated[
        int, typer.Option(min=2, metavar="N", help="Tokens of every answer.")
    ] = 256,
    temperature: Annotated[
        float, typer.Option(min=0.01, metavar="T", help="Where tokens are drawn.")
    ] = 0.7,
    speculate: Annotated[
        str, typer.Option(metavar="HOW", help="As `serve --speculate` takes it.")
    ] = "ngram",
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of the prompts.")] = 0,
    json_: Json = False,
    output: Output = None,
) -> None:
    """Measure what `serve --speculate` gains: the same requests without it and with it, in turn.

    It starts two services of one rank and thread, and compares their answers token by token. Exit
    status 1 if a request failed.
    """
    check_outputs(output)
    from flexpert.bench.prompts import read_prompts
    from flexpert.bench.speculation_gain import (
        FILE,
        RANDOM,
        REPEATING,
        SpeculatePlan,
        run_speculate,
    )
    from flexpert.bench.speculation_report import speculation_text

    streams = concurrency or [1, 16]
    asked = () if prompts is None else read_prompts(prompts, max(streams) * answers * (rounds + 1))
    plan = SpeculatePlan(
        texts=(FILE,) if asked else (text,) if text else (REPEATING, RANDOM),
        prompts=tuple(asked),
        concurrencies=streams,
        rounds=rounds,
        answers=answers,
        input_tokens=input_len,
        phrase_tokens=phrase_len,
        output_tokens=output_len,
        temperature=temperature,
        seed=seed,
        how=speculate,
        flags=("--ranks", "1", "--threads", "1", "--log-level", "warning", *(service or ())),
    )
    console = make_console(stderr=True)
    report = run_speculate(plan, lambda line: print_note(line, console))
    show_report(report, speculation_text(report), as_json=json_, output=output)
    if report.failed:
        raise typer.Exit(EXIT_FAILURE)
