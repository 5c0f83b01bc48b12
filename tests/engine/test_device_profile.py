"""What `--device` decides, and what is refused before anything starts."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from flexpert.cli.settings import settings
from flexpert.cluster.processes.model_opening import open_source
from flexpert.comm import BufferSpec, CommError
from flexpert.config import Config, load_config
from flexpert.device_settings import MOST_GPU_RANKS
from flexpert.engine import device_profile, gpu_driver
from flexpert.engine.device_profile import (
    CpuProfile,
    InterpreterProfile,
    TritonProfile,
    WarmUpTime,
    captured_shapes,
    find_driver,
    profile_of,
    triton_batches,
)
from flexpert.engine.head_store import HeadMeeting, HeadStore
from flexpert.errors import ConfigError
from flexpert.kernels.step_shapes import lanes
from flexpert.kernels.weight_formats import FP8, INT4, INT8, MXFP4, WeightFormat
from flexpert.models.step_graphs import GraphShape

MEETING = HeadMeeting(HeadStore(lambda request: None), "here", several=False)


def gpu(**overrides: object) -> Config:
    return load_config(environment={}, overrides={"engine.device": "cuda", **overrides})


def test_a_gpu_has_room_for_one_rank_unless_more_are_asked_for() -> None:
    config = gpu()
    assert (config.cluster.ranks, config.cluster.max_ranks) == (1, 1)
    assert gpu(**{"cluster.ranks": 2}).cluster.max_ranks == 8
    assert gpu(**{"cluster.max_ranks": 4}).cluster.ranks == 1
    assert Config.model_validate_json(config.model_dump_json()) == config  # as ranks are told


def test_a_gpu_has_larger_steps_and_caches_unless_they_are_given() -> None:
    def sizes(config: Config) -> tuple[int, int, int]:
        engine = config.engine
        return engine.max_tokens_per_step, engine.max_running, engine.kv_memory

    assert sizes(settings(None, {"engine.device": "cpu"})) == (256, 64, 256 * 2**20)
    assert sizes(gpu()) == (8192, 256, 4 * 2**30)
    assert sizes(gpu(**{"cluster.max_ranks": 4})) == (2048, 256, 4 * 2**30)
    given = {"max_tokens_per_step": 32, "max_running": 8, "kv_memory": "1MiB"}
    found = gpu(**{f"engine.{name}": value for name, value in given.items()})
    assert sizes(found) == (32, 8, 2**20)
    assert gpu(**{"engine.all2all": "nixl_ep"}).engine.max_tokens_per_step == 256


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ({"cluster.max_ranks": 33}, "more than 32.*lower --max-ranks"),
        (
            {"cluster.max_ranks": 4, "cluster.on_missing_expert": "degrade"},
            "degrade needs --device cpu",
        ),
        (
            {"engine.deterministic": True, "engine.all2all": "nixl_ep"},
            "--deterministic does not go with --all2all nixl_ep",
        ),
        (
            {"engine.speculate": "mtp", "engine.all2all": "nixl_ep"},
            "--speculate does not go with --all2all nixl_ep",
        ),
        (
            {"engine.all2all": "nixl_ep", "cluster.max_ranks": 12},
            r"max_ranks \(12\) .* takes: 1, 2, .* 8, 16, 24, 32; change --max-ranks",
        ),
    ],
)
def test_what_a_gpu_cannot_do_is_refused_before_anything_starts(
    overrides: dict[str, object], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        gpu(**overrides)


def test_a_cpu_refuses_the_kernels_of_a_gpu() -> None:
    with pytest.raises(ConfigError, match="--all2all nixl_ep needs --device cuda"):
        settings(None, {"engine.all2all": "nixl_ep"})
    with pytest.raises(ConfigError, match="--quantization fp8 needs --device cuda"):
        settings(None, {"model.quantization": "fp8"})


def test_a_gpu_refuses_the_products_of_a_cpu() -> None:
    with pytest.raises(ConfigError, match="--quantization int8 needs --device cpu"):
        gpu(**{"model.quantization": "int8"})


@pytest.mark.parametrize(
    ("device", "quantization", "desired"),
    [
        ("cpu", "auto", None),
        ("cuda", "auto", None),
        ("cuda", "fp8", FP8),
        ("cuda", "mxfp4", MXFP4),
        ("cpu", "mxfp4", MXFP4),
        ("cpu", "int8", INT8),
        ("cpu", "int4", INT4),
    ],
)
def test_experts_are_in_the_format_that_is_wanted(
    device: str, quantization: str, desired: WeightFormat | None
) -> None:
    asked = {"engine.device": device, "model.quantization": quantization}
    source = open_source(settings(None, asked))
    assert source.expert_format is desired
    assert source.expert_shape().format is desired


def test_an_absent_nixl_ep_is_told_as_a_wrong_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> None:
        raise CommError("pip install 'flexpert[nixl]'")

    monkeypatch.setattr("flexpert.comm.nixl_ep.package.find", absent)
    with pytest.raises(ConfigError, match=r"--all2all nixl_ep: pip install 'flexpert\[nixl\]'"):
        device_profile.find_nixl_ep()


def test_sizes_that_nixl_ep_does_not_take_are_told_as_a_wrong_setting() -> None:
    spec = BufferSpec(2, 4, 64, 2, torch.float32)
    config = gpu(**{"engine.all2all": "nixl_ep"}).engine
    with pytest.raises(ConfigError, match=r"--all2all nixl_ep: .* bfloat16 rows"):
        InterpreterProfile(config).make_exchange(0, spec, 1.0, 4, MEETING)


def test_a_cache_that_the_gpu_has_no_room_for_is_told_as_a_wrong_setting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(size: int, device: torch.device) -> None:
        raise CommError(f"{size} bytes of the GPU's memory: out of memory")

    monkeypatch.setattr(device_profile, "export_memory", full)
    with pytest.raises(ConfigError, match=r"KV cache: 4096 bytes .*; lower --kv-memory"):
        InterpreterProfile(gpu().engine).export_kv_cache(4096)


def test_a_cpu_keeps_its_ranks() -> None:
    assert settings(None, {"engine.device": "cpu"}).cluster.max_ranks == 8


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_reason_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_profile, "INTERPRETED", False)
    with pytest.raises(ConfigError, match=r"no NVIDIA GPU .*(driver|install one for CUDA)"):
        profile_of(gpu().engine)


def test_graphs_are_captured_for_few_sizes_that_waste_at_most_half() -> None:
    def decoding(most: int) -> list[int]:
        return [shape.tokens for shape in captured_shapes(most, 100) if shape.decodes]

    assert decoding(1) == [1]
    assert decoding(64) == [1, 2, 4, 8, 16, 24, 32, 48, 64]
    assert decoding(50)[-1] == 50
    assert decoding(4096)[-1] == 512
    shapes = captured_shapes(512, 8192)
    assert len(shapes) < 33
    for batch in range(1, 513):
        size = next(shape.tokens for shape in shapes if shape.tokens >= batch)
        assert size < 2 * batch
    prompts = [shape for shape in shapes if not shape.decodes]
    assert [shape.tokens for shape in prompts][-3:] == [4096, 6144, 8192]
    assert prompts[0] == GraphShape(128, 64)
    assert prompts[-1].sequences == 512
    assert all(later.tokens < 2 * shape.tokens for shape, later in pairwise(prompts))


@pytest.mark.parametrize("deterministic", [False, True])
def test_warm_up_stays_within_the_room_there_is(deterministic: bool) -> None:
    engine = settings(None, {"engine.deterministic": deterministic}).engine
    assert max(batch.rows for batch in CpuProfile(engine).warm_up_batches(100, 1000)) <= 128


def test_a_cpus_warm_up_computes_experts_for_few_sizes() -> None:
    batches = CpuProfile(settings(None, {}).engine).warm_up_batches(512, 1000)
    assert [batch.rows for batch in batches if batch.experts] == [1, 2, 512]
    assert len(batches) > 10


@pytest.mark.parametrize(("most", "context"), [(16, 8), (100, 1000), (2048, 40960)])
def test_warm_up_meets_attention_of_few_and_many_sequences_whole_and_cut(
    most: int, context: int
) -> None:
    batches = triton_batches(most, context)
    assert len(set(batches)) == len(batches)
    assert max(batch.rows for batch in batches) == most
    for batch in batches:
        assert batch.sequences < batch.rows, "else it is a decode step, which is captured"
    met = {(lanes(batch.sequences), batch.context > batch.rows) for batch in batches}
    kernels = {lanes(n) for n in range(1, min(most, 512))}  # of which one row is of a prompt
    assert met >= {(count, cut) for count in kernels for cut in {False, context > most}}


@pytest.mark.parametrize(
    ("device", "interpreted", "kind"),
    [("cpu", False, CpuProfile), ("cpu", True, CpuProfile), ("cuda", True, InterpreterProfile)],
)
def test_the_profile_is_of_the_device_that_the_settings_name(
    device: str, interpreted: bool, kind: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_profile, "INTERPRETED", interpreted)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    profile = profile_of(settings(None, {"engine.device": device}).engine)
    assert type(profile) is kind
    assert profile.device == torch.device("cpu")
    assert isinstance(profile, TritonProfile) == (device == "cuda")


@pytest.mark.parametrize(
    ("all2all", "warm_up"),
    [("auto", WarmUpTime.WHILE_LOADING), ("nixl_ep", WarmUpTime.BEFORE_LOADING)],
)
def test_graphs_are_captured_before_nixl_ep_connects(all2all: str, warm_up: WarmUpTime) -> None:
    profile = InterpreterProfile(gpu(**{"engine.all2all": all2all}).engine)
    assert profile.warm_up is warm_up


def test_as_many_ranks_as_the_exchange_takes() -> None:
    from flexpert.comm.cuda.cuda_layout import LANES

    assert LANES == MOST_GPU_RANKS


@pytest.mark.parametrize(("seen", "known"), [(1, True), (2, False), (0, False)])
def test_the_driver_is_asked_only_where_it_counts_the_gpus_that_cuda_sees(
    seen: int, known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Driver:
        gpus = 1

    monkeypatch.setattr(gpu_driver, "open_driver", Driver)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: seen)
    assert (find_driver() is not None) == known
