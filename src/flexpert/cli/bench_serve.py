"""`flexpert bench serve`: a service under load."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flexpert.cli.options import ApiKey, Json, Output, make_console, print_note
from flexpert.display.output import EXIT_FAILURE, check_outputs, show_report
from flexpert.errors import ConfigError

BENCH_SERVE_EXAMPLES = (
    "flexpert bench serve",
    "flexpert bench serve --compare transformers --ranks 1 --concurrency 16",
    "flexpert bench serve --url http://127.0.0.1:8000 --request-rate 4 --num-prompts 200",
    "flexpert bench serve --prompts prompts.jsonl --output result.json",
    "flexpert bench serve --model ./model --against http://127.0.0.1:8001 --rounds 5",
    "flexpert bench serve --ranks 2 -- --deterministic --max-running 32",
)


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
        typer.Option(min=1, help="Threads per rank, and of transformers; default: 1."),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Prompts: lines of text, or JSON lines with 'prompt'."),
    ] = None,
    num_prompts: Annotated[int, typer.Option(min=1, metavar="N", help="How many requests.")] = 64,
    input_len: Annotated[
        int, typer.Option(min=1, metavar="N", help="Tokens of a random prompt.")
    ] = 128,
    output_len: Annotated[
        int, typer.Option(min=1, metavar="N", help="Tokens of every answer.")
    ] = 128,
    concurrency: Annotated[int, typer.Option(min=1, metavar="N", help="Concurrent requests.")] = 16,
    request_rate: Annotated[
        float | None,
        typer.Option(
            min=0.001,
            metavar="R",
            help="Instead: R requests per second arrive, Poisson-distributed.",
        ),
    ] = None,
    warmup: Annotated[int, typer.Option(min=0, metavar="N", help="Uncounted requests before.")] = 8,
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of prompts and arrivals.")] = 0,
    compare: Annotated[
        str | None,
        typer.Option(
            metavar="transformers",
            help="Same prompts, threads and dtype through transformers alone.",
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
    """Measure a service: throughput, time to first token, inter-token latency, end to end."""
    from flexpert.bench.load import Target
    from flexpert.bench.serve import OfferedLoad, ServeMeasured, run_against, run_bench
    from flexpert.display.render import figures_text

    if compare not in (None, "transformers"):
        raise ConfigError(f"--compare {compare}: only 'transformers' is known")
    if url is not None and (service or compare):
        what = "flags of a service" if service else "--compare"
        raise ConfigError(f"{what} can only be had with a service of our own; leave out --url")
    if compare and against:
        raise ConfigError("--compare and --against are two measurements; leave one out")
    check_outputs(output)
    load = OfferedLoad(
        prompts=prompts,
        count=num_prompts,
        input_tokens=input_len,
        output_tokens=output_len,
        concurrency=concurrency,
        request_rate=request_rate,
        warmup=warmup,
        seed=seed,
    )
    measured = ServeMeasured(
        url=url, key=api_key, model=model, ranks=ranks, threads=threads, flags=tuple(service or ())
    )
    console = make_console(stderr=True)

    def note(line: str) -> None:
        print_note(line, console)

    if against is None:
        report = run_bench(load, measured, compare=compare is not None, note=note)
    else:
        other = Target.parse(against, against_key)
        report = run_against(load, measured, other, against, rounds, note)
    show_report(report, figures_text(report), as_json=json_, output=output)
    if report.service.failed or (report.against and report.against.failed):
        raise typer.Exit(EXIT_FAILURE)
