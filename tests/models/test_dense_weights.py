"""Dense weights are the same whether they stay on the host or are copied to a device."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import FAMILIES, FURTHER_FAMILIES, reference
from support.fp8_checkpoints import make_fp8_checkpoint
from torch import Tensor
from transformers import CONFIG_MAPPING

from flexpert.errors import ModelError
from flexpert.kernels.device_stream import HostStream, StreamEvent
from flexpert.models import dense_weights, registrations
from flexpert.models.checkpoint_file import CheckpointFile
from flexpert.models.dense_weights import load_dense
from flexpert.models.source import ModelSource

Checkpoints = Callable[..., Path]


class Event:
    """Counts what was waited for before it was recorded again."""

    def __init__(self, told: list[str]) -> None:
        self._told = told

    def record(self) -> None:
        self._told.append("record")

    def synchronize(self) -> None:
        self._told.append("synchronize")


class CountingStream(HostStream):
    """A CPU in the place of a device, whose memory for copies is not zero."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[list[str]] = []
        self.buffers = 0

    def event(self) -> StreamEvent:
        self.told.append([])
        return Event(self.told[-1])

    def host_buffer(self, size: int) -> Tensor:
        self.buffers += 1
        return torch.full((size,), 255, dtype=torch.uint8)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that tensors have several, the last of them shorter."""
    monkeypatch.setattr(dense_weights, "PIECE", 1000)
    monkeypatch.setattr(dense_weights, "read_threads", lambda: 4)


def loaded(opened: ModelSource, stream: HostStream | None) -> Any:
    model = opened.build(attention=registrations.IMPLEMENTATION)
    for name in opened.experts_names:
        model.get_submodule(name)._parameters.clear()
    with torch.no_grad():
        load_dense(model, opened, stream)
    return model


def dense(model: Any, opened: ModelSource) -> dict[str, Tensor]:
    state = model.state_dict()
    return {name: state[name] for name in state if name not in opened.expert_parameters}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", [*FAMILIES, *FURTHER_FAMILIES])
def test_a_device_gets_what_transformers_loads(
    family: str, dtype: torch.dtype, checkpoint: Checkpoints
) -> None:
    if family not in CONFIG_MAPPING:
        pytest.skip("not in this version of transformers")
    path = checkpoint(family, dtype)
    opened = ModelSource.open(str(path))
    stream = CountingStream()
    copied, mapped = loaded(opened, stream), loaded(opened, None)
    assert same(dense(copied, opened), dense(mapped, opened))
    theirs = reference(path, dtype)
    for name, tensor in dense(copied, opened).items():
        expected = theirs.get_parameter_or_buffer(name)
        assert torch.equal(tensor, expected.to(tensor.dtype)), name
    assert 2 <= stream.buffers <= 8
    for told in stream.told:  # nothing is overwritten before it is copied, and all is copied
        assert told == ["synchronize", "record"] * (len(told) // 2) + ["synchronize"]


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_what_is_converted_is_copied_likewise(family: str, tmp_path: Path) -> None:
    small, whole = make_fp8_checkpoint(family, tmp_path)
    for path, dtype in ((small, "auto"), (whole, "bfloat16")):
        opened = ModelSource.open(str(path), dtype=dtype)
        host = dense(loaded(opened, None), opened)
        assert same(dense(loaded(opened, HostStream()), opened), host)
    plain = ModelSource.open(str(whole))
    dequantized = ModelSource.open(str(small))
    assert same(
        dense(loaded(dequantized, HostStream()), dequantized), dense(loaded(plain, None), plain)
    )


def test_tied_embeddings_are_one_tensor_on_a_device(checkpoint: Checkpoints) -> None:
    model = loaded(ModelSource.open(str(checkpoint("qwen3_moe"))), HostStream())
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_on_the_host_a_tensor_stays_where_it_is_in_the_page_cache(
    checkpoint: Checkpoints,
) -> None:
    """Ranks of one host share it."""
    path = checkpoint("mixtral")
    model = loaded(ModelSource.open(str(path)), None)
    address = model.model.embed_tokens.weight.data_ptr()
    lines = Path("/proc/self/maps").read_text().splitlines()
    for line in lines:
        begin, end = (int(part, 16) for part in line.split(maxsplit=1)[0].split("-"))
        if begin <= address < end:
            assert line.endswith(str(path / "model.safetensors"))
            return
    pytest.fail("the tensor lies nowhere")


@pytest.fixture
def copy(checkpoint: Checkpoints, tmp_path: Path) -> Path:
    """A checkpoint to change."""
    return Path(shutil.copytree(checkpoint("mixtral"), tmp_path / "model"))


@pytest.mark.parametrize("stream", [None, HostStream()], ids=["host", "device"])
def test_a_tensor_of_another_shape_is_told(stream: HostStream | None, copy: Path) -> None:
    state = load_file(copy / "model.safetensors")
    state["model.norm.weight"] = torch.ones(5)
    save_file(state, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"model\.norm\.weight has shape \(5,\)"):
        loaded(ModelSource.open(str(copy)), stream)


def test_a_file_truncated_on_the_way_to_a_device_is_told(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = ModelSource.open(str(copy))
    file = copy / "model.safetensors"
    monkeypatch.setattr(CheckpointFile, "_check_same", lambda self, found: None)
    with file.open("r+b") as raw:
        raw.truncate(file.stat().st_size // 2)
    for _ in range(5):
        with pytest.raises(ModelError, match=r"model\.safetensors is damaged: it ends at byte"):
            loaded(opened, HostStream())


def test_a_tensor_at_an_odd_place_is_read(tmp_path: Path, copy: Path) -> None:
    """A header may have any length, and then nothing behind it is aligned."""
    file = copy / "model.safetensors"
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = raw[8 : 8 + length] + b" "
    expected = ModelSource.open(str(copy))
    before = {k: v.clone() for k, v in dense(loaded(expected, None), expected).items()}
    file.unlink()
    file.write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + length :])
    opened = ModelSource.open(str(copy))
    assert same(dense(loaded(opened, None), opened), before)
    assert same(dense(loaded(opened, HostStream()), opened), before)
