"""`import nixl_ep` finds our buffer once it was installed, and only then."""

from __future__ import annotations

import subprocess
import sys

import pytest


def run(code: str) -> str:
    """Output of a Python program of its own: what is imported stays there."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.slow
def test_every_way_to_import_it_leads_to_ours() -> None:
    code = """
from flexpert.compat import install_nixl_ep
install_nixl_ep()
install_nixl_ep()
import importlib.util
import torch
import nixl_ep, nixl_ep.buffer, nixl_ep.utils
from nixl_ep import Buffer, Config, EventHandle, EventOverlap, topk_idx_t
from nixl_ep.buffer import DEFAULT_TIMEOUT_MS
from flexpert.compat import nixl_ep as compat
assert nixl_ep is compat and importlib.util.find_spec("nixl_ep") is not None
assert Buffer is nixl_ep.buffer.Buffer is compat.Buffer
assert EventOverlap is nixl_ep.utils.EventOverlap
assert EventHandle is nixl_ep.utils.EventHandle is nixl_ep.buffer.EventHandle
EventOverlap(EventHandle()).current_stream_wait()
assert topk_idx_t is torch.int32 and DEFAULT_TIMEOUT_MS == 30000
print(Config(20, 6, 256, 6, 128).num_sms, Buffer.__module__)
"""
    assert run(code) == "20 flexpert.compat.nixl_ep.buffer"


@pytest.mark.slow
def test_a_real_nixl_ep_that_is_in_use_is_not_replaced() -> None:
    code = """
import sys, types
theirs = sys.modules["nixl_ep"] = types.ModuleType("nixl_ep")
theirs.__file__ = "/site-packages/nixl_ep/__init__.py"
from flexpert.compat import install_nixl_ep
try:
    install_nixl_ep()
except RuntimeError as error:
    print(error)
assert sys.modules["nixl_ep"] is theirs and "nixl_ep.buffer" not in sys.modules
"""
    said = run(code)
    assert "imported already, from /site-packages/nixl_ep/__init__.py" in said
    assert "install_nixl_ep() first" in said
