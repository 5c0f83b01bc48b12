"""The `flexpert` command. What a command needs is imported when it runs, so that it starts fast."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

import flexpert
from flexpert.cli import bench_comm, bench_gpu, bench_hostile, plan
from flexpert.cli.command import Command, Json, Output, duration
from flexpert.cli.scale import ScaleCommand
from flexpert.cli.settings import with_settings
from flexpert.config import Config
from flexpert.display.output import EXIT_FAILURE, check_outputs, printing, show_report
from flexpert.errors import ConfigError, FlexpertError

if TYPE_CHECKING:
    from flexpert.cli.client import Client

EXIT_USAGE = 2
EXIT_INTERRUPTED = 130

DEFAULT_URL = "http://127.0.0.1:8000"

Url = Annotated[
    str, typer.Option("--url", envvar="FLEXPERT_URL", metavar="URL", help="Address of the service.")
]
ApiKey = Annotated[
    str | None,
    typer.Option(
        "--api-key",
        envvar="FLEXPERT_API_KEY",
        metavar="KEY",
        help="The service's key, if it asks for one.",
    ),
]
MaxTokens = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="Longest answer, in tokens.")
]
Temperature = Annotated[
    float | None,
    typer.Option(min=0, metavar="T", help="Sampling temperature; 0: always the likeliest token."),
]
TopP = Annotated[
    float | None,
    typer.Option(metavar="P", help="Sample only from the likeliest tokens of this total share."),
]
Seed = Annotated[int | None, typer.Option(metavar="N", help="Makes sampling repeatable.")]

app = typer.Typer(
    name="flexpert",
    help="Elastic expert-parallel serving of Mixture-of-Experts models.",
    epilog="A first look: flexpert demo",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
bench = typer.Typer(no_args_is_help=True, rich_markup_mode="rich", pretty_exceptions_enable=False)
app.add_typer(bench, name="bench", help="Measure a service.")


def main() -> NoReturn:
    """Run the command line; an error that can be expected is one line, not a traceback."""
    with printing(), expected_errors():
        app()
    sys.exit(0)


@contextmanager
def expected_errors() -> Iterator[None]:
    """Exit status 2 for wrong usage or settings, 1 for what failed."""
    try:
        yield
    except FlexpertError as error:
        with suppress(OSError):  # the exit status says it, too
            print(f"flexpert: {error}", file=sys.stderr)
        sys.exit(EXIT_USAGE if isinstance(error, ConfigError) else EXIT_FAILURE)


def _examples(*lines: str) -> str:
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


@app.command(
    cls=Command,
    epilog=_examples(
        "flexpert serve --ranks 2",
        "flexpert serve --model ./olmoe --ranks 4 --kv-memory 2GiB --port 9000",
        "flexpert serve --config flexpert.yaml --deterministic",
    ),
)
@with_settings
def serve(config: Config) -> None:
    """Serve a model on several ranks, OpenAI-compatible; 'flexpert scale' changes them.

    A setting comes from its flag, else from the environment (FLEXPERT_CLUSTER__RANKS=2), else
    from --config FILE, else from its default.
    """
    from flexpert.cluster.processes import caches

    caches.keep_private(os.environ)  # before torch is imported
    from flexpert.server.service_process import serve as run

    raise typer.Exit(run(config))


@app.command(
    cls=ScaleCommand,
    epilog=_examples(
        "flexpert scale 4",
        "flexpert scale --add 1",
        "flexpert scale --remove 1 3",
        "flexpert scale --add 1 --remove 1   # a newcomer takes over",
        "flexpert scale --cancel op-1a2b3c4d",
        "Exit status: 0 done, 1 failed or refused, 2 wrong usage, 3 cancelled",
    ),
)
def scale(
    ranks: Annotated[
        int | None, typer.Argument(min=1, metavar="[RANKS]", help="How many ranks there shall be.")
    ] = None,
    add: Annotated[int, typer.Option(min=0, metavar="N", help="How many ranks join.")] = 0,
    remove: Annotated[
        list[int] | None, typer.Option(metavar="ID...", help="Ids of the ranks that leave.")
    ] = None,
    wait: Annotated[bool, typer.Option(help="Follow the change to its end.")] = True,
    cancel: Annotated[
        str | None, typer.Option(metavar="ID", help="Undo a change that is being prepared.")
    ] = None,
    json_: Json = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Change the ranks while they serve, and show how it goes.

    Repeating the command while the change runs follows the same change.
    """
    from flexpert.cli.scale import operation_body, print_operation, run_scale

    console = _console()
    if cancel is not None:
        if ranks is not None or add or remove:
            raise ConfigError("--cancel stands alone")
        with _client(url, api_key) as client:
            print_operation(console, client.cancel(cancel), as_json=json_)
        return
    body = operation_body(ranks, add, remove or [])
    with _client(url, api_key) as client:
        raise typer.Exit(run_scale(client, body, console=console, wait=wait, as_json=json_))


@app.command(
    cls=Command,
    epilog=_examples("flexpert status", "flexpert status --watch", "flexpert status --json"),
)
def status(
    watch: Annotated[
        bool, typer.Option("--watch", "-w", help="Show it again every second.")
    ] = False,
    json_: Json = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Show the ranks, where the experts are, and the change that runs."""
    from flexpert.cli.status import run_status

    with _client(url, api_key) as client:
        run_status(client, console=_console(), watch=watch, as_json=json_)


@app.command(
    cls=Command,
    epilog=_examples(
        "flexpert chat",
        'flexpert chat "Who was Noah?"',
        "echo 'Who was Noah?' | flexpert chat --temperature 0",
    ),
)
def chat(
    message: Annotated[
        str | None, typer.Argument(help="One question; without it, a conversation.")
    ] = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="System message.")] = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: Seed = None,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Talk to the model; Ctrl-C stops an answer, Ctrl-D ends the conversation."""
    from flexpert.cli.talk import run_chat

    if message is None and not sys.stdin.isatty():
        message = sys.stdin.read().strip()
    if message == "":
        raise ConfigError("the message is empty")
    params = _given(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    with _client(url, api_key) as client:
        run_chat(client, message, system, params, ask=input, out=sys.stdout)


@app.command(
    cls=Command,
    epilog=_examples(
        'flexpert complete "In the beginning"',
        'flexpert complete "In the beginning" --max-tokens 200 --temperature 0.8 --seed 7',
        "cat prompt.txt | flexpert complete -",
    ),
)
def complete(
    prompt: Annotated[str, typer.Argument(help="Text to continue; - reads it from stdin.")],
    max_tokens: MaxTokens = 64,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: Seed = None,
    stop: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="End the answer before this text.")
    ] = None,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Do not stop where the model would.")
    ] = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Continue a text."""
    from flexpert.cli.talk import run_complete

    if prompt == "-":
        prompt = sys.stdin.read()
    if not prompt:
        raise ConfigError("the prompt is empty")
    params = _given(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        stop=stop or None,
        ignore_eos=ignore_eos or None,
    )
    with _client(url, api_key) as client:
        run_complete(client, prompt, params, sys.stdout)


@app.command(
    cls=Command,
    epilog=_examples(
        "flexpert demo",
        "flexpert demo --many --clients 16 --requests 200 --duration 30s",
        "flexpert demo --json > run.json",
    ),
)
def demo(
    clients: Annotated[int, typer.Option(min=1, help="Concurrent streams.")] = 8,
    requests: Annotated[int, typer.Option(min=1, help="How many different requests.")] = 32,
    max_tokens: Annotated[int, typer.Option(min=2, help="Longest answer, in tokens.")] = 64,
    duration: Annotated[
        float,
        typer.Option(
            metavar="DURATION", parser=duration("--duration", 1), help="How long traffic lasts."
        ),
    ] = 20.0,
    many: Annotated[bool, typer.Option("--many", help="Ten changes instead of three.")] = False,
    json_: Json = False,
) -> None:
    """Watch the ranks change from 2 to 4 to 3 to 1 under traffic, and count what it cost.

    Needs nothing but this package: it starts a service with the embedded model, takes the answers
    of an undisturbed run, then asks the same again while the ranks change, and compares. Exit
    status 1 if an answer was lost or differs.
    """
    from flexpert.trials.demo import DemoPlan, run_demo

    plan = DemoPlan(
        clients=clients, requests=requests, max_tokens=max_tokens, duration_s=duration, many=many
    )
    raise typer.Exit(run_demo(plan, console=_console(stderr=json_), as_json=json_))


@app.command(
    cls=Command,
    epilog=_examples(
        "flexpert chaos",
        "flexpert chaos --faults kill --rate 0.5 --duration 5m --plot kills.png",
        "flexpert chaos --pairs --during-scaling --seed 7 --output run.json",
        "flexpert chaos --ranks 3 -- --stall-timeout 500ms",
    ),
)
def chaos(
    service: Annotated[
        list[str] | None,
        typer.Argument(metavar="[-- FLAGS]", help="More flags for the service it starts."),
    ] = None,
    url: Annotated[
        str | None,
        typer.Option(
            metavar="URL", help="A deterministic service of this machine, instead of a new one."
        ),
    ] = None,
    api_key: ApiKey = None,
    faults: Annotated[
        str | None,
        typer.Option(
            metavar="KIND[,KIND…]",
            help="kill, stop, slow, oom, partition; default: all; with --url the first three.",
        ),
    ] = None,
    rate: Annotated[float, typer.Option(min=0.01, max=20, help="Faults per second.")] = 0.5,
    duration: Annotated[
        float,
        typer.Option(
            metavar="DURATION",
            parser=duration("--duration", 1, 86400),
            help="How long faults strike.",
        ),
    ] = 30.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of what strikes whom, and when.")] = 0,
    ranks: Annotated[int, typer.Option(min=1, max=64, help="Ranks of the service it starts.")] = 4,
    clients: Annotated[int, typer.Option(min=1, help="Concurrent streams.")] = 16,
    requests: Annotated[int, typer.Option(min=1, help="How many different requests.")] = 64,
    max_tokens: Annotated[int, typer.Option(min=2, help="Longest answer, in tokens.")] = 64,
    pairs: Annotated[bool, typer.Option("--pairs", help="Strike two ranks at once.")] = False,
    during_scaling: Annotated[
        bool, typer.Option("--during-scaling", help="Ranks join and leave all the time.")
    ] = False,
    json_: Json = False,
    output: Output = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Tokens over time, .png or .svg.")
    ] = None,
) -> None:
    """Kill, stop, slow and starve ranks under traffic, and count what it cost.

    It takes the answers of an undisturbed run, then asks the same again while faults strike by
    seed, and compares. kill: SIGKILL. stop: SIGSTOP, for good. slow: stopped half of the time for a
    second; nobody may be evicted for it. oom: a leak takes all memory that the rank may have.
    partition: rank and head do not hear each other for a while. Exit status 1 if an answer was lost
    or altered, a rank ended that was not harmed or has grown, or not all came back.
    """
    check_outputs(output, plot)
    from flexpert.bench.comm.plot import check_plot
    from flexpert.trials.chaos import ChaosPlan, check_flags, parse_faults, run_chaos

    if plot:
        check_plot(plot)
    plan = ChaosPlan(
        faults=parse_faults(faults, own=url is None),
        rate=rate,
        duration_s=duration,
        seed=seed,
        ranks=ranks,
        clients=clients,
        requests=requests,
        max_tokens=max_tokens,
        pairs=pairs,
        scaling=during_scaling,
        plot=plot,
        flags=check_flags(service, url),
        url=url,
        key=api_key,
    )
    raise typer.Exit(run_chaos(plan, console=_console(stderr=json_), as_json=json_, output=output))


app.command(
    "plan",
    cls=Command,
    epilog=_examples(
        "flexpert plan examples/plans/rejoin.json",
        "flexpert plan examples/plans/rejoin.json --kill sigstop --at combine-wait",
        "flexpert plan --random 20 --seed 7 --channel nixl",
    ),
)(plan.plan)


for _name, _command, _lines in (
    ("comm", bench_comm.bench_comm, bench_comm.EXAMPLES),
    ("hostile", bench_hostile.bench_hostile, bench_hostile.EXAMPLES),
    ("layer", bench_gpu.bench_layer, bench_gpu.LAYER_EXAMPLES),
    ("decode", bench_gpu.bench_decode, bench_gpu.DECODE_EXAMPLES),
):
    bench.command(_name, cls=Command, epilog=_examples(*_lines))(_command)


@bench.command(
    "serve",
    cls=Command,
    epilog=_examples(
        "flexpert bench serve",
        "flexpert bench serve --compare transformers --ranks 1 --concurrency 16",
        "flexpert bench serve --url http://127.0.0.1:8000 --request-rate 4 --num-prompts 200",
        "flexpert bench serve --prompts prompts.jsonl --output result.json",
        "flexpert bench serve --ranks 2 -- --deterministic --max-running 32",
    ),
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
    json_: Json = False,
    output: Output = None,
) -> None:
    """Measure a service: throughput, time to first token, inter-token latency, end to end."""
    from flexpert.bench.serve import OfferedLoad, ServeMeasured, run_bench
    from flexpert.display.render import figures_text

    if compare not in (None, "transformers"):
        raise ConfigError(f"--compare {compare}: only 'transformers' is known")
    if url is not None and (service or compare):
        what = "flags of a service" if service else "--compare"
        raise ConfigError(f"{what} can only be had with a service of our own; leave out --url")
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
    console = _console(stderr=True)
    report = run_bench(
        load, measured, compare=compare is not None, note=lambda line: _note(line, console)
    )
    show_report(report, figures_text(report), as_json=json_, output=output)
    if report.service.failed:
        raise typer.Exit(EXIT_FAILURE)


@app.command(cls=Command, epilog=_examples("flexpert version", "flexpert version --json"))
def version(json_: Json = False) -> None:
    """Print the version, and those of what it stands on."""
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as version_of

    found = {"flexpert": flexpert.__version__, "python": sys.version.split()[0]}
    for package in ("torch", "transformers"):
        try:
            found[package] = version_of(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    if json_:
        print(json.dumps(found))
        return
    for name, number in found.items():
        print(f"{name} {number}")


def _client(url: str, key: str | None) -> Client:
    from flexpert.cli.client import Client

    return Client(url, key)


def _console(*, stderr: bool = False) -> Any:
    from rich.console import Console

    return Console(stderr=stderr)


def _note(line: str, console: Any) -> None:
    console.print(line, style="dim", highlight=False, soft_wrap=True, markup=False)


def _given(**params: Any) -> dict[str, Any]:
    return {name: value for name, value in params.items() if value is not None}


if __name__ == "__main__":
    main()
