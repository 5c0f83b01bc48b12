"""Checkpoints of the session, made once each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.checkpoints import make_checkpoint

Checkpoints = Callable[..., Path]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    """checkpoint(family, dtype) → directory."""
    made: dict[tuple[str, torch.dtype], Path] = {}

    def get(family: str, dtype: torch.dtype = torch.float32) -> Path:
        if (family, dtype) not in made:
            directory = tmp_path_factory.mktemp(family)
            made[family, dtype] = make_checkpoint(family, directory, dtype)
        return made[family, dtype]

    return get
