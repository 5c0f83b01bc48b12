"""`flexpert bench transport`."""

from __future__ import annotations

from typing import Annotated

import typer

from flexpert.cli.options import Json, Output, make_console, print_note
from flexpert.display.output import check_outputs, show_report

TRANSPORT_EXAMPLES = (
    "flexpert bench transport --ranks 2",
    "flexpert bench transport --ranks 4 --rounds 6 -- --model ./olmoe",
)


def bench_transport(
    service: Annotated[
        list[str] | None,
        typer.Argument(metavar="[-- FLAGS]", help="More flags for both services."),
    ] = None,
    ranks: Annotated[int, typer.Option(min=2, help="Ranks of each service.")] = 2,
    rounds: Annotated[int, typer.Option(min=1, help="How often each is measured.")] = 4,
    requests: Annotated[int, typer.Option(min=1, help="Requests of one measurement.")] = 64,
    concurrency: Annotated[int, typer.Option(min=1, help="Concurrent requests.")] = 16,
    json_: Json = False,
    output: Output = None,
) -> None:
    """Measure a service through NIXL against one through shared memory, in turn.

    Both run on this machine, with ranks of their own.
    """
    check_outputs(output)
    from flexpert.bench.offered_load import OfferedLoad
    from flexpert.bench.transport_comparison import TransportPlan, run_transport, transport_text

    load = OfferedLoad(
        prompts=None,
        count=requests,
        input_tokens=64,
        output_tokens=64,
        concurrency=concurrency,
        request_rate=None,
        warmup=8,
        seed=0,
    )
    plan = TransportPlan(ranks=ranks, rounds=rounds, load=load, flags=tuple(service or ()))
    console = make_console(stderr=True)
    report = run_transport(plan, lambda line: print_note(line, console))
    show_report(report, transport_text(report), as_json=json_, output=output)
