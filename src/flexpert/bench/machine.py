"""What a figure was measured on."""

from __future__ import annotations

import os
import platform
import re
from datetime import UTC, datetime
from pathlib import Path

import msgspec


class Machine(msgspec.Struct, frozen=True):
    """cores: those this process may use."""

    cores: int
    cpu: str
    system: str
    python: str
    date: str

    def line(self) -> str:
        return f"{self.cores} cores of {self.cpu}, {self.system}, Python {self.python}, {self.date}"


def this_machine() -> Machine:
    """As it is now."""
    return Machine(
        cores=len(os.sched_getaffinity(0)),
        cpu=_cpu_model(),
        system=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        date=datetime.now(UTC).strftime("%Y-%m-%d"),
    )


def usable_cores() -> list[int]:
    """The numbers of the cores that this process may use, those of one physical core in a row."""
    return sorted(os.sched_getaffinity(0), key=lambda core: (_first_sibling(core), core))


def _first_sibling(core: int) -> int:
    """The lowest number of the hardware threads that share its physical core."""
    topology = Path(f"/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list")
    try:
        return int(re.split("[,-]", topology.read_text())[0])
    except (OSError, ValueError):
        return core


def _cpu_model() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip().lower() == "model name":
            return value.strip()
    return platform.processor() or platform.machine()
