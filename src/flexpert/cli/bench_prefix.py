"""`flexpert bench prefix`: routing by prefix against routing by the fewest requests."""

from __future__ import annotations

from typing import Annotated

import typer

from flexpert.cli.options import Json, Output, make_console, print_note
from flexpert.display.output import EXIT_FAILURE, check_outputs, show_report

PREFIX_EXAMPLES = (
    "flexpert bench prefix",
    "flexpert bench prefix --prefix-len 256 -- --kv-memory 256MiB",
)

SMALL_CACHES = ("--threads", "1", "--kv-memory", "32MiB", "--log-level", "warning")


def bench_prefix(
    service: Annotated[
        list[str] | None,
        typer.Argument(metavar="[-- FLAGS]", help="More flags for the services it starts."),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Of each routing, in turn.")] = 3,
    ranks: Annotated[int, typer.Option(min=2, max=256, metavar="N", help="Before one leaves.")] = 4,
    groups: Annotated[int, typer.Option(min=1, metavar="N", help="Prefixes that are shared.")] = 16,
    prompts: Annotated[int, typer.Option(min=2, metavar="N", help="Of each group.")] = 32,
    conversations: Annotated[int, typer.Option(min=1, metavar="N", help="At a time.")] = 16,
    turns: Annotated[int, typer.Option(min=2, metavar="N", help="Of each conversation.")] = 8,
    prefix_len: Annotated[
        int, typer.Option(min=1, metavar="N", help="Tokens of a prefix, or a first turn's.")
    ] = 1536,
    input_len: Annotated[
        int, typer.Option(min=1, metavar="N", help="Tokens that a prompt or turn adds.")
    ] = 32,
    output_len: Annotated[int, typer.Option(min=1, metavar="N", help="Tokens of an answer.")] = 8,
    concurrency: Annotated[int, typer.Option(min=1, metavar="N", help="Concurrent requests.")] = 16,
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of the prompts.")] = 0,
    json_: Json = False,
    output: Output = None,
) -> None:
    """Measure requests that share prefixes, routed by prefix and by the fewest, in turn.

    It starts a service for each, and in the middle of every round one of the ranks leaves. By
    default a rank's KV cache holds ten of the prefixes. Exit status 1 if a request failed.
    """
    check_outputs(output)
    from flexpert.bench.prefix import PrefixPlan, run_prefix
    from flexpert.bench.prefix_report import prefix_text

    plan = PrefixPlan(
        rounds=rounds,
        groups=groups,
        prompts=prompts,
        conversations=conversations,
        turns=turns,
        prefix_tokens=prefix_len,
        own_tokens=input_len,
        output_tokens=output_len,
        concurrency=concurrency,
        ranks=ranks,
        seed=seed,
        flags=(*SMALL_CACHES, *(service or ())),
    )
    console = make_console(stderr=True)
    report = run_prefix(plan, lambda line: print_note(line, console))
    show_report(report, prefix_text(report), as_json=json_, output=output)
    if report.failed:
        raise typer.Exit(EXIT_FAILURE)
