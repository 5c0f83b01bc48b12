"""What `flexpert doctor` prints."""

from __future__ import annotations

import msgspec
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from flexpert.trials.doctor.host_checks import Device, Finding, works

_MARKS = {
    "fine": "[green]fine[/]",
    "without": "[yellow]works without[/]",
    "broken": "[red]broken[/]",
}


class DoctorReport(msgspec.Struct, frozen=True):
    """works: serving on that device can work. findings: each a line of the table."""

    flexpert: str
    device: Device
    works: bool
    findings: list[Finding]


def report_of(found: list[Finding], device: Device, version: str) -> DoctorReport:
    return DoctorReport(version, device, works(found), found)


def doctor_text(report: DoctorReport) -> RenderableType:
    """A table, and what it comes to."""
    table = Table("what", "", "found", box=None, pad_edge=False)
    for one in report.findings:
        said = [escape(one.found)]
        if one.means:
            said.append(f"[dim]{escape(one.means)}[/]")
        if one.mend and one.verdict != "fine":
            said.append(f"→ {escape(one.mend)}")
        table.add_row(one.check, _MARKS[one.verdict], "\n".join(said))
    how = f"--device {report.device}"
    if report.works:
        end = f"[green]serving works here[/] ({how}); a first look: flexpert demo"
    else:
        broken = ", ".join(one.check for one in report.findings if one.verdict == "broken")
        end = f"[red]serving cannot work here[/] ({how}): {escape(broken)}"
    return Group(table, "", end)
