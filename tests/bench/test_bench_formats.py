"""`flexpert bench formats`: the formats compute one function, and what it says of them."""

from __future__ import annotations

import msgspec
import pytest
import torch
from rich.console import Console
from transformers import GptOssConfig, PreTrainedConfig
from typer.testing import CliRunner

from flexpert.bench.formats import format_run
from flexpert.bench.formats.format_report import formats_text
from flexpert.cli.main import app
from flexpert.errors import ConfigError


def small(layers: int) -> PreTrainedConfig:
    return GptOssConfig(
        num_hidden_layers=layers,
        vocab_size=320,
        num_local_experts=4,
        num_experts_per_tok=2,
        hidden_size=96,
        intermediate_size=64,
        head_dim=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        rope_parameters={"rope_theta": 10000.0, "rope_type": "default"},
        layer_types=["full_attention"] * layers,
    )


def test_formats_take_turns_and_compute_one_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(format_run, "gpt_oss_20b", small)
    report = format_run.run_formats(
        ["none", "mxfp4", "int8"],
        torch.device("cpu"),
        layers=2,
        batch=3,
        context=20,
        steps=2,
        seed=0,
        note=lambda said: None,
    )
    whole, packed, eighths = report.points
    assert report.correct
    assert 0 < eighths.error < 0.1  # rounded once more, and the others are not
    assert packed.error < 0.01
    assert 3.2 < whole.expert_bytes / packed.expert_bytes < 3.76
    assert whole.all_bytes - packed.all_bytes == whole.expert_bytes - packed.expert_bytes
    console = Console(width=160)
    with console.capture() as capture:
        console.print(formats_text(report))
    assert f"{packed.all_bytes / whole.all_bytes:.3f}" in capture.get()
    wrong = msgspec.structs.replace(packed, error=0.2)
    console = Console(width=160)
    with console.capture() as capture:
        console.print(formats_text(msgspec.structs.replace(report, points=[whole, wrong])))
    assert "WRONG" in capture.get()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--formats", "fp8"], "on cpu there are none, mxfp4, int8"),
        (["--device", "cuda", "--formats", "none,int8"], "--formats int8: on cuda there are none"),
        (["--formats", ""], "on cpu there are"),
    ],
)
def test_what_a_device_does_not_compute_is_refused(arguments: list[str], says: str) -> None:
    result = CliRunner().invoke(app, ["bench", "formats", *arguments])
    assert isinstance(result.exception, ConfigError)
    assert says in str(result.exception)
