"""`flexpert bench layer` and `flexpert bench decode`: an engine on a GPU against its roofline."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal, TypeVar

import typer

from flexpert.cli.options import Json, Output, numbers
from flexpert.device_settings import MOST_GPU_RANKS
from flexpert.display.output import check_outputs, show_report
from flexpert.errors import ConfigError

T = TypeVar("T")

LAYER_EXAMPLES = (
    "flexpert bench layer",
    "flexpert bench layer --shapes qwen3-30b-a3b --tokens 1,64,4096 --output layer.json",
    "flexpert bench layer --baselines grouped_mm --repeat 200",
    "flexpert bench layer --quantization fp8",
    "flexpert bench layer --shapes deepseek-v3 --tokens 64,512 --ranks 4 --quantization fp8",
)
DECODE_EXAMPLES = (
    "flexpert bench decode",
    "flexpert bench decode --batch 1,64 --context 2048 --output decode.json",
    "flexpert bench decode --layers 8 --compare none   # a quick look",
    "flexpert bench decode --shape deepseek-v3 --batch 1,16,64 --context 4096",
    "flexpert bench decode --ranks 1,2,4   # each on its own GPU; on a shared one only under MPS",
    "flexpert bench decode --layers 24 --quantization fp8",
)

Quantization = Annotated[
    Literal["none", "fp8"],
    typer.Option(help="Format of flexpert's experts; fp8: a scale for 128 x 128."),
]
Seed = Annotated[int, typer.Option(min=0, help="Seed of weights and data.")]


def bench_layer(
    shapes: Annotated[
        str, typer.Option(metavar="NAME[,NAME…]", help="Any of qwen3-30b-a3b, deepseek-v3.")
    ] = "qwen3-30b-a3b,deepseek-v3",
    tokens: Annotated[str, typer.Option(metavar="N[,N…]", help="Tokens of a rank in one pass.")] = (
        "1,16,64,128,512,4096"
    ),
    ranks: Annotated[
        str,
        typer.Option(
            metavar="N[,N…]",
            help="Ranks, dealt out to the GPUs; on a shared one only under MPS. The baselines go "
            "with one.",
        ),
    ] = "1",
    baselines: Annotated[
        str, typer.Option(metavar="NAME[,NAME…]", help="Any of transformers' grouped_mm, eager.")
    ] = "grouped_mm,eager",
    repeat: Annotated[int, typer.Option(min=1, help="Timed replays of each baseline.")] = 50,
    quantization: Quantization = "none",
    seed: Seed = 0,
    json_: Json = False,
    output: Output = None,
) -> None:
    """Measure a whole MoE layer against transformers' and the roofline.

    Route, sort, experts and combine of one rank that holds all experts, bf16; and the same with a
    dispatch and a combine through the exchange, as one of several ranks does it. With --ranks
    each of several has its share of the experts and tokens of its own. All are checked against
    float64; exit status 1 if one computes something else.
    """
    from flexpert.kernels.kernel_set import open_gpu

    counts, groups = numbers(tokens, "--tokens"), rank_counts(ranks)
    check_outputs(output)
    open_gpu()  # before what needs triton is imported
    from flexpert.bench.gpu.gpu_report import layer_text
    from flexpert.bench.gpu.layer import run_layer
    from flexpert.bench.gpu.layer_report import BASELINE_FAMILIES
    from flexpert.bench.gpu.layer_weights import SHAPES

    desired = _names(shapes, tuple(SHAPES), "--shapes")
    against = _names(baselines, BASELINE_FAMILIES, "--baselines")
    report = with_status(
        lambda note: run_layer(
            [SHAPES[name] for name in desired],
            counts,
            against,
            ranks=groups,
            repeat=repeat,
            quantise=quantization == "fp8",
            seed=seed,
            note=note,
        )
    )
    show_report(report, layer_text(report), as_json=json_, output=output)
    if not report.correct:
        raise typer.Exit(1)


def bench_decode(
    batch: Annotated[
        str, typer.Option(metavar="N[,N…]", help="Sequences of all ranks together.")
    ] = "1,16,64,256",
    ranks: Annotated[
        str,
        typer.Option(
            metavar="N[,N…]", help="Ranks, dealt out to the GPUs; on a shared one only under MPS."
        ),
    ] = "1",
    shape: Annotated[
        Literal["qwen3-30b-a3b", "deepseek-v3", "qwen3-next", "granite-4"],
        typer.Option(help="Whose shapes the model has."),
    ] = "qwen3-30b-a3b",
    layers: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="How many of its layers.",
            show_default="all 48, of deepseek-v3 4 of 61, qwen3-next 8 of 48, granite-4 10 of 40",
        ),
    ] = None,
    context: Annotated[
        int, typer.Option(min=1, help="Tokens in the KV cache of each sequence.")
    ] = 512,
    steps: Annotated[int, typer.Option(min=1, help="Timed steps of each batch.")] = 30,
    compare: Annotated[
        Literal["transformers", "expanded", "none"] | None,
        typer.Option(
            help="What else is timed: transformers (of qwen3-30b-a3b), or flexpert with the keys "
            "and values of all heads in its cache in place of latents (of deepseek-v3).",
            show_default="the one that goes with the shape",
        ),
    ] = None,
    quantization: Quantization = "none",
    seed: Seed = 0,
    json_: Json = False,
    output: Output = None,
) -> None:
    """Measure a decode step of a model like Qwen3-30B-A3B or DeepSeek-V3, with random weights.

    The engine's own path, from tokens on the host to the next ones, as one rank or several, against
    the time that reading weights and KV cache takes, and transformers or a cache without latents.
    Layers that keep states (qwen3-next, granite-4) also read and write these.
    Needs some 78 GB of GPU memory, with fp8 experts some 110: transformers has the same weights in
    bf16; four layers of DeepSeek-V3 31 and what the cache takes. Ranks are dealt
    out to the GPUs in turn; several on one GPU run at the same time under NVIDIA's MPS only: start
    it before. Exit status 1 if the logits are not those of transformers.
    """
    from flexpert.bench.model_shapes import DECODE_SHAPES
    from flexpert.kernels.kernel_set import open_gpu

    batches, counts = numbers(batch, "--batch"), rank_counts(ranks)
    model = DECODE_SHAPES[shape]
    if layers is not None and layers > model.layers:
        raise ConfigError(f"--layers {layers}: {shape} has {model.layers}")
    compared = compare or model.compared
    if compared not in (model.compared, "none"):
        raise ConfigError(f"--compare {compared}: with {shape} there is {model.compared}, or none")
    if compared == "expanded" and counts != [1]:
        raise ConfigError(f"--ranks {ranks}: --compare expanded times one rank; add --compare none")
    check_outputs(output)
    open_gpu()  # before what needs triton is imported
    from flexpert.bench.gpu.decode import run_decode
    from flexpert.bench.gpu.gpu_report import decode_text

    report = with_status(
        lambda note: run_decode(
            batches,
            shape=shape,
            compared=compared,
            ranks=counts,
            layers=layers or model.usual_layers,
            context=context,
            steps=steps,
            quantise=quantization == "fp8",
            seed=seed,
            note=note,
        )
    )
    show_report(report, decode_text(report), as_json=json_, output=output)
    if not report.correct:
        raise typer.Exit(1)


def rank_counts(text: str) -> list[int]:
    """Of `--ranks`. Raises: ConfigError"""
    counts = numbers(text, "--ranks")
    if counts[-1] > MOST_GPU_RANKS:
        raise ConfigError(f"--ranks {text}: at most {MOST_GPU_RANKS} ranks exchange")
    return counts


def with_status(run: Callable[[Callable[[str], None]], T]) -> T:
    from rich.console import Console

    with Console(stderr=True).status("") as status:
        return run(status.update)


def _names(text: str, known: tuple[str, ...], flag: str) -> list[str]:
    names = [name for name in text.split(",") if name]
    if unknown := sorted(set(names) - set(known)):
        raise ConfigError(f"{flag} {','.join(unknown)}: there are {', '.join(known)}")
    return names
