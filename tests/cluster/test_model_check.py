"""`flexpert check` says what a service would do with a checkpoint, without one."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from support.checkpoints import make_checkpoint
from support.draft_checkpoints import with_draft_layer

from flexpert.cli.main import main
from flexpert.cluster.model_check import ModelCheck, check_model
from flexpert.config import Config
from flexpert.display.model_check_text import check_text
from flexpert.engine.memory_plan import planned_memory
from flexpert.models.source import ModelSource, locate


def settings(path: object, tokenizer: bool = False, **sections: dict[str, Any]) -> Config:
    model = {"model": str(path), "skip_tokenizer_init": not tokenizer}
    return Config.model_validate({"model": model, **sections})


def shown(found: ModelCheck) -> str:
    console = Console(width=400, file=sys.stdout)
    with console.capture() as captured:
        console.print(check_text(found))
    return captured.get()


def test_the_memory_of_each_rank_is_what_the_service_plans() -> None:
    config = settings("tiny", cluster={"ranks": 3, "max_ranks": 4})
    found = check_model(config)
    assert found.served
    source = ModelSource.open("tiny")
    assert sum(rank.experts for rank in found.ranks) == source.info.moe_layers * source.info.experts
    for rank in found.ranks:
        assert rank.host == planned_memory(source, config.engine, 4, rank.experts, 3)
        assert rank.device is None
    text = shown(found)
    assert "would be served" in text
    assert "qwen3_moe (Qwen3MoeForCausalLM)" in text
    assert "rank 0" in text


def test_states_of_sequences_are_planned_and_gpus_do_not_fix_their_order(tmp_path: Path) -> None:
    path = make_checkpoint("qwen3_next", tmp_path)
    few, many = (
        check_model(settings(path, engine={"max_running": n, "max_tokens_per_step": 64}))
        for n in (4, 14)
    )
    family = many.family
    assert few.served
    assert many.served
    assert family is not None
    assert (family.layers, family.stateful_layers) == (4, 3)
    state = 3 * (4 * 16 * 20 * 4 + (2 * 2 * 16 + 4 * 20) * 4 * 4)  # float32: recurrent, convolution
    assert family.state_nbytes == state
    assert many.ranks[0].host.kv - few.ranks[0].host.kv == (14 - 4) * 3 * state
    assert "3 layers keep one of each sequence" in shown(many)
    refused = check_model(settings(path, engine={"device": "cuda", "deterministic": True}))
    assert "--device cpu" in str(refused.reason)
    drafting = with_draft_layer(path, tmp_path / "drafting", "mtp")
    engine = {"max_running": 14, "max_tokens_per_step": 64, "speculate": "mtp"}
    proposing = check_model(settings(drafting, engine=engine))
    assert proposing.served
    assert proposing.family is not None
    assert (proposing.family.layers, proposing.family.stateful_layers) == (5, 3)
    assert proposing.ranks[0].host.kv - many.ranks[0].host.kv == 14 * state


def test_a_layer_that_proposes_tokens_is_told_of_and_planned(tmp_path: Path) -> None:
    path = with_draft_layer(locate("tiny"), tmp_path, "layers")
    without, with_it = (
        check_model(settings(path, engine=engine)) for engine in ({}, {"speculate": "mtp"})
    )
    assert "--speculate mtp" in shown(without)
    assert "5 of its 5 layers are MoE, the last one of them proposes tokens" in shown(with_it)
    assert [found.ranks[0].experts for found in (without, with_it)] == [4 * 16, 5 * 16]
    missing = check_model(settings("tiny", engine={"speculate": "mtp"}))
    assert "no layer for multi-token prediction" in str(missing.reason)


def test_what_a_gpu_needs_is_told_without_one() -> None:
    found = check_model(settings("tiny", engine={"device": "cuda"}))
    device = found.ranks[0].device
    assert found.served
    assert device is not None
    assert device.kv == 4 * 2**30
    if not torch.cuda.is_available():
        assert found.remarks


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("qwen3_moe", tmp_path_factory.mktemp("small"))


def test_a_refusal_has_the_reason_and_what_is_known(small: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((small / "config.json").read_text())
    state = load_file(small / "model.safetensors")
    del state["model.layers.1.self_attn.o_proj.weight"]
    save_file(state, tmp_path / "model.safetensors")
    found = check_model(settings(tmp_path))
    assert not found.served
    assert "lacks 1 tensors" in (found.reason or "")
    assert "is refused: " in shown(found)


def test_memory_that_does_not_suffice_is_a_refusal_with_the_plan(small: Path) -> None:
    found = check_model(settings(small, cluster={"memory_per_rank": "64MiB"}))
    assert "memory_per_rank" in (found.reason or "")
    assert found.family is not None
    assert found.ranks[0].host.total > 64 * 2**20


def test_a_missing_tokenizer_is_a_refusal_unless_it_is_not_wanted(small: Path) -> None:
    wanted = check_model(settings(small, tokenizer=True))
    assert "tokenizer" in (wanted.reason or "")
    assert check_model(settings(small)).served


def test_numbers_that_are_not_finite_are_found_where_all_weights_are_read(
    small: Path, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text((small / "config.json").read_text())
    state = load_file(small / "model.safetensors")
    key = "model.layers.2.mlp.experts.6.down_proj.weight"
    state[key][3, 4] = float("nan")
    save_file(state, tmp_path / "model.safetensors")
    assert check_model(settings(tmp_path)).served
    found = check_model(settings(tmp_path), read_weights=True)
    assert f"{key} is not finite: element [3, 4] is nan" in (found.reason or "")
    whole = check_model(settings(small), read_weights=True)
    assert whole.served
    assert whole.read_s is not None


@pytest.mark.parametrize("good", [True, False])
def test_the_exit_status_and_the_json_say_it(
    good: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = "tiny" if good else str(tmp_path)
    monkeypatch.setattr(sys, "argv", ["flexpert", "check", model, "--ranks", "2", "--json"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == (0 if good else 1)
    printed = capsys.readouterr().out
    found = msgspec.json.decode(printed, type=ModelCheck)
    assert found.served == good
    assert found.model == model
    assert (found.reason is None) == good
    assert json.loads(printed)["ranks"] == [] or len(found.ranks) == 2
