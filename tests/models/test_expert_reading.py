"""Experts are read as bytes of the files where they are just these, by many threads at once."""

from __future__ import annotations

import errno
import gc
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.checkpoints import FAMILIES, FURTHER_FAMILIES, random_model
from support.fp8_checkpoints import make_fp8_checkpoint
from transformers import CONFIG_MAPPING

from flexpert.errors import ModelError
from flexpert.kernels.experts import ExpertWeights
from flexpert.models import expert_reader, source
from flexpert.models.checkpoint_file import CheckpointFile
from flexpert.models.expert_extents import Extent, expert_extents
from flexpert.models.expert_reader import read_extents
from flexpert.models.source import ModelSource

Checkpoints = Callable[..., Path]
CONVERTED = {"gpt_oss"}
"""Families whose experts lie transposed in the files."""


def every(opened: ModelSource) -> Iterator[tuple[int, int]]:
    for layer in range(opened.info.moe_layers):
        for expert in range(opened.info.experts):
            yield layer, expert


def extents_of(opened: ModelSource, layer: int, expert: int) -> list[Extent] | None:
    return opened._experts.extents(layer, expert, opened.expert_shape(layer))


def converted(opened: ModelSource, layer: int, expert: int) -> ExpertWeights:
    weights = opened.expert_shape(layer).empty()
    opened._experts.read_converted(layer, expert, weights)
    return weights


def memory_for(opened: ModelSource, layer: int) -> torch.Tensor:
    return torch.full((opened.expert_shape(layer).nbytes,), 255, dtype=torch.uint8)


def read(opened: ModelSource, layer: int, expert: int) -> ExpertWeights:
    memory = memory_for(opened, layer)
    opened.read_expert(layer, expert, memory)
    return opened.expert_shape(layer).over(memory)


def same(a: ExpertWeights, b: ExpertWeights) -> bool:
    return all(
        torch.equal(x.view(torch.uint8), y.view(torch.uint8))
        for x, y in zip(a.tensors, b.tensors, strict=True)
    )


# ---- what is read -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", [*FAMILIES, *FURTHER_FAMILIES])
def test_the_bytes_of_every_expert_are_what_its_conversion_gives(
    family: str, dtype: torch.dtype, checkpoint: Checkpoints
) -> None:
    if family not in CONFIG_MAPPING:
        pytest.skip("not in this version of transformers")
    opened = ModelSource.open(str(checkpoint(family, dtype)))
    for layer, expert in every(opened):
        extents = extents_of(opened, layer, expert)
        assert (extents is None) == (family in CONVERTED)
        assert same(read(opened, layer, expert), converted(opened, layer, expert))
        if extents is not None:
            assert sum(extent.nbytes for extent in extents) <= opened.expert_nbytes()
        mapped = opened.map_experts(layer, [expert])
        assert len(mapped) == (extents is not None and len(extents) == 2)
        assert all(same(found, converted(opened, layer, expert)) for found in mapped.values())
    assert opened._experts._extents_agree is (None if family in CONVERTED else True)


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "deepseek_v3"])
def test_rows_of_fused_tensors_are_read(family: str, tmp_path: Path) -> None:
    model = random_model(family)
    model.config.save_pretrained(tmp_path)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    opened = ModelSource.open(str(tmp_path))
    for layer, expert in every(opened):
        extents = extents_of(opened, layer, expert)
        assert extents is not None
        assert [extent.part for extent in extents] == ["gate_up", "down"]
        assert same(read(opened, layer, expert), converted(opened, layer, expert))


def test_mapped_experts_share_the_pages_of_their_file(checkpoint: Checkpoints) -> None:
    folder = checkpoint("qwen3_moe", torch.bfloat16)
    opened = ModelSource.open(str(folder))
    mapped = opened.map_experts(1, [0, 3])
    assert sorted(mapped) == [0, 3]
    again = opened.map_experts(1, [3])[3]
    assert again.gate_up.data_ptr() == mapped[3].gate_up.data_ptr()
    mapped[0].gate_up[0, 0] += 1  # what one process writes only it sees
    assert same(read(ModelSource.open(str(folder)), 1, 0), converted(opened, 1, 0))
    assert not same(mapped[0], converted(opened, 1, 0))


def test_experts_that_begin_within_an_element_are_not_mapped(
    checkpoint: Checkpoints, tmp_path: Path
) -> None:
    shutil.copytree(checkpoint("qwen3_moe", torch.bfloat16), tmp_path, dirs_exist_ok=True)
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    size = int.from_bytes(whole[:8], "little")
    header = whole[8 : 8 + size] + b" "  # one byte, by which all that follows is moved
    file.write_bytes(len(header).to_bytes(8, "little") + header + whole[8 + size :])
    opened = ModelSource.open(str(tmp_path))
    assert opened.map_experts(0, [0, 1]) == {}
    assert same(read(opened, 0, 1), converted(opened, 0, 1))


def test_a_mapped_expert_is_checked_and_its_file_must_be_the_one_opened(
    checkpoint: Checkpoints, tmp_path: Path
) -> None:
    shutil.copytree(checkpoint("qwen3_moe", torch.bfloat16), tmp_path, dirs_exist_ok=True)
    opened = ModelSource.open(str(tmp_path))
    (extent, _) = extents_of(opened, 0, 2) or ()
    with open(extent.file.path, "r+b") as file:
        file.seek(extent.begin + 6)
        file.write(b"\x80\x7f")  # infinity
    with pytest.raises(ModelError, match="changed since"):
        opened.map_experts(0, [2])
    opened = ModelSource.open(str(tmp_path))
    assert sorted(opened.map_experts(0, [0, 3])) == [0, 3]
    with pytest.raises(ModelError, match=r"experts\.2\..*element \[0, 3\] is inf"):
        opened.map_experts(0, [1, 2])


def test_experts_of_many_files_are_read(tmp_path: Path) -> None:
    random_model("qwen3_moe").save_pretrained(tmp_path, max_shard_size="40KB")
    opened = ModelSource.open(str(tmp_path))
    files = set()
    for layer, expert in every(opened):
        files |= {extent.file.path for extent in extents_of(opened, layer, expert) or ()}
        assert same(read(opened, layer, expert), converted(opened, layer, expert))
    assert len(files) > 3


def test_fp8_is_read_with_its_scales_as_it_is_stored(tmp_path: Path) -> None:
    small, _ = make_fp8_checkpoint("qwen3_moe", tmp_path)
    opened = ModelSource.open(str(small), experts="stored")
    for layer, expert in every(opened):
        extents = extents_of(opened, layer, expert)
        assert extents is not None
        parts = {extent.part for extent in extents}
        assert parts == {"gate_up", "down", "gate_up_scale", "down_scale"}
        assert same(read(opened, layer, expert), converted(opened, layer, expert))


@pytest.mark.parametrize(
    ("opening", "changes"),
    [
        ({}, {}),  # dequantized
        ({"experts": "stored"}, {"moe_intermediate_size": 208}),  # blocks that two parts share
    ],
)
def test_fp8_that_is_not_used_as_it_is_stored_is_converted(
    opening: dict[str, Any], changes: dict[str, Any], tmp_path: Path
) -> None:
    small, _ = make_fp8_checkpoint("qwen3_moe", tmp_path, **changes)
    opened = ModelSource.open(str(small), **opening)
    assert extents_of(opened, 0, 3) is None
    assert same(read(opened, 0, 3), converted(opened, 0, 3))


@pytest.mark.parametrize("opening", [{"dtype": "bfloat16"}, {"experts": "fp8"}])
def test_another_dtype_than_the_files_is_converted(
    opening: dict[str, Any], checkpoint: Checkpoints
) -> None:
    opened = ModelSource.open(str(checkpoint("qwen3_moe")), **opening)
    assert extents_of(opened, 0, 3) is None
    assert same(read(opened, 0, 3), converted(opened, 0, 3))


def test_bytes_that_are_not_what_the_conversion_gives_are_noticed(
    checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def swapped(*arguments: Any) -> list[Extent] | None:
        """Up before gate."""
        gate, up, *rest = expert_extents(*arguments) or []
        return [replace(gate, into=up.into), replace(up, into=gate.into), *rest]

    opened = ModelSource.open(str(checkpoint("mixtral")))
    expected = [converted(opened, 0, expert) for expert in range(6)]
    monkeypatch.setattr(expert_reader, "expert_extents", swapped)
    wrong = opened.expert_shape().empty()
    extents = extents_of(opened, 0, 0)
    assert extents is not None
    read_extents(extents, wrong)
    assert not same(wrong, expected[0])
    with caplog.at_level(logging.WARNING):
        assert all(same(read(opened, 0, expert), expected[expert]) for expert in range(6))
    assert caplog.text.count("converting each") == 1


def test_memory_that_does_not_fit_is_refused(checkpoint: Checkpoints) -> None:
    opened = ModelSource.open(str(checkpoint("mixtral")))
    size = opened.expert_nbytes()
    for memory in (
        torch.empty(size + 1, dtype=torch.uint8),
        torch.empty(size, dtype=torch.int8),
        torch.empty(2 * size, dtype=torch.uint8)[::2],
        torch.empty(size, dtype=torch.uint8, device="meta"),
    ):
        with pytest.raises(ValueError, match=rf"is read into \[{size}\]"):
            opened.read_expert(0, 0, memory)
    with pytest.raises(ValueError, match="no expert 6"):
        opened.read_expert(0, 6, memory_for(opened, 0))
    with pytest.raises(ValueError, match="no MoE layer 3"):
        opened.read_expert(3, 0, memory_for(opened, 0))


# ---- by many threads ----------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_many_threads_read_at_once(family: str, checkpoint: Checkpoints) -> None:
    path = str(checkpoint(family))
    whole = ModelSource.open(path)
    expected = {key: converted(whole, *key) for key in every(whole)}
    for _ in range(5):  # the first reads open the files and compare, each time anew
        opened = ModelSource.open(path)
        together = threading.Barrier(8)

        def all_of_them(opened: ModelSource = opened, together: Any = together) -> bool:
            together.wait(30)
            return all(same(read(opened, *key), expected[key]) for key in every(opened))

        with ThreadPoolExecutor(8) as threads:
            results = [threads.submit(all_of_them) for _ in range(8)]
        assert all(result.result() for result in results)


def test_large_experts_are_loaded_by_several_threads(
    checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "_WORTH_THREADS", 0)
    monkeypatch.setattr(source, "read_threads", lambda: 4)
    opened = ModelSource.open(str(checkpoint("qwen3_moe")))
    expected = {expert: converted(opened, 1, expert) for expert in range(8)}
    opened.load_experts(1, [0])  # two experts are compared by one thread
    readers, several = set(), threading.Event()
    original = CheckpointFile.read

    def noted(self: CheckpointFile, begin: int, into: memoryview, *more: Any) -> None:
        readers.add(threading.current_thread().name)
        if len(readers) > 1:
            several.set()
        several.wait(30)
        original(self, begin, into, *more)

    monkeypatch.setattr(CheckpointFile, "read", noted)
    for _ in range(10):
        loaded = opened.load_experts(1, range(8))
        assert all(same(loaded[expert], expected[expert]) for expert in range(8))
    assert len(readers) > 1
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("read-")]


# ---- files that change or fail ------------------------------------------------------------------


@pytest.fixture
def copy(checkpoint: Checkpoints, tmp_path: Path) -> Path:
    """A checkpoint to damage."""
    return Path(shutil.copytree(checkpoint("qwen3_moe"), tmp_path / "model"))


@pytest.mark.parametrize("opened_before", [False, True])
def test_a_file_truncated_in_place_is_told(
    opened_before: bool, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = ModelSource.open(str(copy))
    if opened_before:
        read(opened, 0, 0)
    file = copy / "model.safetensors"
    os.truncate(file, file.stat().st_size // 100)
    for load in (lambda: read(opened, 2, 7), lambda: opened.load_experts(2, [7])):
        with pytest.raises(ModelError, match=r"model\.safetensors changed"):
            load()
    # truncated just after that was checked
    monkeypatch.setattr(CheckpointFile, "_check_same", lambda self, found: None)
    for load in (lambda: read(opened, 2, 7), lambda: converted(opened, 2, 7)):
        with pytest.raises(ModelError, match=r"model\.safetensors is damaged: it ends at byte"):
            load()


def test_a_file_replaced_between_opening_and_reading_is_told(copy: Path) -> None:
    opened = ModelSource.open(str(copy))
    file = copy / "model.safetensors"
    shutil.copy(file, copy / "other")
    (copy / "other").rename(file)
    with pytest.raises(ModelError, match="changed since the service opened it"):
        converted(opened, 0, 0)


@pytest.mark.parametrize("gone", [False, True])
def test_a_file_that_is_held_is_read_though_another_has_its_name(copy: Path, gone: bool) -> None:
    opened, before = ModelSource.open(str(copy)), ModelSource.open(str(copy))
    expected = converted(before, 2, 7)
    opened.hold_files()
    file = copy / "model.safetensors"
    if gone:
        file.unlink()
    else:
        (copy / "other").write_bytes(b"another")
        (copy / "other").rename(file)
    assert same(read(opened, 2, 7), expected)
    assert same(converted(opened, 2, 7), expected)
    assert same(opened.map_experts(2, [7])[7], expected)


def test_a_file_that_is_gone_is_told(copy: Path) -> None:
    opened = ModelSource.open(str(copy))
    (copy / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"cannot read .*model\.safetensors: No such file"):
        read(opened, 0, 0)


@pytest.mark.parametrize("refusal", [errno.EOPNOTSUPP, errno.EINVAL])
def test_a_file_system_that_does_not_tell_what_is_cached_is_read_all_the_same(
    refusal: int, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    original = os.preadv

    def preadv(descriptor: int, into: list[Any], begin: int, flags: int = 0) -> int:
        if flags:
            asked.append(flags)
            raise OSError(refusal, os.strerror(refusal))
        return original(descriptor, [into[0][:1000]], begin)  # short reads, too

    opened = ModelSource.open(str(copy))
    expected = converted(ModelSource.open(str(copy)), 0, 0)
    monkeypatch.setattr(os, "preadv", preadv)
    assert same(read(opened, 0, 0), expected)
    assert asked == [os.RWF_NOWAIT]


def test_what_is_not_in_the_page_cache_is_read_from_the_disk(copy: Path) -> None:
    opened = ModelSource.open(str(copy))
    expected = {key: converted(opened, *key) for key in every(opened)}
    descriptor = os.open(copy / "model.safetensors", os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)
    assert all(same(read(opened, *key), expected[key]) for key in every(opened))


def test_an_error_of_the_disk_is_told(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def preadv(*_: Any) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    opened = ModelSource.open(str(copy))
    monkeypatch.setattr(os, "preadv", preadv)
    with pytest.raises(ModelError, match=r"cannot read .*model\.safetensors: Input/output error"):
        read(opened, 0, 0)


def test_files_are_closed_with_the_source(copy: Path) -> None:
    def held() -> list[str]:
        links = []
        for link in Path("/proc/self/fd").iterdir():
            try:
                links.append(os.readlink(link))
            except FileNotFoundError:  # the one of this very listing
                continue
        return [target for target in links if target.startswith(str(copy))]

    opened = ModelSource.open(str(copy))
    assert held() == []
    read(opened, 0, 0)
    assert held() == [str(copy / "model.safetensors")]
    del opened
    gc.collect()
    assert held() == []
