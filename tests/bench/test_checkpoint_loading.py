"""`flexpert bench load` reads what it says, and the checkpoint it makes is one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from flexpert.bench import random_checkpoint
from flexpert.bench.checkpoint_loading import LoadPlan, run_loading
from flexpert.bench.checkpoint_loading_report import loading_text
from flexpert.bench.model_shapes import qwen3_30b_a3b
from flexpert.bench.random_checkpoint import make_random_checkpoint
from flexpert.errors import FlexpertError
from flexpert.models.source import ModelSource
from flexpert.models.weight_reading import read_everything


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A random checkpoint of several files, of a narrow model."""

    def narrow(layers: int) -> Any:
        config = qwen3_30b_a3b(layers)
        config.hidden_size, config.moe_intermediate_size, config.num_experts = 64, 32, 16
        config.vocab_size = 500
        return config

    monkeypatch.setattr(random_checkpoint, "qwen3_30b_a3b", narrow)
    monkeypatch.setattr(random_checkpoint, "_SHARD_BYTES", 2 * 10**6)
    make_random_checkpoint(tmp_path / "made", 8 * 10**6)
    return tmp_path / "made"


def test_a_random_checkpoint_is_whole_and_has_the_size(small: Path) -> None:
    source = ModelSource.open(str(small))
    files = source.checkpoint.files
    assert len(files.names) > 2
    assert 7e6 < files.nbytes <= 8e6
    assert source.accounting.used_nbytes == files.nbytes
    assert source.info.dtype == torch.bfloat16
    assert not source.accounting.skipped
    read = []
    read_everything(source, read.append)
    assert sum(read) == source.info.moe_layers * 16 * source.expert_nbytes()
    assert source.load_experts(0, [3])[3].down.float().std() == pytest.approx(0.02, rel=0.1)


@pytest.mark.slow
def test_ranks_load_their_shares_in_turn_with_dd(small: Path) -> None:
    notes: list[str] = []
    plan = LoadPlan(str(small), ranks=2, repeats=1, caches=("cold", "warm"))
    report = run_loading(plan, notes.append)
    assert [turn.cache for turn in report.turns] == ["cold", "warm"]
    assert len(notes) == 2
    assert report.nbytes == sum(file.stat().st_size for file in small.glob("*.safetensors"))
    for turn in report.turns:
        assert turn.dd_s > turn.dd_cpu_s > 0
        assert len(turn.ranks) == 2
        for rank in turn.ranks:
            assert rank.open_s + rank.dense_s + rank.experts_s <= turn.load_s
            assert rank.peak > 0
    console = Console(width=200)
    with console.capture() as captured:
        console.print(loading_text(report))
    assert "cold" in captured.get()


@pytest.mark.slow
def test_a_checkpoint_that_cannot_be_served_says_so(tmp_path: Path) -> None:
    with pytest.raises(FlexpertError, match=r"config\.json"):
        run_loading(LoadPlan(str(tmp_path), 2, 1, ("cold",)), lambda line: None)
