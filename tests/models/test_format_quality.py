"""What a format of experts costs in quality: logits and bits per byte of the embedded model."""

from __future__ import annotations

import functools
import math
from pathlib import Path

import pytest
import torch
from support.checkpoints import single_runner
from torch import Tensor

from flexpert.models.source import TINY, ExpertFormat, ModelSource

SEQUENCES, TOKENS = 4, 200


@functools.cache
def text() -> list[list[int]]:
    """Prose of this project, which the model has not seen."""
    prose = (Path(__file__).parents[2] / "ARCHITECTURE.md").read_text()
    ids = ModelSource.open(TINY).tokenizer()(prose[: 8 * SEQUENCES * TOKENS])["input_ids"]
    return [ids[i * TOKENS : (i + 1) * TOKENS] for i in range(SEQUENCES)]


@functools.cache
def logits(experts: ExpertFormat) -> Tensor:
    """[sequences, tokens, vocab]"""
    runner = single_runner(TINY, experts=experts, blocks=128)
    found = runner.step(dict(enumerate(text())))
    return torch.stack([found[i] for i in range(SEQUENCES)])


def figures(experts: ExpertFormat) -> tuple[float, float, float]:
    """(error of the logits relative to bf16's, bits per byte, by how many bits a token's
    distribution differs: the Kullback-Leibler divergence from bf16's, mean)"""
    ours, whole = logits(experts), logits("unquantized")
    read = ModelSource.open(TINY).tokenizer().decode
    nbytes = sum(len(read(ids[1:]).encode()) for ids in text())
    surprise = torch.nn.functional.cross_entropy(
        ours[:, :-1].flatten(0, 1), torch.tensor(text())[:, 1:].flatten(), reduction="sum"
    )
    apart = torch.nn.functional.kl_div(
        ours.log_softmax(-1), whole.log_softmax(-1), reduction="none", log_target=True
    )
    return (
        float((ours - whole).norm() / whole.norm()),
        float(surprise) / math.log(2) / nbytes,
        float(apart.sum(-1).mean()) / math.log(2),
    )


@pytest.mark.parametrize(
    ("experts", "most_error", "most_bits"), [("int8", 0.02, 0.005), ("mxfp4", 0.15, 0.1)]
)
def test_a_format_costs_little_of_the_quality(
    experts: ExpertFormat, most_error: float, most_bits: float
) -> None:
    (error, bits, apart), (_, whole, same) = figures(experts), figures("unquantized")
    print(
        f"{experts}: logits differ by {error:.4f}, {bits:.4f} bits per byte (bf16: {whole:.4f}), "
        f"distributions by {apart:.5f} bits a token"
    )
    assert most_error / 10 < error < most_error
    assert abs(bits - whole) < most_bits
    assert same < 1e-6 < apart < most_bits
