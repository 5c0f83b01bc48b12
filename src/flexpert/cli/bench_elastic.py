"""`flexpert bench elastic`: what streams feel of ranks that join, leave and are killed."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Annotated

import typer

from flexpert.cli.options import Json, Output, duration_option, make_console, print_note
from flexpert.display.output import EXIT_FAILURE, check_outputs, show_report, write_output
from flexpert.errors import ConfigError

EXAMPLES = (
    "flexpert bench elastic",
    "flexpert bench elastic --changes 20 --kills 4 --all-killed 1 -- --kv-memory 64MiB",
    "flexpert bench elastic --kills 2 --stops 1 --swaps 2 --page elastic.html --plot elastic.png",
    "flexpert bench elastic --changes 100 --clients 64 -- --model ./model --device cuda",
    "flexpert bench elastic --path 2,4,8,3,8 --kills 2 -- --model ./model --device cuda",
)


def path_of(text: str) -> tuple[int, ...]:
    """ "2,4,3" → (2, 4, 3). Raises: ConfigError: that is no way from one number to another."""
    try:
        path = tuple(int(part) for part in text.split(","))
    except ValueError:
        path = ()
    if len(path) < 2 or min(path) < 1 or any(one == next for one, next in pairwise(path)):
        raise ConfigError(
            f"--path {text}: it takes two or more numbers of ranks, each another than the one "
            "before, as in 2,4,3"
        )
    return path


def bench_elastic(
    service: Annotated[
        list[str] | None,
        typer.Argument(metavar="[-- FLAGS]", help="More flags for the service it starts."),
    ] = None,
    changes: Annotated[int, typer.Option(min=0, help="Planned changes, up and down in turn.")] = 10,
    kills: Annotated[int, typer.Option(min=0, help="How often one rank is killed.")] = 0,
    all_killed: Annotated[
        int, typer.Option(min=0, help="How often, besides, all ranks are killed at once.")
    ] = 0,
    stops: Annotated[
        int, typer.Option(min=0, help="How often one rank is stopped for good (SIGSTOP).")
    ] = 0,
    swaps: Annotated[
        int, typer.Option(min=0, help="Changes in which a rank joins and another leaves, on --low.")
    ] = 0,
    rebalances: Annotated[
        int, typer.Option(min=0, help="How often experts are moved by their load, on --high.")
    ] = 0,
    clients: Annotated[int, typer.Option(min=1, max=1024, help="Concurrent streams.")] = 64,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of each answer.")] = 400,
    low: Annotated[int, typer.Option(min=1, help="The smaller number of ranks.")] = 1,
    high: Annotated[int, typer.Option(min=2, help="The larger number of ranks.")] = 2,
    path: Annotated[
        str | None,
        typer.Option(
            metavar="N,N[,N…]",
            help="Numbers of ranks: starts with the first, and goes to the others in turn, in "
            "place of --changes, --low and --high; kills come at the end.",
        ),
    ] = None,
    undisturbed: Annotated[
        float,
        duration_option("--undisturbed", "Time without a change first.", least=1, default="10s"),
    ] = 10.0,
    settle: Annotated[
        float, duration_option("--settle", "Rest before a change.", least=0, default="1s")
    ] = 1.0,
    page: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.html",
            help="Write a page that needs nothing else: throughput and latencies over time with "
            "the events, and a table of them.",
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE.png", help="Draw the same over time; needs matplotlib."),
    ] = None,
    json_: Json = False,
    output: Output = None,
) -> None:
    """Measure what streams feel of ranks that join, leave and are killed.

    It starts a service, measures its streams undisturbed, then through planned changes, then
    through kills. The undisturbed part is the baseline of the rest. Exit status 1 if a change
    failed or an answer was lost, or altered though the service is --deterministic.
    """
    if plot is not None:
        from flexpert.bench.comm.plot import check_plot

        check_plot(plot)
    check_outputs(output, page, plot)
    if low >= high:
        raise ConfigError(f"--low ({low}) is not below --high ({high}); raise --high")
    way = () if path is None else path_of(path)
    if way:
        changes, low, high = 0, way[0], way[-1]
    from flexpert.bench.elastic import ElasticPlan, run_elastic
    from flexpert.bench.elastic_report import elastic_text

    plan = ElasticPlan(
        clients=clients,
        tokens=tokens,
        undisturbed_s=undisturbed,
        changes=changes,
        settle_s=settle,
        low=low,
        high=high,
        kills=kills,
        all_killed=all_killed,
        swaps=swaps,
        rebalances=rebalances,
        stops=stops,
        path=way[1:],
        flags=("--ranks", str(low), "--max-ranks", str(max(low, high, *way)), *(service or ())),
    )
    console = make_console(stderr=True)
    report = run_elastic(plan, lambda line: print_note(line, console))
    if page is not None:
        from flexpert.bench.elastic_page import elastic_page

        write_output(page, elastic_page(report).encode())
    if plot is not None:
        from flexpert.bench.elastic_plot import draw_elastic

        draw_elastic(report, plot)
    show_report(report, elastic_text(report), as_json=json_, output=output)
    if report.failed_changes or report.lost or report.altered:
        raise typer.Exit(EXIT_FAILURE)
