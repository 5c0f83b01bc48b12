"""`flexpert doctor`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from flexpert.cli.options import Json
from flexpert.errors import ConfigError

if TYPE_CHECKING:
    from flexpert.trials.doctor.host_checks import Device

DOCTOR_EXAMPLES = (
    "flexpert doctor",
    "flexpert doctor --device cuda --port 9000",
    "flexpert doctor --json | jq '.findings[] | select(.verdict != \"fine\")'",
)


def doctor(
    device: Annotated[
        str, typer.Option("--device", metavar="cpu|cuda", help="What is to be served on.")
    ] = "cpu",
    port: Annotated[
        int, typer.Option("--port", min=1, max=65535, help="That is to be listened on.")
    ] = 8000,
    json_: Json = False,
) -> None:
    """Say what of flexpert works on this machine, what does not, and what to do about it.

    Looks at cores, memory, limits, the C parts, packages, GPUs, NIXL, the port and the clock.
    Exit status: 0 serving works, also without something; 1 it cannot work.
    """
    if device not in ("cpu", "cuda"):
        raise ConfigError(f"--device {device!r} must be cpu or cuda")
    import flexpert
    from flexpert.display.output import EXIT_FAILURE, show_report
    from flexpert.trials.doctor.doctor_report import doctor_text, report_of
    from flexpert.trials.doctor.host_checks import findings
    from flexpert.trials.doctor.host_facts import gather

    chosen: Device = "cuda" if device == "cuda" else "cpu"
    report = report_of(findings(gather(port), chosen), chosen, flexpert.__version__)
    show_report(report, doctor_text(report), as_json=json_, output=None)
    raise typer.Exit(0 if report.works else EXIT_FAILURE)
