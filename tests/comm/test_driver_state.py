"""Whether a process has opened CUDA's driver; the driver is a library of the test's own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

_DRIVER = "int cuDeviceGetCount(int *count) { *count = 1; return STATUS; }"
_ASK = (
    "import ctypes, sys; from flexpert.comm.cuda.driver_state import driver_is_open; "
    "keep = ctypes.CDLL(sys.argv[1]) if sys.argv[1] else None; print(driver_is_open())"
)


@pytest.mark.parametrize(("status", "is_open"), [("", False), ("3", False), ("0", True)])
def test_the_driver_is_open_once_it_was_initialised(
    tmp_path: Path, status: str, is_open: bool
) -> None:
    """status: what the driver answers; "": it is not loaded."""
    library = tmp_path / "driver.so" if status else ""
    if library:
        source = tmp_path / "driver.c"
        source.write_text(_DRIVER.replace("STATUS", status))
        built = ["cc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", source, "-o", library]
        subprocess.run(built, check=True)
    asked = subprocess.run(
        [sys.executable, "-c", _ASK, str(library)], capture_output=True, text=True, check=True
    )
    assert asked.stdout.strip() == str(is_open)
