"""What needs an NVIDIA GPU: skipped without one. `make test-gpu` runs it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = pytest.mark.skip(reason="there is no NVIDIA GPU")
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            item.add_marker(pytest.mark.timeout(600))
            if not torch.cuda.is_available():
                item.add_marker(missing)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Of transformers on the host, which computes tiny models: many would wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture
def shared_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Several ranks may run at once: on GPUs of their own, or on one GPU under NVIDIA's MPS."""
    if torch.cuda.device_count() > 1:
        yield
        return
    for name in ("PIPE", "LOG"):
        folder = tmp_path / name
        folder.mkdir()
        monkeypatch.setenv(f"CUDA_MPS_{name}_DIRECTORY", str(folder))
    subprocess.run(["nvidia-cuda-mps-control", "-d"], check=True, timeout=60)
    try:
        yield
    finally:
        subprocess.run(
            ["nvidia-cuda-mps-control"], input="quit\n", text=True, timeout=60, env=os.environ
        )
