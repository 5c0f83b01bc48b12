"""A service that is none: canned answers over real HTTP."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.fake_service import FakeService, answering


@pytest.fixture
def service() -> Iterator[FakeService]:
    fake = FakeService()
    with answering(fake):
        yield fake
