"""`flexpert bench layer` and `bench decode`: what they say without a GPU, and how figures read."""

from __future__ import annotations

import msgspec
import pytest
import torch
from support.rendered import shown
from typer.testing import CliRunner

from flexpert.bench.gpu.gpu_device import MeasuredGpu, gpu_of_rank, most_sharing
from flexpert.bench.machine import this_machine
from flexpert.bench.statistics import SpreadUs
from flexpert.cli.main import app
from flexpert.errors import ConfigError

GPU = MeasuredGpu("H", "13.0", "2.11", "3.6", bytes_per_s=3e12, flops=8e14)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("command", ["layer", "decode"])
def test_without_a_gpu_the_reason_is_said_before_anything_is_built(command: str) -> None:
    result = CliRunner().invoke(app, ["bench", command])
    assert isinstance(result.exception, ConfigError)
    assert "no NVIDIA GPU" in str(result.exception)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["layer", "--tokens", "8,x"], "--tokens 8,x: positive numbers"),
        (["decode", "--batch", "0"], "--batch 0: positive numbers"),
        (["layer", "--ranks", "1,33"], "--ranks 1,33: at most 32 ranks exchange"),
        (["decode", "--output", "/nowhere/at/all.json"], "there is no folder"),
        (["decode", "--layers", "49"], "--layers 49: qwen3-30b-a3b has 48"),
        (["decode", "--compare", "expanded"], "with qwen3-30b-a3b there is transformers, or none"),
        (["decode", "--shape", "deepseek-v3", "--ranks", "2"], "expanded times one rank"),
    ],
)
def test_wrong_flags_are_named_first(arguments: list[str], says: str) -> None:
    result = CliRunner().invoke(app, ["bench", *arguments])
    assert isinstance(result.exception, ConfigError)
    assert says in str(result.exception)


@pytest.mark.parametrize("command", ["layer", "decode"])
def test_help_has_examples(command: str) -> None:
    result = CliRunner().invoke(app, ["bench", command, "--help"])
    assert f"flexpert bench {command} --" in result.output


def test_the_roofline_is_memory_or_arithmetic_whichever_takes_longer() -> None:
    assert GPU.roofline_s(3e9, 8e9) == pytest.approx(1e-3)
    assert GPU.roofline_s(3e6, 8e11) == pytest.approx(1e-3)


def test_ranks_are_dealt_out_to_the_gpus_and_share_where_there_are_fewer() -> None:
    assert [gpu_of_rank(rank, 2) for rank in range(4)] == [0, 1, 0, 1]
    assert [gpu_of_rank(rank, 8) for rank in range(4)] == [0, 1, 2, 3]
    for ranks, gpus in ((1, 1), (4, 1), (4, 2), (4, 3), (2, 2), (5, 4)):
        places = [gpu_of_rank(rank, gpus) for rank in range(ranks)]
        assert most_sharing(ranks, gpus) == max(map(places.count, places))


def test_spread_is_of_the_sorted_times() -> None:
    spread = SpreadUs.of([3.0, 1.0, 2.0])
    assert spread.p50 == 2.0
    assert 1.0 < spread.p10 < spread.p90 < 3.0


@pytest.mark.skipif(torch.cuda.is_available(), reason="it is a test of the interpreter")
@pytest.mark.parametrize("quantise", [False, True], ids=["whole", "fp8"])
def test_a_layer_is_the_function_that_baselines_compute(quantise: bool) -> None:
    pytest.importorskip("triton", reason="what is measured needs the package triton")
    from flexpert.bench.gpu.layer import Layer
    from flexpert.bench.gpu.layer_report import EXCHANGED, OURS
    from flexpert.bench.gpu.layer_weights import LayerShape, LayerWeights

    torch.manual_seed(0)
    shape = LayerShape("small", hidden=160, inter=48, experts=6, topk=2)
    cpu = torch.device("cpu")
    layer = Layer.build(
        LayerWeights.drawn(shape, cpu, seed=0, quantise=quantise, dtype=torch.float32)
    )
    assert (layer.experts[0].gate_up.dtype == torch.float8_e4m3fn) == quantise
    x = torch.randn(1, 5, shape.hidden)
    with torch.inference_mode(), layer.exchanged(5) as exchanged:
        layer.local.expect(5)
        for name, moe in ((OURS, layer.local), (EXCHANGED, exchanged), ("eager", None)):
            y = layer.block(name, moe, 5)(x)[0]
            assert layer.error(y, x[0]) < 1e-5
            assert layer.error(y.roll(1, 0), x[0]) > 0.1  # it can tell


def test_tables_show_factors_and_say_what_is_wrong() -> None:
    pytest.importorskip("triton", reason="what is measured needs the package triton")
    from flexpert.bench.gpu.decode import DecodePoint, DecodeReport
    from flexpert.bench.gpu.gpu_report import decode_text, layer_text
    from flexpert.bench.gpu.layer_report import LayerPoint, LayerReport, LayerResult
    from flexpert.bench.gpu.layer_weights import SHAPES

    layer = LayerReport(
        machine=this_machine(),
        gpu=GPU,
        points=[
            LayerPoint(
                shape=SHAPES["qwen3-30b-a3b"],
                tokens=64,
                active=126.0,
                roofline_us=400.0,
                results=[
                    LayerResult(
                        baseline="flexpert", us=SpreadUs(400, 440, 500), error=0.004, times_ours=1
                    ),
                    LayerResult(baseline="eager", skipped="differs by 0.5", wrong=True),
                ],
            )
        ],
    )
    text = shown(layer_text(layer))
    assert "440" in text
    assert "1.10" in text  # times the roofline
    assert "wrong: differs by 0.5" in text
    assert not layer.correct
    assert msgspec.json.decode(msgspec.json.encode(layer), type=LayerReport) == layer

    point = DecodePoint(
        batch=64,
        active=126.0,
        roofline_ms=20.0,
        ours_us=SpreadUs(24000, 25000, 26000),
        captures=4,
        compared_us=SpreadUs(90000, 100000, 110000),
    )
    decode = DecodeReport(
        machine=this_machine(),
        gpu=GPU,
        layers=48,
        context=512,
        steps=30,
        error=0.01,
        build_s=1.0,
        captures=4,
        capture_s=2.0,
        points=[point, msgspec.structs.replace(point, compared_us=None, skipped="no room")],
    )
    text = shown(decode_text(decode))
    assert "1.25" in text  # times the roofline
    assert "GPUs" in text
    assert "4.00" in text  # transformers
    assert "2,560" in text  # tokens/s
    assert "no room" in text
    assert decode.correct
    alone = shown(decode_text(msgspec.structs.replace(decode, compared="none")))
    assert "2,560" in alone
    assert "4.00" not in alone
    latents = msgspec.structs.replace(
        decode, shape="deepseek-v3", compared="expanded", kv_bytes=4608, compared_kv_bytes=327680
    )
    text = shown(decode_text(latents))
    assert "DeepSeek-V3's shapes" in text
    assert "expanded ms" in text
    assert "4,608 bytes" in text
    assert "WRONG" in shown(decode_text(msgspec.structs.replace(decode, error=0.5)))
