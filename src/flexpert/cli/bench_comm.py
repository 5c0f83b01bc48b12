"""`flexpert bench comm`: our exchange against its baselines."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from flexpert.cli.options import Json, Output, duration_option, numbers
from flexpert.display.output import check_outputs, show_report
from flexpert.errors import ConfigError

if TYPE_CHECKING:
    from flexpert.bench.comm.ranks import Settings
    from flexpert.bench.comm.workload import Workload

EXAMPLES = (
    "flexpert bench comm",
    "flexpert bench comm --tokens 1,8,32,128,512 --plot latency.png --output latency.json",
    "flexpert bench comm --ranks 2 --baselines gloo,memcpy --repeat 30",
    "flexpert bench comm --channel nixl --duration 20s",
    "flexpert bench comm --machines 2 --experts 128 --hidden 2048",
    "flexpert bench comm --device cuda --ranks 1 --tokens 1,128,512",
    "flexpert bench comm --device cuda --eager --ranks 2 --experts 16 --tokens 1,16,128,512",
)


def bench_comm(
    ranks: Annotated[int, typer.Option(min=1, max=256, help="Rank processes.")] = 4,
    tokens: Annotated[
        str, typer.Option(metavar="N[,N…]", help="Tokens that each rank sends in one exchange.")
    ] = "128",
    hidden: Annotated[int, typer.Option(min=16, help="Elements of a row.")] = 7168,
    topk: Annotated[int, typer.Option(min=1, help="Experts that a token is routed to.")] = 8,
    experts: Annotated[int, typer.Option(min=1, help="Experts of all ranks together.")] = 32,
    dtype: Annotated[
        Literal["bfloat16", "float16", "float32"], typer.Option(help="Data type of the rows.")
    ] = "bfloat16",
    fp8: Annotated[
        Literal["auto", "none", "float32", "power2", "ue8m0"],
        typer.Option(help="Scales of fp8 rows; auto: float32 where --hidden allows it."),
    ] = "auto",
    channel: Annotated[
        Literal["shm", "nixl"], typer.Option(help="How flexpert's rows reach a peer.")
    ] = "shm",
    machines: Annotated[
        int,
        typer.Option(
            min=1, help="Deal the ranks out to so many, by name: NIXL between them, bytes counted."
        ),
    ] = 1,
    repeat: Annotated[int, typer.Option(min=1, help="Timed exchanges of each baseline.")] = 100,
    duration: Annotated[
        float | None,
        duration_option("--duration", "Instead of --repeat: time for each of --tokens.", least=0.1),
    ] = None,
    device: Annotated[
        Literal["cpu", "cuda"], typer.Option(help="Where the rows lie and the exchange runs.")
    ] = "cpu",
    eager: Annotated[
        bool,
        typer.Option(
            "--eager",
            help="On cuda, launch each call by itself, not in a CUDA graph: the host's time for a "
            "call, the device's for pairs in a row.",
        ),
    ] = False,
    baselines: Annotated[
        str | None,
        typer.Option(
            metavar="NAME[,NAME…]",
            help="Any of gloo, allgather, nixl, memcpy; on cuda nixl_ep, interface, torch, nccl, "
            "checks; with --eager nixl_ep, interface, launches. Default: all; with --machines, "
            "none.",
        ),
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch in each rank.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Seed of data and routing.")] = 0,
    json_: Json = False,
    output: Output = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Latency over tokens, .png or .svg.")
    ] = None,
    timeout: Annotated[
        float,
        duration_option("--timeout", "How long a rank waits for another.", least=1, default="30s"),
    ] = 30,
) -> None:
    """Measure dispatch and combine against gloo, NIXL and memcpy.

    The same ranks, routing and data for all; each is checked against a float64 oracle first.
    Exit status 1 if one computes something else. With --device cuda the baselines are nixl_ep and
    torch, in CUDA graphs, or without them (--eager); several ranks on one GPU need NVIDIA's MPS to
    run at the same time.
    """
    from rich.console import Console

    from flexpert.bench.comm.baseline_kinds import (
        BASELINE_FAMILIES,
        EAGER_BASELINE_FAMILIES,
        GPU_BASELINE_FAMILIES,
    )
    from flexpert.bench.comm.comm_report import comm_text
    from flexpert.bench.comm.comm_run import run_comm
    from flexpert.bench.comm.plot import check_plot, draw
    from flexpert.bench.comm.ranks import Settings
    from flexpert.bench.comm.workload import Workload
    from flexpert.comm import quant
    from flexpert.comm.buffer import Scales

    if eager and device == "cpu":
        raise ConfigError("--eager is for --device cuda: on a CPU every call is by itself")
    on_cuda = EAGER_BASELINE_FAMILIES if eager else GPU_BASELINE_FAMILIES
    known = BASELINE_FAMILIES if device == "cpu" else on_cuda
    default = list(known) if machines == 1 else []
    names = default if baselines is None else [name for name in baselines.split(",") if name]
    if unknown := sorted(set(names) - set(known)):
        raise ConfigError(f"--baselines {','.join(unknown)}: there are {', '.join(known)}")
    if machines > 1:
        if channel == "nixl" or device == "cuda":
            raise ConfigError("--machines is for --device cpu, and goes without --channel nixl")
        if machines > ranks:
            raise ConfigError(f"--machines {machines}: more than --ranks {ranks}")
    if hidden % 16:
        raise ConfigError(f"--hidden {hidden}: must be a multiple of 16")
    if topk > min(experts, 16):
        raise ConfigError(f"--topk {topk}: at most 16, and at most --experts {experts}")
    if fp8 == "auto":
        fp8 = "float32" if hidden % quant.BLOCK == 0 else "none"
    scales: Scales | None = None if fp8 == "none" else fp8
    if scales is not None:
        try:
            quant.check(hidden, scales)
        except ValueError as error:
            raise ConfigError(f"--fp8 {fp8}: {error}") from None
    if plot is not None:
        check_plot(plot)
    check_outputs(output, plot)
    workloads = [
        Workload(
            ranks=ranks,
            tokens=count,
            hidden=hidden,
            topk=topk,
            experts=experts,
            dtype=dtype,
            seed=seed,
        )
        for count in numbers(tokens, "--tokens")
    ]
    settings = Settings(
        "auto" if machines > 1 else channel, scales, threads, timeout, machines, eager
    )
    if device == "cuda":
        for flag, given in (("--duration", duration), ("--plot", plot)):
            if given is not None:
                raise ConfigError(f"{flag} is not there with --device cuda")
        _on_gpu(workloads, settings, names, repeat, as_json=json_, output=output)
        return
    console = Console(stderr=True)
    with console.status("") as status:
        report = run_comm(
            workloads, settings, names, repeat=repeat, seconds=duration, note=status.update
        )
    show_report(report, comm_text(report), as_json=json_, output=output)
    if plot is not None:
        draw(report, plot)
    if not report.correct:
        raise typer.Exit(1)


def _on_gpu(
    workloads: list[Workload],
    settings: Settings,
    baselines: list[str],
    repeat: int,
    *,
    as_json: bool,
    output: Path | None,
) -> None:
    from rich.console import Console

    from flexpert.comm.cuda import require
    from flexpert.comm.errors import CommError

    try:
        require(measuring=True)
    except CommError as error:
        raise ConfigError(f"--device cuda: {error}") from None
    from flexpert.bench.comm.cuda.gpu_comm_report import gpu_text
    from flexpert.bench.comm.cuda.gpu_comm_run import run_gpu

    with Console(stderr=True).status("") as status:
        report = run_gpu(workloads, settings, baselines, repeat=repeat, note=status.update)
    show_report(report, gpu_text(report), as_json=as_json, output=output)
    if not report.correct:
        raise typer.Exit(1)
