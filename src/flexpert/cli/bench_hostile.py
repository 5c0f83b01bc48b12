"""`flexpert bench hostile`: what well-behaved streams lose to the nastiest bodies."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from flexpert.cli.command import Json, Output, duration
from flexpert.config import Config, parse_bytes
from flexpert.display.output import EXIT_FAILURE, check_outputs, show_report
from flexpert.errors import ConfigError

if TYPE_CHECKING:
    from flexpert.bench.hostile import HostileMeasured, HostileReport

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
        typer.Option(
            metavar="DURATION",
            parser=duration("--duration", 0.5),
            help="Time with clients of each kind.",
        ),
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
        typer.Option(
            metavar="DURATION",
            parser=duration("--after", 0, 3600),
            help="Time until memory is read again.",
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
    from rich.console import Console

    from flexpert.bench.hostile import HostilePlan, run_hostile

    plan = HostilePlan(
        duration_s=duration,
        streams=streams,
        clients=clients,
        max_body=_size(max_body),
        seed=seed,
        after_s=after,
        flags=tuple(service or ()),
    )
    console = Console(stderr=True)

    def note(line: str) -> None:
        console.print(line, style="dim", highlight=False, soft_wrap=True, markup=False)

    report = run_hostile(plan, note)
    show_report(report, _text(report), as_json=json_, output=output)
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


def _text(report: HostileReport) -> Any:
    from rich.table import Table

    from flexpert.bench.hostile import WANTED_GROWTH_MIB, WANTED_RATIO

    title = f"{report.streams} streams with {report.clients} clients, {report.duration_s:g} s"
    table = Table(title=title, caption=report.machine.line())
    for name in ("", "ordinary", "hostile"):
        table.add_column(name, justify="right" if name else "left")

    def row(name: str, of: Any) -> None:
        table.add_row(name, of(report.ordinary), of(report.hostile))

    row("tokens/s of the streams", lambda m: f"{m.tokens_per_s:.0f}")
    row("longest gap in an answer", lambda m: f"{m.longest_gap_ms:.0f} ms")
    row("longest wait for a first token", lambda m: f"{m.longest_first_ms:.0f} ms")
    row("streams that failed", _errors)
    row("answers to the clients, by status", _statuses)
    row("slowest of them", lambda m: f"{m.clients.slowest_s:.2f} s")
    row("bodies sent", lambda m: f"{m.clients.sent_mib:.0f} MiB")
    row("the clients' own CPU time", lambda m: f"{m.clients.cpu_s:.1f} s")
    row("the head's share of a core", lambda m: f"{m.head_cpu:.0%}")
    row("load average", lambda m: f"{m.load:.2f}")
    memory = report.memory
    table.add_section()
    table.add_row("ratio", "", f"{report.ratio:.2f} (desired: {WANTED_RATIO} at least)")
    table.add_row("head's memory before", "", f"{memory.before:.0f} MiB")
    table.add_row("  highest", "", f"{memory.highest:.0f} MiB")
    table.add_row(
        "  after", "", f"{memory.growth:+.0f} MiB (desired: within {WANTED_GROWTH_MIB:.0f})"
    )
    table.add_row("its helpers, highest", "", f"{memory.helpers_highest:.0f} MiB")
    for kind in (report.ordinary, report.hostile):
        for path, words in kind.clients.failed.items():
            table.add_row(f"5xx of {path}", "", words)
    return table


def _statuses(measured: HostileMeasured) -> str:
    found = measured.clients.statuses
    broken = {"broken": measured.clients.broken} if measured.clients.broken else {}
    return "\n".join(f"{status}: {count}" for status, count in {**found, **broken}.items())


def _errors(measured: HostileMeasured) -> str:
    return "; ".join(measured.stream_errors) or "0"
