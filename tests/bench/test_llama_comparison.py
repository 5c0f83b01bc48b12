"""The comparison with llama.cpp: its file, whether it computes the same, its process."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import MixtralConfig, Qwen3MoeConfig

from flexpert.bench.llama.gguf_layout import check_fits, vocabulary
from flexpert.bench.llama.greedy_agreement import GreedyAnswer, agreement, check_same_model
from flexpert.bench.llama.llama_report import llama_text
from flexpert.bench.llama.llama_run import (
    HeldMemory,
    LlamaPlan,
    StreamsComparison,
    run_llama_comparison,
)
from flexpert.bench.llama.llama_server import LlamaSettings, check_available, llama_server
from flexpert.bench.offered_load import OfferedLoad
from flexpert.bench.other_server import ServerTurn
from flexpert.bench.serve import ServeMeasured
from flexpert.bench.statistics import Figures
from flexpert.errors import ConfigError, FlexpertError, ModelError
from flexpert.models.checkpoint import TensorFiles
from flexpert.models.source import locate

PROGRAM = os.environ.get("LLAMA_SERVER") or shutil.which("llama-server")


def data(files: TensorFiles, key: str) -> bytes:
    return files.read(key).view(torch.uint8).numpy().tobytes()


def test_the_file_has_the_checkpoints_values(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    from flexpert.bench.llama.gguf_writer import write_gguf

    write_gguf(locate("tiny"), tmp_path / "tiny.gguf")
    reader = gguf.GGUFReader(tmp_path / "tiny.gguf")
    there = {tensor.name: tensor for tensor in reader.tensors}
    files = TensorFiles(locate("tiny"))
    assert sum(tensor.n_elements for tensor in reader.tensors) == files.nbytes // 2
    for name, key in {
        "token_embd.weight": "model.embed_tokens.weight",
        "blk.2.attn_q.weight": "model.layers.2.self_attn.q_proj.weight",
    }.items():
        values = there[name].data.tobytes()
        assert values == data(files, key)
    stacked = there["blk.3.ffn_down_exps.weight"]
    assert stacked.shape.tolist() == [128, 256, 16]  # fastest first
    expert = stacked.data.reshape(16, -1)[7].tobytes()
    assert expert == data(files, "model.layers.3.mlp.experts.7.down_proj.weight")
    norm = there["blk.0.attn_k_norm.weight"]
    assert norm.tensor_type == gguf.GGMLQuantizationType.F32
    assert (
        norm.data.tolist() == files.read("model.layers.0.self_attn.k_norm.weight").float().tolist()
    )
    assert reader.fields["qwen3moe.rope.freq_base"].contents() == 10000.0
    assert len(reader.fields["tokenizer.ggml.tokens"].contents()) == 4096


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (MixtralConfig(), "type 'mixtral'"),
        (Qwen3MoeConfig(norm_topk_prob=False), "do not sum to 1"),
        (Qwen3MoeConfig(norm_topk_prob=True, mlp_only_layers=[1]), "layers without experts"),
    ],
)
def test_other_models_are_refused(config: object, says: str) -> None:
    with pytest.raises(ModelError, match=says):
        check_fits(config)


def test_ids_without_a_token_are_unused() -> None:
    found = vocabulary({"a": 0, "<end>": 2, "beyond": 9}, [2], [["a", "b"]], 4)
    assert found.tokens == ["a", "[unused 1]", "<end>", "[unused 3]"]
    assert found.kinds == [1, 5, 3, 5]
    assert found.merges == ["a b"]


def answers(*tokens: Sequence[int]) -> list[GreedyAnswer]:
    return [GreedyAnswer(list(each), {each[0]: -1.0, 77: -1.06, 88: -1.2}) for each in tokens]


def test_agreement_counts_what_is_the_same_and_what_rounding_explains() -> None:
    found = agreement(answers([1, 2, 3], [4, 5, 6], [7, 8, 9]), [[1, 2, 3], [4, 5, 0], [77, 8, 9]])
    assert (found.first, found.near, found.whole, found.same_tokens) == (2, 1, 1, 5 / 3)
    check_same_model(found)


@pytest.mark.parametrize("third", [[88, 8, 9], [99, 8, 9]])
def test_another_first_token_refuses_the_ratios(third: list[int]) -> None:
    """Likely, but too far from ours; not even likely."""
    found = agreement(answers([1, 2], [4, 5], [7, 8]), [[1, 2], [4, 5], third])
    with pytest.raises(FlexpertError, match="of 3 prompts 2 have the same first token and 0 one"):
        check_same_model(found)


def test_rounding_does_not_explain_most_first_tokens() -> None:
    found = agreement(answers([1, 2], [4, 5]), [[1, 2], [77, 5]])
    with pytest.raises(FlexpertError, match="no ratio"):
        check_same_model(found)


def turn(tokens_per_s: float) -> Figures:
    return Figures(
        requests=1,
        failed=0,
        duration_s=1.0,
        output_tokens=1,
        requests_per_s=1.0,
        output_tokens_per_s=tokens_per_s,
        first_token_ms=None,
        inter_token_ms=None,
        end_to_end_ms=None,
    )


def test_the_ratio_is_the_median_of_pairs() -> None:
    speeds = [(100.0, 50.0), (90.0, 100.0), (30.0, 20.0)]
    pairs = [ServerTurn(turn(mine), turn(other)) for mine, other in speeds]
    found = StreamsComparison.of(4, pairs, HeldMemory(ours=2, theirs=1))
    assert found.ratios == [2.0, 0.9, 1.5]
    assert found.ratio == 1.5


def test_without_a_program_nothing_begins(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no program"):
        check_available(tmp_path / "llama-server")


def test_a_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    program = tmp_path / "llama-server"
    program.write_text('#!/bin/sh\necho "unknown model architecture: $2"\nexit 3\n')
    program.chmod(0o755)

    async def start() -> None:
        settings = LlamaSettings(
            program=program, model=Path("m.gguf"), threads=2, slots=4, slot_tokens=256
        )
        async with llama_server(settings):
            pytest.fail("it started")

    with pytest.raises(FlexpertError, match=r"exit status 3(.|\n)*architecture: m\.gguf"):
        asyncio.run(start())


@pytest.mark.slow
@pytest.mark.skipif(PROGRAM is None, reason="needs llama-server on the path or in LLAMA_SERVER")
def test_both_compute_the_same_and_are_measured_in_turn() -> None:
    pytest.importorskip("gguf")
    lines: list[str] = []
    load = OfferedLoad(count=4, input_tokens=16, output_tokens=8, concurrency=2, warmup=0, seed=1)
    plan = LlamaPlan(
        load=load,
        measured=ServeMeasured(threads=1),
        program=check_available(Path(str(PROGRAM))),
        streams=[1, 2],
        pairs=2,
    )
    report = run_llama_comparison(plan, lines.append)
    assert report.agreement.first + report.agreement.near == report.agreement.prompts == 8
    assert [one.streams for one in report.streams] == [1, 2]
    assert report.failed == 0
    for one in report.streams:
        assert len(one.ratios) == 2
        assert min(one.memory.ours, one.memory.theirs) > 2**24
        tokens = {each.output_tokens for pair in one.pairs for each in (pair.ours, pair.theirs)}
        assert tokens == {4 * 8}
    assert llama_text(report)
