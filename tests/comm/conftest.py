"""Buffers of several ranks in one process, each driven by its own thread."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.comm_local import Local


@pytest.fixture
def local() -> Iterator[Local]:
    with Local() as ranks:
        yield ranks
