"""Whatever the files of a checkpoint hold: it opens, or a ModelError says which file is wrong."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flexpert.errors import ModelError
from flexpert.models.source import ModelSource

Checkpoints = Callable[..., Path]
INDEX = "model.safetensors.index.json"
LESS = settings(
    max_examples=30,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
ODD = st.sampled_from(
    [
        *(None, True, 0, -1, 2**31, 2**63, 2**70, 1e308, float("nan"), float("inf"), "", "x"),
        *("../../etc/passwd", "\ud800", "\0", [], {}, [[]], {"a": 1}, [1, 2], "auto", 1.5),
    ]
)
JSON = st.recursive(ODD, lambda inner: st.lists(inner, max_size=3), max_leaves=6)
BYTES = st.sampled_from(
    [b"", b"\xff\xfe", b"null", b"[]", b"[" * 100_000, b'{"a":', b"1e999999", b"9" * 5000]
) | st.binary(max_size=60)


@pytest.fixture
def copy(checkpoint: Checkpoints, tmp_path: Path) -> Path:
    """A checkpoint to damage."""
    return Path(shutil.copytree(checkpoint("qwen3_moe"), tmp_path / "model"))


def without_single_file(path: Path) -> None:
    """So that the index is what counts."""
    single = path / "model.safetensors"
    if single.exists():
        single.rename(path / "model-00001-of-00001.safetensors")


def opened(path: Path) -> bool:
    """Whether it opens and its experts can be read; if not, it must say why in our words."""
    try:
        source = ModelSource.open(str(path))
        source.load_experts(0, [0])
    except ModelError as error:
        said = str(error)
    else:
        return True
    assert str(path) in said
    assert len(said) < 3000
    return False


def test_an_untouched_one_opens(copy: Path) -> None:
    assert opened(copy)


@LESS
@given(data=st.data())
def test_a_configuration_with_any_value_opens_or_is_refused(copy: Path, data: Any) -> None:
    file = copy / "config.json"
    whole = file.read_text()
    config = json.loads(whole)
    name = data.draw(st.sampled_from(sorted(config)))
    config[name] = data.draw(JSON)
    try:
        file.write_text(json.dumps(config), encoding="utf-8", errors="surrogatepass")
        opened(copy)
    finally:
        file.write_text(whole)


@LESS
@given(data=st.data())
def test_what_generation_says_is_read_or_refused(copy: Path, data: Any) -> None:
    file = copy / "generation_config.json"
    names = st.sampled_from(["eos_token_id", "bos_token_id", "transformers_version", "top_k"])
    text = json.dumps({data.draw(names): data.draw(JSON)})
    file.write_text(text)
    if opened(copy):
        info = ModelSource.open(str(copy)).info
        assert all(type(token) is int and 0 <= token < info.vocab for token in info.eos_token_ids)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", INDEX])
@LESS
@given(content=BYTES)
def test_a_file_of_any_bytes_is_refused(copy: Path, name: str, content: bytes) -> None:
    if name == INDEX:
        without_single_file(copy)
    whole = (copy / name).read_bytes() if (copy / name).exists() else None
    try:
        (copy / name).write_bytes(content)
        with pytest.raises(ModelError, match=name.split(".", maxsplit=1)[0]):
            ModelSource.open(str(copy))
    finally:
        if whole is not None:
            (copy / name).write_bytes(whole)


@pytest.mark.parametrize(
    "name",
    ["../../etc/passwd", "/etc/passwd", "../model.safetensors", "a\0b", 7, None, [], "", "."],
)
def test_an_index_leads_nowhere_else(copy: Path, name: object) -> None:
    without_single_file(copy)
    (copy / INDEX).write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    with pytest.raises(ModelError, match="index"):
        ModelSource.open(str(copy))


def rewritten(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """A safetensors file with another header."""
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    change(header)
    new = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(new)) + new + raw[8 + length :])


@LESS
@given(data=st.data())
def test_weights_whose_header_lies_are_refused_or_load(copy: Path, data: Any) -> None:
    file = copy / "model.safetensors"
    whole = file.read_bytes()

    def change(header: dict[str, Any]) -> None:
        key = data.draw(st.sampled_from(sorted(set(header) - {"__metadata__"})))
        what = data.draw(st.sampled_from(["shape", "data_offsets", "dtype"]))
        header[key][what] = data.draw(
            JSON | st.lists(st.sampled_from([0, 1, 72, 2**31, 2**63 - 1, 2**64]), max_size=3)
        )

    try:
        rewritten(file, change)
        opened(copy)
    finally:
        file.write_bytes(whole)


@pytest.mark.parametrize("length", [0, 1, 2**31, 2**63, 2**64 - 1])
def test_weights_whose_header_has_another_length_are_refused(copy: Path, length: int) -> None:
    file = copy / "model.safetensors"
    file.write_bytes(struct.pack("<Q", length) + file.read_bytes()[8:])
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        ModelSource.open(str(copy))


@LESS
@given(cut=st.integers(0, 5000))
def test_truncated_weights_are_refused(copy: Path, cut: int) -> None:
    file = copy / "model.safetensors"
    whole = file.read_bytes()
    try:
        file.write_bytes(whole[:cut])
        with pytest.raises(ModelError, match=r"model\.safetensors"):
            ModelSource.open(str(copy))
    finally:
        file.write_bytes(whole)
