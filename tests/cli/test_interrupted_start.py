"""Promises to who presses Ctrl-C while a service starts: it ends at once, quietly, wholly."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from support.waiting import wait_until

Service = subprocess.Popen[str]


def has_mapped(library: str) -> Callable[[Service], bool]:
    """The process has come so far in its imports."""
    return lambda service: library in Path(f"/proc/{service.pid}/maps").read_text()


def has_children(service: Service) -> bool:
    return bool(psutil.Process(service.pid).children())


def has_ranks(service: Service) -> bool:
    return len(psutil.Process(service.pid).children(recursive=True)) > 2


def session(leader: int) -> Iterator[int]:
    for process in psutil.process_iter():
        with contextlib.suppress(OSError, psutil.Error):
            if os.getsid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE:
                yield process.pid


@pytest.mark.parametrize(
    "moment",
    [
        pytest.param(has_mapped("pydantic_core"), id="commands are imported"),
        pytest.param(has_mapped("uvloop"), id="the service is imported"),
        pytest.param(has_children, id="the fork server is there"),
        pytest.param(
            has_mapped("_multiarray_umath"), id="the head is imported", marks=pytest.mark.slow
        ),
        pytest.param(has_ranks, id="ranks are started", marks=pytest.mark.slow),
    ],
)
def test_ctrl_c_during_the_start_is_quiet(moment: Callable[[Service], bool]) -> None:
    service = subprocess.Popen(
        [sys.executable, "-m", "flexpert", "serve", "--port", "0", "--ranks", "2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        wait_until(lambda: moment(service), timeout_s=60)
        os.killpg(service.pid, signal.SIGINT)  # as a terminal sends it: to all of the group
        out, err = service.communicate(timeout=30)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(service.pid, signal.SIGKILL)
    assert service.returncode in (-signal.SIGINT, 128 + signal.SIGINT)  # 130 to a shell
    logged = [line for line in err.splitlines() if " INFO " not in line]
    assert not logged
    assert "ready" not in out
    wait_until(lambda: not list(session(service.pid)), timeout_s=5)


def test_where_it_is_ignored_it_stays_so() -> None:
    """As `nohup` and background jobs of scripts start programs."""
    code = "import signal, flexpert.__main__; print(signal.getsignal(signal.SIGINT) is {})"
    ignoring = f"import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); {code}"
    for program, handler in ((ignoring, "signal.SIG_IGN"), (code, "signal.SIG_DFL")):
        ran = [sys.executable, "-c", program.format(handler)]
        assert subprocess.run(ran, capture_output=True, text=True, check=True).stdout == "True\n"
