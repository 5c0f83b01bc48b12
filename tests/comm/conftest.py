"""Buffers of several ranks in one process, each driven by its own thread."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from support.comm_local import Local


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def local() -> Iterator[Local]:
    with Local() as ranks:
        yield ranks
