"""`flexpert scale`: ask for a change of the ranks and show it as it goes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

import msgspec
from rich.console import Console
from rich.live import Live

from flexpert.cli.command import Command
from flexpert.cluster.formatting import describe_change, describe_preview, outcome_line
from flexpert.cluster.views import ChangePreview, OperationView
from flexpert.display.render import operation_table, phase_line
from flexpert.errors import ConfigError

POLL_S = 0.1

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_CANCELLED = 3
EXIT_INTERRUPTED = 130

_EXIT = {"done": EXIT_DONE, "failed": EXIT_FAILED, "cancelled": EXIT_CANCELLED}


class Control(Protocol):
    """The part of `cli.client.Client` that is needed here."""

    url: str

    def begin(self, body: dict[str, Any]) -> OperationView: ...
    def operation(self, operation_id: str) -> OperationView: ...


def spread_ids(arguments: list[str]) -> list[str]:
    """["--remove", "1", "3"] and ["--remove", "1,3"] → ["--remove", "1", "--remove", "3"]."""
    spread: list[str] = []
    removing = False
    for argument in arguments:
        if argument == "--remove":
            removing = True
            spread.append(argument)
            continue
        parts = argument.split(",")
        if removing and all(part.isdigit() for part in parts):
            for part in parts:
                if spread[-1] != "--remove":
                    spread.append("--remove")
                spread.append(part)
            continue
        removing = False
        spread.append(argument)
    return spread


class ScaleCommand(Command):
    """Lets `--remove` take several ids."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, spread_ids(args))


def operation_body(ranks: int | None, add: int, remove: list[int]) -> dict[str, Any]:
    """What `POST /cluster/operations` takes.

    Raises:
        ConfigError: not exactly one of the two ways.
    """
    if (ranks is None) == (add == 0 and not remove):
        raise ConfigError(
            "say either how many ranks there shall be ('flexpert scale 4') or what to change "
            "('flexpert scale --add 1 --remove 3')"
        )
    if ranks is not None:
        return {"ranks": ranks}
    return {"add": add, "remove": remove}


def run_scale(
    control: Control,
    body: dict[str, Any],
    *,
    console: Console,
    wait: bool = True,
    as_json: bool = False,
    sleep: Callable[[float], None] = time.sleep,
) -> int:
    """Begin a change, follow it to its end; the exit status."""
    operation = control.begin(body)
    if not wait:
        print_operation(console, operation, as_json=as_json)
        if not as_json:
            console.print(f"follow it with 'flexpert status --watch --url {control.url}'")
        return EXIT_DONE if operation.state != "failed" else EXIT_FAILED
    try:
        if as_json:
            operation = _follow(control, operation, lambda _: None, sleep)
        elif console.is_terminal:
            with Live(operation_table(operation), console=console, auto_refresh=False) as live:
                operation = _follow(
                    control,
                    operation,
                    lambda view: live.update(operation_table(view), refresh=True),
                    sleep,
                )
        else:
            console.print(f"{operation.id}: {describe_change(operation)}")
            operation = _follow(control, operation, PhaseLines(console), sleep)
    except KeyboardInterrupt:
        Console(stderr=True).print(
            f"\noperation {operation.id} goes on without us. To undo it: "
            f"flexpert scale --cancel {operation.id} --url {control.url}",
            soft_wrap=True,
            highlight=False,
        )
        return EXIT_INTERRUPTED
    if as_json:
        print_operation(console, operation, as_json=True)
    else:
        console.print(outcome_line(operation), soft_wrap=True)
    return _EXIT.get(operation.state, EXIT_FAILED)


def print_operation(console: Console, operation: OperationView, *, as_json: bool) -> None:
    """An operation as it is now."""
    if as_json:
        console.print(
            msgspec.json.encode(operation).decode(), soft_wrap=True, highlight=False, markup=False
        )
        return
    line = f"{operation.id}: {describe_change(operation)}: {operation.state}"
    console.print(line, soft_wrap=True)


def print_preview(console: Console, preview: ChangePreview, *, as_json: bool) -> None:
    """What a change would move."""
    if as_json:
        text = msgspec.json.encode(preview).decode()
        console.print(text, soft_wrap=True, highlight=False, markup=False)
        return
    for line in describe_preview(preview):
        console.print(line, soft_wrap=True)


def is_over(operation: OperationView) -> bool:
    return operation.state in _EXIT


class PhaseLines:
    """Prints a line for each phase when it is over, where there is no terminal to redraw."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._shown: set[str] = set()

    def __call__(self, operation: OperationView) -> None:
        for name, seconds in operation.phases.items():
            over = name != operation.phase or is_over(operation)
            if over and name not in self._shown:
                self._shown.add(name)
                self._console.print(phase_line(name, seconds))


def _follow(
    control: Control,
    operation: OperationView,
    show: Callable[[OperationView], None],
    sleep: Callable[[float], None],
) -> OperationView:
    show(operation)
    while not is_over(operation):
        sleep(POLL_S)
        operation = control.operation(operation.id)
        show(operation)
    return operation
