"""Runs plans one after the other, shows each as it goes, and reports all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console

from flexpert.bench.machine import Machine, this_machine
from flexpert.comm import quant
from flexpert.display.output import write_report
from flexpert.errors import ConfigError
from flexpert.trials.plan import plan_file, plan_report, runner
from flexpert.trials.plan.plan_file import PlanPhase
from flexpert.trials.plan.runner import Options, PhaseResult


@dataclass(frozen=True, slots=True)
class NamedPlan:
    """seed: of its data and chance."""

    name: str
    seed: int
    phases: list[PlanPhase]

    @classmethod
    def load(cls, file: Path, seed: int) -> NamedPlan:
        """Raises: ConfigError: no such file, or not a plan."""
        return cls(str(file), seed, plan_file.load(file))

    @classmethod
    def random(cls, seed: int) -> NamedPlan:
        return cls(f"random plan {seed}", seed, plan_file.random_plan(seed))


class PlanRun(msgspec.Struct, frozen=True):
    """One plan of a report; phases: `PhaseResult`s."""

    plan: str
    seed: int
    phases: list[dict[str, Any]]


class PlanReport(msgspec.Struct, frozen=True, rename={"passed": "pass"}):
    """The JSON of `flexpert plan`."""

    passed: bool
    machine: Machine
    options: dict[str, Any]
    runs: list[PlanRun]


def check_scales(options: Options) -> None:
    """Raises: ConfigError: rows of this size have no such fp8 scales."""
    if options.fp8 is not None:
        try:
            quant.check(options.sizes.hidden, options.fp8)
        except ValueError as error:
            raise ConfigError(str(error)) from error


def run_plans(
    plans: Sequence[NamedPlan],
    options: Options,
    *,
    console: Console,
    brief: bool = False,
    as_json: bool = False,
    output: Path | None = None,
) -> bool:
    """Run all plans, each with its own seed.

    Args:
        options: their common options; the seed is not used.
        brief: a plan without errors is one line instead of a table.
        as_json, output: as `write_report`.

    Returns: whether every exchange was right.
    """
    runs = []
    everything: list[PhaseResult] = []
    for plan in plans:
        results = _run_one(plan, replace(options, seed=plan.seed), console, brief=brief)
        runs.append(PlanRun(plan.name, plan.seed, runner.as_json(results)))
        everything += results
    good = plan_report.verdict(console, everything)
    report = PlanReport(good, this_machine(), _reported(options), runs)
    write_report(report, as_json=as_json, output=output)
    return good


def _run_one(
    plan: NamedPlan, options: Options, console: Console, *, brief: bool
) -> list[PhaseResult]:
    with console.status(f"{plan.name}: starting") as status:
        results = runner.run(
            plan.phases,
            options,
            lambda result: status.update(f"{plan.name}: phase {result.phase} done"),
        )
    if brief and not any(result.errors for result in results):
        console.print(f"{plan.name}: " + " → ".join(result.phase for result in results))
        return results
    sizes = options.sizes
    table = plan_report.new_table(
        f"{plan.name}: {sizes.tokens} tokens of {sizes.hidden} {_dtype_name(options)}"
    )
    for result in results:
        plan_report.add(table, result)
    console.print(table)
    return results


def _reported(options: Options) -> dict[str, Any]:
    sizes = options.sizes
    return {
        "tokens": sizes.tokens,
        "hidden": sizes.hidden,
        "topk": sizes.topk,
        "experts_per_rank": sizes.experts_per_rank,
        "dtype": _dtype_name(options),
        "fp8": options.fp8,
        "kill": options.kill,
        "at": options.at,
        "channel": options.channel,
        "exchanges": options.exchanges,
        "timeout_s": options.timeout_s,
    }


def _dtype_name(options: Options) -> str:
    return str(options.sizes.dtype).removeprefix("torch.")
