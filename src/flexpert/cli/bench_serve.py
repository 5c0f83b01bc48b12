"""`flexpert bench serve`: a service under load."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from flexpert.cli.bench_llama import LLAMA, check_llama_flags, compare_with_llama
from flexpert.cli.command import Command
from flexpert.cli.options import ApiKey, Json, Output, make_console, print_note
from flexpert.display.output import EXIT_FAILURE, check_outputs, show_report
from flexpert.errors import ConfigError

BENCH_SERVE_EXAMPLES = (
    "flexpert bench serve",
    "flexpert bench serve --compare transformers --ranks 1 --concurrency 16",
    "flexpert bench serve --compare llama.cpp --llama-server ./llama-server --threads 2",
    "flexpert bench serve --url http://127.0.0.1:8000 --request-rate 4 --num-prompts 200",
    "flexpert bench serve --prompts prompts.jsonl --output result.json",
    "flexpert bench serve --model ./model --against http://127.0.0.1:8001 --rounds 5",
    "flexpert bench serve --ranks 2 -- --deterministic --max-running 32",
    "flexpert bench serve --request-rate 8 --burstiness 0.5 --goodput ttft:500 itl:50",
    "flexpert bench serve --ramp linear:1:16 --num-prompts 300",
    "flexpert bench serve --trace conversation_trace.jsonl --trace-speedup 10 --num-prompts 500",
    'flexpert bench serve --request-rate 8 --num-prompts 300 --event "t=10 scale 3" '
    '--event "t=25 kill 0"',
)


class BenchServeCommand(Command):
    """Lets `--goodput` take several goals, as vLLM's does."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, spread_goals(args))


def spread_goals(arguments: list[str]) -> list[str]:
    """["--goodput", "ttft:500", "itl:50"] → ["--goodput", "ttft:500", "--goodput", "itl:50"]."""
    spread: list[str] = []
    taking = False
    for argument in arguments:
        if argument == "--goodput":
            taking = True
        elif taking and re.fullmatch(r"[a-z0-9]+:[^ ]*", argument):
            if spread[-1] != "--goodput":
                spread.append("--goodput")
        else:
            taking = False
        spread.append(argument)
    return spread


def bench_serve(
    service: Annotated[
        list[str] | None,
        typer.Argument(metavar="[-- FLAGS]", help="More flags for the service it starts."),
    ] = None,
    url: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Measure this service instead of a new one."),
    ] = None,
    api_key: ApiKey = None,
    model: Annotated[str, typer.Option(help="Model of the service it starts.")] = "tiny",
    ranks: Annotated[int, typer.Option(min=1, help="Ranks of the service it starts.")] = 1,
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="Threads per rank, and of whom it is compared with; default: 1."),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Prompts: lines of text, or JSON lines with 'prompt'."),
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Requests with the times and lengths of a trace: Mooncake's JSON lines "
            "(timestamp, input_length, output_length, hash_ids), or BurstGPT's CSV (Timestamp, "
            "Request tokens, Response tokens).",
        ),
    ] = None,
    trace_speedup: Annotated[
        float,
        typer.Option(min=0.001, metavar="X", help="With --trace: so many times as fast."),
    ] = 1.0,
    num_prompts: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="How many requests; default: 64, or the whole trace."
        ),
    ] = None,
    input_len: Annotated[
        int, typer.Option(min=1, metavar="N", help="Tokens of a random prompt.")
    ] = 128,
    output_len: Annotated[
        int, typer.Option(min=1, metavar="N", help="Tokens of every answer.")
    ] = 128,
    temperature: Annotated[
        float,
        typer.Option(
            min=0, metavar="T", help="Of every answer; at 0 random models repeat one token."
        ),
    ] = 0.0,
    concurrency: Annotated[
        list[int] | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Concurrent requests; default: 16. With --compare llama.cpp it may be repeated; "
            "default there: 1, 4 and 16.",
        ),
    ] = None,
    request_rate: Annotated[
        float | None,
        typer.Option(
            min=0.001,
            metavar="R",
            help="Instead: R requests per second arrive, Poisson-distributed.",
        ),
    ] = None,
    ramp: Annotated[
        str | None,
        typer.Option(
            metavar="linear:A:B",
            help="Instead: the rate goes from A to B a second over the run; also exponential:A:B.",
        ),
    ] = None,
    burstiness: Annotated[
        float | None,
        typer.Option(
            min=0.01,
            max=1e6,
            metavar="G",
            help="Of arrivals: the shape of a gamma distribution. 1 (default) is Poisson, less "
            "comes in bursts, more is more even.",
        ),
    ] = None,
    goodput: Annotated[
        list[str] | None,
        typer.Option(
            metavar="GOALS",
            help="Count the requests that keep to all of these milliseconds: ttft:500 itl:50; "
            "also tpot and e2el.",
        ),
    ] = None,
    event: Annotated[
        list[str] | None,
        typer.Option(
            metavar="EVENT",
            help="What is done to the service meanwhile: 't=20 scale 4' after 20 s; also remove "
            "ID..., kill ID, rebalance. Repeatable.",
        ),
    ] = None,
    warmup: Annotated[int, typer.Option(min=0, metavar="N", help="Uncounted requests before.")] = 8,
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of prompts and arrivals.")] = 0,
    compare: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Same prompts, threads and dtype through transformers alone, or in turn through "
            "the server of llama.cpp.",
        ),
    ] = None,
    llama_server: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="With --compare llama.cpp: the program llama-server."),
    ] = None,
    pairs: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="With --compare llama.cpp: turns of each at each concurrency; default: 5.",
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Another OpenAI server of this machine with the same model (vLLM, SGLang): both "
            "in turn, and the ratio.",
        ),
    ] = None,
    against_key: Annotated[
        str | None, typer.Option(metavar="KEY", help="That server's key, if it asks for one.")
    ] = None,
    rounds: Annotated[
        int, typer.Option(min=1, metavar="N", help="With --against: turns of each.")
    ] = 3,
    json_: Json = False,
    output: Output = None,
) -> None:
    """Measure a service: throughput, time to first token, inter-token latency, end to end.

    Exit status 1 if a request failed, or an event did not come to a good end.
    """
    from flexpert.bench.arrival_times import RateRamp
    from flexpert.bench.goodput import parse_goodput
    from flexpert.bench.load import Target
    from flexpert.bench.offered_load import OfferedLoad
    from flexpert.bench.serve import ServeMeasured, run_against, run_bench
    from flexpert.bench.timed_events import parse_event
    from flexpert.bench.traffic_trace import read_trace
    from flexpert.display.render import figures_text

    if compare not in (None, "transformers", LLAMA):
        raise ConfigError(f"--compare {compare}: only 'transformers' and '{LLAMA}' are known")
    if url is not None and (service or compare):
        what = "flags of a service" if service else "--compare"
        raise ConfigError(f"{what} can only be had with a service of our own; leave out --url")
    if compare and against:
        raise ConfigError("--compare and --against are two measurements; leave one out")
    check_arrivals(trace, trace_speedup, prompts, request_rate, ramp, burstiness)
    if compare and (trace or event):
        raise ConfigError("--compare goes with neither --trace nor --event")
    check_llama_flags(
        compare,
        {"--llama-server": llama_server, "--pairs": pairs},
        {
            "--request-rate": request_rate,
            "--ramp": ramp,
            "--goodput": goodput,
            "--temperature": temperature,
        },
        concurrency,
    )
    if against and event:
        raise ConfigError("--against goes with no --event: the other server knows none")
    goals = parse_goodput(goodput or ())
    if goodput and not goals:
        raise ConfigError("--goodput names no goal; write for example --goodput ttft:500 itl:50")
    events = [parse_event(text) for text in event or ()]
    check_outputs(output)
    recorded = None
    if trace is not None:
        recorded = read_trace(trace, count=num_prompts, speedup=trace_speedup)
    load = OfferedLoad(
        prompts=prompts,
        trace=recorded,
        trace_speedup=trace_speedup,
        count=len(recorded.requests) if recorded else num_prompts or 64,
        input_tokens=input_len,
        output_tokens=output_len,
        concurrency=concurrency[0] if concurrency else 16,
        request_rate=request_rate,
        ramp=RateRamp.parse(ramp) if ramp else None,
        burstiness=burstiness or 1.0,
        temperature=temperature,
        warmup=warmup,
        seed=seed,
    )
    measured = ServeMeasured(
        url=url, key=api_key, model=model, ranks=ranks, threads=threads, flags=tuple(service or ())
    )
    console = make_console(stderr=True)

    def note(line: str) -> None:
        print_note(line, console)

    if compare == LLAMA:
        compare_with_llama(
            load,
            measured,
            llama_server,
            streams=concurrency or (1, 4, 16),
            pairs=pairs or 5,
            requests=num_prompts,
            as_json=json_,
            output=output,
        )
        return
    if against is None:
        report = run_bench(
            load, measured, compare=compare is not None, note=note, goals=goals, events=events
        )
    else:
        other = Target.parse(against, against_key)
        report = run_against(load, measured, other, against, rounds, note, goals)
    show_report(report, figures_text(report), as_json=json_, output=output)
    failed = report.service.failed or (report.against and report.against.failed)
    if failed or any(outcome.failed for outcome in report.events):
        raise typer.Exit(EXIT_FAILURE)


def check_arrivals(
    trace: Path | None,
    trace_speedup: float,
    prompts: Path | None,
    request_rate: float | None,
    ramp: str | None,
    burstiness: float | None,
) -> None:
    """Raises: ConfigError: these do not go together."""
    named = {
        "--trace": trace is not None,
        "--request-rate": request_rate is not None,
        "--ramp": ramp is not None,
    }
    chosen = [flag for flag, given in named.items() if given]
    if len(chosen) > 1:
        raise ConfigError(f"{' and '.join(chosen)}: each says when requests arrive; leave one out")
    if trace and prompts:
        raise ConfigError("--trace and --prompts: each says what is asked; leave one out")
    if trace is None and trace_speedup != 1.0:
        raise ConfigError("--trace-speedup is of a --trace")
    if burstiness is not None and not (request_rate or ramp):
        raise ConfigError("--burstiness is of arrivals: give --request-rate or --ramp, too")
