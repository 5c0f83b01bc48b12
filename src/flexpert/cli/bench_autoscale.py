"""`flexpert bench autoscale`: what the autoscaler saves over a day, and what that costs."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from flexpert.cli.options import Json, Output, duration_option, make_console, print_note
from flexpert.display.output import EXIT_FAILURE, check_outputs, show_report
from flexpert.errors import ConfigError

EXAMPLES = (
    "flexpert bench autoscale",
    "flexpert bench autoscale --quick",
    "flexpert bench autoscale --kills 2 --output day.json",
    "flexpert bench autoscale --at-once --max 4 --larger-model",
    "flexpert bench autoscale --max 8 --peak 40 --goodput 'ttft:800 itl:60' -- --model ./model",
)

_QUICK_S = 15.0
_DAY_S = 180.0


def bench_autoscale(
    service: Annotated[
        list[str] | None,
        typer.Argument(metavar="[-- FLAGS]", help="More flags for the services it starts."),
    ] = None,
    duration: Annotated[
        float,
        duration_option("--duration", "The length of the day.", least=5, default="3m"),
    ] = _DAY_S,
    most: Annotated[
        int | None,
        typer.Option(
            "--max",
            min=2,
            max=64,
            metavar="N",
            help="The largest number of ranks; default: one a core, 2 to 4.",
        ),
    ] = None,
    max_running: Annotated[
        int, typer.Option(min=1, metavar="N", help="Requests that a rank runs at once.")
    ] = 4,
    peak: Annotated[
        float | None,
        typer.Option(
            min=0.1,
            metavar="R",
            help="Requests a second at noon; default: 0.9 of what ranks can take.",
        ),
    ] = None,
    goodput: Annotated[
        str | None,
        typer.Option(
            metavar="GOALS",
            help="Goals of each request in milliseconds, 'ttft:500 itl:50'; default: by what was "
            "measured of full ranks.",
        ),
    ] = None,
    autoscale: Annotated[
        str,
        typer.Option(
            metavar="GOALS",
            help="The autoscaler's goals, 'ttft_p99=0.3s,itl_p99=50ms'; default: half of the "
            "clients' time to the first token.",
        ),
    ] = "",
    kills: Annotated[
        int,
        typer.Option(
            min=0,
            max=100,
            metavar="N",
            help="One more service scales itself, whose ranks are killed so often.",
        ),
    ] = 0,
    input_len: Annotated[int, typer.Option(min=1, metavar="N", help="Tokens of a prompt.")] = 32,
    output_len: Annotated[int, typer.Option(min=1, metavar="N", help="Tokens of an answer.")] = 64,
    settle: Annotated[
        float | None,
        duration_option(
            "--settle",
            "The autoscaler's: a smaller number must have sufficed for so long.",
            least=0.1,
            default="1/40 of the day",
        ),
    ] = None,
    at_once: Annotated[
        bool,
        typer.Option(
            "--at-once",
            help="All services at the same time, each on cores of its own: --max and two more.",
        ),
    ] = False,
    larger_model: Annotated[
        bool,
        typer.Option(
            "--larger-model",
            help="A random model of some 0.1 billion parameters, of which one head serves more "
            "ranks than of the embedded one.",
        ),
    ] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="A day of 15 s: does it work? Figures say little.")
    ] = False,
    seed: Annotated[int, typer.Option(metavar="N", help="Of prompts, arrivals and kills.")] = 0,
    json_: Json = False,
    output: Output = None,
) -> None:
    """Serve a day's load three times: with all ranks, with the autoscaler, and with foresight.

    With --kills a fourth time, with the autoscaler while ranks are killed.

    Few requests at night, a rise in the morning, peaks at noon and in the evening, in three
    minutes. First it measures what ranks can take; that sets the load and the goals. Exit status 1
    if a request was lost, or altered.
    """
    from flexpert.bench.day_cores import divide_cores
    from flexpert.bench.day_plan import DayPlan
    from flexpert.bench.day_report import days_text
    from flexpert.bench.day_run import run_days, services
    from flexpert.bench.goodput import parse_goodput
    from flexpert.cluster.autoscaler import parse_goals

    goals = parse_goodput([goodput] if goodput is not None else ())
    if goodput is not None and not goals:
        raise ConfigError("--goodput names no goal; write for example --goodput 'ttft:500 itl:50'")
    most = most or min(4, max(2, len(os.sched_getaffinity(0))))
    parse_goals(autoscale, most)
    check_outputs(output)
    seconds = _QUICK_S if quick else duration
    plan = DayPlan(
        seconds=seconds,
        most=most,
        max_running=max_running,
        input_tokens=input_len,
        output_tokens=output_len,
        peak=peak,
        goals_ms=goals,
        calibrate_s=1.5 if quick else 8.0,
        settle_s=settle or max(0.5, seconds / 40),
        every_s=max(0.25, seconds / 360),
        autoscale=autoscale,
        kills=kills,
        seed=seed,
        larger_model=larger_model,
        flags=tuple(service or ()),
    )
    groups = divide_cores(services(plan), most) if at_once else ()
    console = make_console(stderr=True)
    report = run_days(plan, lambda line: print_note(line, console), groups=groups)
    show_report(report, days_text(report), as_json=json_, output=output)
    if report.harmed:
        raise typer.Exit(EXIT_FAILURE)
