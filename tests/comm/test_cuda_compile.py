"""Exchange, experts' products and attention compile for Hopper; needs Triton, no GPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed: pip install flexpert[cuda]")

SCRIPT = Path(__file__).parents[2] / "tools" / "gpu" / "compile_kernels.py"


@pytest.mark.slow
def test_kernels_spill_nothing_and_move_rows_16_bytes_at_a_time() -> None:
    ran = subprocess.run(
        [sys.executable, SCRIPT],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert ran.returncode == 0, ran.stderr
    wide = {
        line[:22].strip(): int(found.group(1))
        for line in ran.stdout.splitlines()
        if (found := re.search(r"(\d+) accesses of 16 bytes", line))
    }
    assert len([name for name in wide if name.startswith(("gate_up", "down"))]) == 24
    latents = {name: count for name, count in wide.items() if name.startswith("mla")}
    assert len(latents) == 14
    assert min(latents.values()) >= 17
    # a pointer that the compiler does not know to be aligned is read and written byte by byte
    assert {"choose_tokens bf16", "choose_tokens float32"} < wide.keys()
    assert min(wide[f"few rows {kind}"] for kind in ("gated", "down")) >= 16
    assert len([name for name in wide if name.startswith("prompts")]) == 10
    assert wide["send_dispatch fp8"] >= 1
    assert wide["send_dispatch rows"] >= 2
    assert wide["pack_rows fp8"] >= 17
    assert wide["pack_rows rows"] >= 17
    assert wide["send_combine rank"] >= 9
    assert wide["send_combine home"] >= 8
    if triton.__version__ < "3.7":  # 3.9 takes most reads of the others two bytes at a time
        assert wide["send_combine home"] >= 16
        assert wide["reduce rank"] >= 9
        assert wide["reduce home"] >= 17


@pytest.mark.slow
def test_kernels_that_must_agree_bit_for_bit_use_one_instruction_of_the_tensor_cores() -> None:
    """With others, few rows would be multiplied by another one than many, and rounded otherwise."""
    ran = subprocess.run(
        [sys.executable, SCRIPT, "--deterministic"],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert ran.returncode == 0, ran.stderr
    lines = [line for line in ran.stdout.splitlines() if line.startswith("fixed")]
    assert len(lines) == 24 + 10 + 9
    for line in lines:
        assert re.findall(r"wgmma m\d+|mma\.sync\S+", line) == ["wgmma m64"], line
