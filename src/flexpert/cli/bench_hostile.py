"""`flexpert bench hostile`: what well-behaved streams lose to the nastiest bodies."""

from __future__ import annotations

from typing import Annotated

import typer

from flexpert.cli.options import Json, Output, duration_option, make_console, print_note
from flexpert.config import Config, parse_bytes
from flexpert.display.output import EXIT_FAILURE, check_outputs, show_report
from flexpert.errors import ConfigError

EXAMPLES = (
    "flexpert bench hostile",
    "flexpert bench hostile --duration 10s --max-body 1MiB --output hostile.json",
    "flexpert bench hostile --clients 64 -- --ranks 2 --max-ranks 2",
)


def bench_hostile(
    service: Annotated[
        list[str] | None,
        typer.Argument(metavar="[-- FLAGS]", help="More flags for the service it starts."),
    ] = None,
    duration: Annotated[
        float,
        duration_option("--duration", "Time with clients of each kind.", least=0.5, default="60s"),
    ] = 60.0,
    streams: Annotated[
        int, typer.Option(min=1, help="Well-behaved streams, whose speed is measured.")
    ] = 4,
    clients: Annotated[
        int, typer.Option(min=1, max=1024, help="Concurrent clients of each kind.")
    ] = 16,
    max_body: Annotated[
        str, typer.Option(metavar="SIZE", help="Size of the largest body, and the service's limit.")
    ] = "16MiB",
    after: Annotated[
        float,
        duration_option(
            "--after", "Time until memory is read again.", least=0, most=3600, default="10s"
        ),
    ] = 10.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of bodies and their order.")] = 0,
    json_: Json = False,
    output: Output = None,
) -> None:
    """Measure what streams lose to clients that send the nastiest bodies.

    It starts a service with the embedded model and measures a few streams twice: with ordinary
    clients (short prompts, streamed), then with as many that send heavy and odd bodies without a
    pause; and the memory of the serving process before, meanwhile and after. Exit status 1 if
    anything was answered with a 5xx, or one of the streams failed.
    """
    check_outputs(output)
    from flexpert.bench.hostile import HostilePlan, run_hostile
    from flexpert.bench.hostile_report import hostile_text

    plan = HostilePlan(
        duration_s=duration,
        streams=streams,
        clients=clients,
        max_body=_size(max_body),
        seed=seed,
        after_s=after,
        flags=tuple(service or ()),
    )
    console = make_console(stderr=True)
    report = run_hostile(plan, lambda line: print_note(line, console))
    show_report(report, hostile_text(report), as_json=json_, output=output)
    failed = report.ordinary.stream_errors or report.hostile.stream_errors
    if report.server_errors or failed:
        raise typer.Exit(EXIT_FAILURE)


def _size(text: str) -> int:
    """Raises: ConfigError"""
    try:
        size = parse_bytes(text)
    except ValueError as error:
        raise ConfigError(f"--max-body: {error}") from None
    most = Config().server.max_body
    if not isinstance(size, int) or not 2**10 <= size <= most:
        raise ConfigError(f"--max-body must be between 1KiB and {most >> 20}MiB")
    return size
