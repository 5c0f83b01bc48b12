"""The `flexpert` command. What a command needs is imported when it runs, so that it starts fast."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Annotated, NoReturn

import typer

import flexpert
from flexpert.cli import (
    autoscale,
    bench_autoscale,
    bench_balance,
    bench_comm,
    bench_elastic,
    bench_formats,
    bench_gpu,
    bench_head,
    bench_hostile,
    bench_load,
    bench_observers,
    bench_prefix,
    bench_rebalance,
    bench_serve,
    bench_speculate,
    bench_start,
    bench_state_dir,
    bench_structured,
    bench_transport,
    check,
    client_commands,
    doctor,
    join,
    models_command,
    plan,
    rebalance,
    run_batch,
    serve_command,
    simulate,
    trial_commands,
)
from flexpert.cli.command import add_command
from flexpert.cli.options import Json
from flexpert.cli.scale import ScaleCommand
from flexpert.display.output import EXIT_FAILURE, printing
from flexpert.errors import ConfigError, FlexpertError

EXIT_USAGE = 2

VERSION_EXAMPLES = ("flexpert version", "flexpert version --json")

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
app.add_typer(bench, name="bench", help="Measure a service, the exchange, or a GPU.")
app.add_typer(simulate.app, name="simulate", help="Predict what a service would do, without one.")


@bench.callback()
def end_in_order() -> None:
    """SIGTERM ends a bench as Ctrl-C does: what it has started ends, and its files go."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    os.register_at_fork(after_in_child=lambda: signal.signal(signal.SIGTERM, signal.SIG_DFL))


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


def _print_version(asked: bool) -> None:
    if asked:
        print(f"flexpert {flexpert.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=_print_version, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Elastic expert-parallel serving of Mixture-of-Experts models."""


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


add_command(
    app,
    "serve",
    serve_command.serve,
    serve_command.SERVE_EXAMPLES,
    cls=serve_command.ServeCommand,
)
add_command(app, "check", check.check, check.CHECK_EXAMPLES, cls=check.CheckCommand)
add_command(app, "scale", client_commands.scale, client_commands.SCALE_EXAMPLES, cls=ScaleCommand)
add_command(app, "autoscale", autoscale.autoscale, autoscale.EXAMPLES)
add_command(app, "rebalance", rebalance.rebalance, rebalance.REBALANCE_EXAMPLES)
add_command(app, "join", join.join, join.JOIN_EXAMPLES)
add_command(app, "leave", join.leave, join.LEAVE_EXAMPLES)
add_command(app, "status", client_commands.status, client_commands.STATUS_EXAMPLES)
add_command(app, "top", client_commands.top, client_commands.TOP_EXAMPLES)
add_command(app, "chat", client_commands.chat, client_commands.CHAT_EXAMPLES)
add_command(app, "complete", client_commands.complete, client_commands.COMPLETE_EXAMPLES)
add_command(app, "run-batch", run_batch.run_batch, run_batch.RUN_BATCH_EXAMPLES)
add_command(app, "demo", trial_commands.demo, trial_commands.DEMO_EXAMPLES)
add_command(app, "chaos", trial_commands.chaos, trial_commands.CHAOS_EXAMPLES)
add_command(app, "plan", plan.plan, plan.PLAN_EXAMPLES)
add_command(app, "doctor", doctor.doctor, doctor.DOCTOR_EXAMPLES)
add_command(app, "models", models_command.models, models_command.MODELS_EXAMPLES)
add_command(app, "version", version, VERSION_EXAMPLES)
add_command(
    bench,
    "serve",
    bench_serve.bench_serve,
    bench_serve.BENCH_SERVE_EXAMPLES,
    cls=bench_serve.BenchServeCommand,
)
add_command(bench, "comm", bench_comm.bench_comm, bench_comm.EXAMPLES)
add_command(bench, "balance", bench_balance.bench_balance, bench_balance.EXAMPLES)
add_command(bench, "elastic", bench_elastic.bench_elastic, bench_elastic.EXAMPLES)
add_command(bench, "autoscale", bench_autoscale.bench_autoscale, bench_autoscale.EXAMPLES)
add_command(bench, "prefix", bench_prefix.bench_prefix, bench_prefix.PREFIX_EXAMPLES)
add_command(
    bench,
    "structured",
    bench_structured.bench_structured,
    bench_structured.STRUCTURED_EXAMPLES,
)
add_command(
    bench,
    "speculate",
    bench_speculate.bench_speculate,
    bench_speculate.SPECULATE_EXAMPLES,
)
add_command(bench, "start", bench_start.bench_start, bench_start.START_EXAMPLES)
add_command(bench, "state-dir", bench_state_dir.bench_state_dir, bench_state_dir.STATE_DIR_EXAMPLES)
add_command(
    bench,
    "observers",
    bench_observers.bench_observers,
    bench_observers.OBSERVERS_EXAMPLES,
)
add_command(bench, "head", bench_head.bench_head, bench_head.HEAD_EXAMPLES)
add_command(bench, "transport", bench_transport.bench_transport, bench_transport.TRANSPORT_EXAMPLES)
add_command(bench, "hostile", bench_hostile.bench_hostile, bench_hostile.EXAMPLES)
add_command(bench, "rebalance", bench_rebalance.bench_rebalance, bench_rebalance.EXAMPLES)
add_command(bench, "load", bench_load.bench_load, bench_load.EXAMPLES)
add_command(bench, "layer", bench_gpu.bench_layer, bench_gpu.LAYER_EXAMPLES)
add_command(bench, "decode", bench_gpu.bench_decode, bench_gpu.DECODE_EXAMPLES)
add_command(bench, "formats", bench_formats.bench_formats, bench_formats.EXAMPLES)


if __name__ == "__main__":
    main()
