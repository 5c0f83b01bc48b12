"""`flexpert simulate`: what a service would give under a load, by a cost model in virtual time."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from flexpert.cli.bench_serve import BenchServeCommand, check_arrivals
from flexpert.cli.command import Command, add_command
from flexpert.cli.options import Json, Output, make_console, numbers, print_note
from flexpert.display.output import EXIT_FAILURE, check_outputs, show_report
from flexpert.errors import ConfigError

RUN_EXAMPLES = (
    "flexpert simulate run --profile profile.json --request-rate 20 --num-prompts 2000 --ranks 4",
    "flexpert simulate run --profile profile.json --trace conversation_trace.jsonl --ranks 64",
    'flexpert simulate run --profile profile.json --request-rate 8 --event "t=20 scale 4" '
    '--event "t=40 kill 0"',
    "flexpert simulate run --profile profile.json --ramp linear:1:40 --num-prompts 4000 "
    "--autoscale max=16,ttft_p99=0.5s",
)
CALIBRATE_EXAMPLES = (
    "flexpert simulate calibrate --output profile.json",
    "flexpert simulate calibrate --output profile.json --ranks 4 -- --model ./model",
)
CHECK_EXAMPLES = (
    "flexpert simulate check --profile profile.json",
    "flexpert simulate check --profile profile.json --runs 7 --repeats 3",
)
SCALE_EXAMPLES = (
    "flexpert simulate scale",
    "flexpert simulate scale --ranks 64,256,1024 --experts 256 --layers 58",
)

app = typer.Typer(no_args_is_help=True, rich_markup_mode="rich", pretty_exceptions_enable=False)

Profile = Annotated[
    Path,
    typer.Option(
        metavar="FILE", help="What things cost, as `flexpert simulate calibrate` wrote it."
    ),
]


def run(
    profile: Profile,
    ranks: Annotated[int, typer.Option(min=1, max=4096, help="At the begin.")] = 1,
    max_ranks: Annotated[
        int | None, typer.Option(min=1, max=4096, metavar="N", help="Default: as needed.")
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A trace of Mooncake or BurstGPT, as for bench serve."),
    ] = None,
    trace_speedup: Annotated[
        float, typer.Option(min=0.001, metavar="X", help="With --trace: so many times as fast.")
    ] = 1.0,
    prompts: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Prompts: JSON lines with 'prompt', lists of token ids."),
    ] = None,
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
    concurrency: Annotated[int, typer.Option(min=1, metavar="N", help="Concurrent requests.")] = 16,
    request_rate: Annotated[
        float | None, typer.Option(min=0.001, metavar="R", help="Instead: R a second arrive.")
    ] = None,
    ramp: Annotated[
        str | None,
        typer.Option(metavar="linear:A:B", help="Instead: a rate that changes; exponential:A:B."),
    ] = None,
    burstiness: Annotated[
        float | None, typer.Option(min=0.01, max=1e6, metavar="G", help="Of arrivals; 1: Poisson.")
    ] = None,
    goodput: Annotated[
        list[str] | None, typer.Option(metavar="GOALS", help="As ttft:500 itl:50.")
    ] = None,
    event: Annotated[
        list[str] | None,
        typer.Option(
            metavar="EVENT",
            help="'t=20 scale 4' after 20 s; also remove ID..., kill ID, rebalance. Repeatable.",
        ),
    ] = None,
    autoscale: Annotated[
        str | None,
        typer.Option(metavar="GOALS", help="As of serve: min=1,max=8,ttft_p99=0.5s,itl_p99=50ms."),
    ] = None,
    autoscale_policy: Annotated[
        str | None, typer.Option(metavar="FILE.py[:NAME]", help="A policy of your own.")
    ] = None,
    max_running: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Sequences at once on each rank.")
    ] = None,
    max_tokens_per_step: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Of each rank.")
    ] = None,
    max_model_len: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Tokens of prompt and answer.")
    ] = None,
    kv_blocks: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="KV blocks of each rank.")
    ] = None,
    kv_block_size: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Tokens of a KV block.")
    ] = None,
    prefix_cache: Annotated[
        bool | None,
        typer.Option("--prefix-cache/--no-prefix-cache", help="Default: the profile's."),
    ] = None,
    routing: Annotated[str, typer.Option(metavar="prefix|fewest", help="As of serve.")] = "prefix",
    max_sequences: Annotated[
        int, typer.Option(min=1, metavar="N", help="Unfinished ones; more are refused.")
    ] = 16384,
    own_processors: Annotated[
        bool,
        typer.Option(
            "--own-processors",
            help="Each rank has processors of its own, and so has the head: no rank waits for the "
            "work of another one but by the exchange.",
        ),
    ] = False,
    rank_us: Annotated[
        float | None,
        typer.Option(
            min=0, metavar="US", help="Microseconds of a step for each further rank, instead."
        ),
    ] = None,
    expert_skew: Annotated[
        float,
        typer.Option(
            min=0, max=4, metavar="S", help="Load of experts: the k-th has k**-S (Zipf); 0: even."
        ),
    ] = 0.0,
    expert_share: Annotated[
        float,
        typer.Option(min=0, max=1, metavar="X", help="With that: share of experts in a step."),
    ] = 0.5,
    redundant_experts: Annotated[int, typer.Option(min=0, metavar="N", help="As of serve.")] = 0,
    seed: Annotated[int, typer.Option(metavar="N", help="Of prompts, arrivals and skew.")] = 0,
    json_: Json = False,
    output: Output = None,
) -> None:
    """Predict what `flexpert bench serve` would measure, without a service.

    Exit status 1 if a request failed, or an event did not come to a good end.
    """
    import msgspec

    from flexpert.bench.arrival_times import RateRamp
    from flexpert.bench.goodput import parse_goodput
    from flexpert.bench.offered_load import OfferedLoad
    from flexpert.bench.timed_events import parse_event
    from flexpert.bench.traffic_trace import read_trace
    from flexpert.cluster.autoscaler import load_policy, parse_goals
    from flexpert.simulator.calibration import settings_of
    from flexpert.simulator.cost_profile import read_profile
    from flexpert.simulator.simulate_run import SimulationPlan, run_simulation, simulation_text
    from flexpert.simulator.simulated_service import skewed_loads

    check_arrivals(trace, trace_speedup, prompts, request_rate, ramp, burstiness)
    if routing not in ("prefix", "fewest"):
        raise ConfigError(f"--routing {routing}: prefix or fewest")
    check_outputs(output)
    costs = read_profile(profile)
    if own_processors:
        costs = msgspec.structs.replace(costs, step=msgspec.structs.replace(costs.step, shared=0.0))
    if rank_us is not None:
        costs = msgspec.structs.replace(
            costs, step=msgspec.structs.replace(costs.step, rank_s=rank_us / 1e6)
        )
    events = [parse_event(text) for text in event or ()]
    most = max([ranks, *((one.body or {}).get("ranks", 0) for one in events)])
    said = {
        "max_running": max_running,
        "max_tokens_per_step": max_tokens_per_step,
        "max_model_len": max_model_len,
        "blocks": kv_blocks,
        "block_size": kv_block_size,
        "prefix_cache": prefix_cache,
    }
    given = {name: value for name, value in said.items() if value is not None}
    shape = msgspec.structs.replace(costs.shape, **given)
    goals = None
    if autoscale is not None:
        goals = parse_goals(autoscale, max_ranks or 4096)
        most = max(most, goals.max if "max=" in autoscale else most)
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
        concurrency=concurrency,
        request_rate=request_rate,
        ramp=RateRamp.parse(ramp) if ramp else None,
        burstiness=burstiness or 1.0,
        warmup=0,
        seed=seed,
    )
    changed: dict[str, Any] = {
        "routing": routing,
        "goals": goals,
        "redundant": redundant_experts,
        "max_sequences": max_sequences,
        "expert_share": expert_share,
    }
    if autoscale_policy is not None:
        changed["policy"] = load_policy(autoscale_policy)
    if expert_skew:
        changed["expert_loads"] = skewed_loads(shape.layers, shape.experts, expert_skew, seed)
    settings = settings_of(shape, ranks, max_ranks or most, **changed)
    report = run_simulation(
        SimulationPlan(
            load=load,
            settings=settings,
            profile=costs,
            events=events,
            goals_ms=parse_goodput(goodput or ()),
        )
    )
    show_report(report, simulation_text(report), as_json=json_, output=output)
    if report.failed:
        raise typer.Exit(EXIT_FAILURE)


def calibrate(
    service: Annotated[
        list[str] | None,
        typer.Argument(metavar="[-- FLAGS]", help="More flags for the service it starts."),
    ] = None,
    ranks: Annotated[int, typer.Option(min=1, max=64, metavar="N", help="At most.")] = 2,
    rounds: Annotated[
        int, typer.Option(min=1, metavar="N", help="Of all loads, on each number of ranks.")
    ] = 2,
    seed: Annotated[int, typer.Option(metavar="N", help="Of prompts and their order.")] = 0,
    json_: Json = False,
    output: Output = None,
) -> None:
    """Measure a real service in short runs, and fit the costs of the simulation to that.

    A minute or two. --output FILE is the profile for `flexpert simulate run`.
    """
    check_outputs(output)
    from flexpert.simulator.calibration import CalibrationPlan, run_calibration
    from flexpert.simulator.profile_text import profile_text

    console = make_console(stderr=True)
    plan = CalibrationPlan(ranks=ranks, rounds=rounds, seed=seed, flags=tuple(service or ()))
    found = run_calibration(plan, lambda line: print_note(line, console))
    show_report(found, profile_text(found), as_json=json_, output=output)


def check(
    profile: Profile,
    service: Annotated[
        list[str] | None,
        typer.Argument(metavar="[-- FLAGS]", help="More flags, besides those of the profile."),
    ] = None,
    runs: Annotated[int, typer.Option(min=1, max=7, metavar="N", help="Different loads.")] = 5,
    repeats: Annotated[int, typer.Option(min=1, metavar="N", help="Of each.")] = 2,
    seed: Annotated[int, typer.Option(metavar="N", help="Of prompts and their order.")] = 0,
    json_: Json = False,
    output: Output = None,
) -> None:
    """Compare predictions with a real service under loads that were not fitted to."""
    check_outputs(output)
    from flexpert.simulator.cost_profile import read_profile
    from flexpert.simulator.prediction_check import CheckPlan, check_text, run_check

    console = make_console(stderr=True)
    plan = CheckPlan(
        profile=read_profile(profile),
        runs=runs,
        repeats=repeats,
        seed=seed,
        flags=tuple(service or ()),
    )
    report = run_check(plan, lambda line: print_note(line, console))
    show_report(report, check_text(report), as_json=json_, output=output)


def scale(
    ranks: Annotated[
        str, typer.Option(metavar="N,N,...", help="Numbers of ranks.")
    ] = "64,256,1024",
    experts: Annotated[int, typer.Option(min=1, metavar="N", help="Of each layer.")] = 256,
    layers: Annotated[int, typer.Option(min=1, metavar="N", help="With experts.")] = 58,
    redundant_experts: Annotated[int, typer.Option(min=0, metavar="N", help="As of serve.")] = 0,
    json_: Json = False,
    output: Output = None,
) -> None:
    """Measure what the head does for so many ranks: its real code, without any processes."""
    check_outputs(output)
    from flexpert.simulator.head_scaling import ScalingPlan, run_scaling, scaling_text

    console = make_console(stderr=True)
    plan = ScalingPlan(
        ranks=numbers(ranks, "--ranks"),
        experts=experts,
        layers=layers,
        redundant=redundant_experts,
    )
    report = run_scaling(plan, lambda line: print_note(line, console))
    show_report(report, scaling_text(report), as_json=json_, output=output)


add_command(app, "run", run, RUN_EXAMPLES, cls=BenchServeCommand)
add_command(app, "calibrate", calibrate, CALIBRATE_EXAMPLES, cls=Command)
add_command(app, "check", check, CHECK_EXAMPLES, cls=Command)
add_command(app, "scale", scale, SCALE_EXAMPLES, cls=Command)
