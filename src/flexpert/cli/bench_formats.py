"""`flexpert bench formats`: experts in several formats of weights, side by side."""

from __future__ import annotations

from typing import Annotated, Final, Literal

import typer

from flexpert.cli.bench_gpu import Seed, with_status
from flexpert.cli.options import Json, Output
from flexpert.display.output import check_outputs, show_report
from flexpert.errors import ConfigError

EXAMPLES = (
    "flexpert bench formats --layers 2",
    "flexpert bench formats --formats none,mxfp4,int8,int4 --layers 1",
    "flexpert bench formats --device cuda",
    "flexpert bench formats --device cuda --batch 16 --formats none,fp8,mxfp4 --layers 16",
)

_COMPUTED: Final = {"cpu": ("none", "mxfp4", "int8", "int4"), "cuda": ("none", "fp8", "mxfp4")}


def bench_formats(
    formats: Annotated[
        str,
        typer.Option(
            metavar="NAME[,NAME…]",
            help="none (bf16), mxfp4, int8 and int4 (CPU), fp8 (GPU); the first is the baseline.",
        ),
    ] = "none,mxfp4",
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="What computes.")] = "cpu",
    layers: Annotated[
        int | None,
        typer.Option(min=1, max=24, help="Of 24, with as much of the vocabulary. CPU: 2."),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, max=64, help="Sequences of a step.")] = 1,
    context: Annotated[int, typer.Option(min=1, max=2048, help="Tokens of each sequence.")] = 512,
    steps: Annotated[int, typer.Option(min=1, max=1024, help="Timed steps of each format.")] = 50,
    seed: Seed = 0,
    json_: Json = False,
    output: Output = None,
) -> None:
    """Measure decode steps of a model like gpt-oss-20b with its experts in several formats.

    Random weights, the engine's own path from tokens on the host to the next ones, as one rank.
    The formats take turns at each step, and all lie in memory at once: 24 layers in bf16 and MXFP4
    take 56 GB. Exit status 1 if a format computes something else, which is judged with one layer or
    two: random routers turn roundings into other experts.
    """
    names = [name for name in formats.split(",") if name]
    unknown = sorted(set(names) - set(_COMPUTED[device]))
    if unknown or not names:
        raise ConfigError(
            f"--formats {','.join(unknown)}: on {device} there are {', '.join(_COMPUTED[device])}"
        )
    check_outputs(output)
    import torch

    from flexpert.bench.formats.format_report import formats_text
    from flexpert.bench.formats.format_run import run_formats
    from flexpert.kernels.kernel_set import open_gpu

    report = with_status(
        lambda note: run_formats(
            names,
            open_gpu() if device == "cuda" else torch.device("cpu"),
            layers=layers or (24 if device == "cuda" else 2),
            batch=batch,
            context=context,
            steps=steps,
            seed=seed,
            note=note,
        )
    )
    show_report(report, formats_text(report), as_json=json_, output=output)
    if not report.correct:
        raise typer.Exit(1)
