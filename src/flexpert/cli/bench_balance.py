"""`flexpert bench balance`: placement of experts by load."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flexpert.cli.options import Json, Output, make_console, print_note
from flexpert.display.output import check_outputs, show_report
from flexpert.errors import ConfigError

EXAMPLES = (
    "flexpert bench balance",
    "flexpert bench balance --layers 4 --windows 8",
    "flexpert bench balance --trace routing.jsonl --ranks 4 --redundant 16",
)


def bench_balance(
    ranks: Annotated[int, typer.Option(min=1, max=4096, help="That hold the experts.")] = 8,
    redundant: Annotated[
        int, typer.Option(min=0, max=2**20, metavar="N", help="Replicas beyond one of each.")
    ] = 32,
    layers: Annotated[int, typer.Option(min=1, max=1024, help="Of the traces made here.")] = 58,
    experts: Annotated[int, typer.Option(min=1, max=4096, help="Of each layer.")] = 256,
    windows: Annotated[int, typer.Option(min=2, max=1000, help="Of each trace.")] = 5,
    trace: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Recorded by --record-routing, in place of made ones."),
    ] = None,
    scale: Annotated[bool, typer.Option(help="Measure 16 → 24 → 16 ranks, too.")] = True,
    speed: Annotated[bool, typer.Option(help="Measure plans for 64 and 1,024 ranks, too.")] = True,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Of the traces.")] = 0,
    json_: Json = False,
    output: Output = None,
) -> None:
    """Plan placements for loads of experts, and compare them with others.

    Loads are made from a seed: uniform, Zipf, drifting, in bursts by topic; or they were recorded.
    Each window is planned for from the placement of the one before, and judged on itself and on the
    next, beside no balancing and a packing from scratch. Nothing is served.
    """
    check_outputs(output)
    import numpy as np

    from flexpert.bench.balancing.balance_report import balance_text
    from flexpert.bench.balancing.balance_run import SCALED, SCALED_SLOTS, run_balance
    from flexpert.bench.balancing.routing_traces import TRACES, recorded

    if trace is not None:
        traces = {trace.name: recorded(trace)}
        scale = speed = False
    else:
        if scale and experts > min(SCALED) * SCALED_SLOTS:
            raise ConfigError(
                f"--experts {experts}: 16 ranks of {SCALED_SLOTS} slots hold fewer; add --no-scale"
            )
        traces = {
            name: make(np.random.default_rng(seed), windows, layers, experts)
            for name, make in TRACES.items()
        }
    console = make_console(stderr=True)
    report = run_balance(
        traces,
        ranks=ranks,
        redundant=redundant,
        seed=seed,
        scale=scale,
        speed=speed,
        note=lambda line: print_note(line, console),
    )
    show_report(report, balance_text(report), as_json=json_, output=output)
