"""A header that does not describe its file is refused before a byte is read by it."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from flexpert.errors import ModelError
from flexpert.models.checkpoint import bytes_of
from flexpert.models.checkpoint_file import CheckpointFile
from flexpert.models.tensor_header import TORCH_DTYPES, header_size, parse_header


def entry(dtype: Any = "F32", shape: Any = (2, 3), offsets: Any = (0, 24)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def parsed(header: Any, data: int) -> Any:
    encoded = json.dumps(header).encode()
    return parse_header(encoded, 8 + len(encoded) + data)


def test_a_header_tells_where_tensors_are() -> None:
    header = {
        "__metadata__": {"format": "pt"},
        "b": entry("BF16", [4], [24, 32]),
        "a": entry(),
        "empty": entry("U8", [0, 7], [32, 32]),
    }
    found = parsed(header, 32)
    begin = 8 + len(json.dumps(header))
    assert list(found) == ["b", "a", "empty"]
    assert (found["a"].shape, found["a"].begin, found["a"].nbytes) == ((2, 3), begin, 24)
    assert (found["b"].dtype, found["b"].begin, found["b"].nbytes) == ("BF16", begin + 24, 8)
    assert found["empty"].nbytes == 0


@pytest.mark.parametrize(
    ("header", "why"),
    [
        ([], "no JSON object"),
        ({"a": None}, "no description"),
        ({"a": entry(dtype="F33")}, "F33"),
        ({"a": entry(dtype=7)}, "unknown"),
        ({"a": entry(shape=[2, -3])}, "no shape"),
        ({"a": entry(shape=[2, 3.0])}, "no shape"),
        ({"a": entry(shape=[True, 6])}, "no shape"),
        ({"a": entry(shape=[1] * 33 + [6])}, "no shape"),
        ({"a": entry(shape=None)}, "no shape"),
        ({"a": entry(shape=[2**64, 0])}, "no shape"),
        ({"a": entry(shape=[2, 4])}, "24 bytes, which do not fit"),
        ({"a": entry(offsets=[24, 0])}, "data_offsets"),
        ({"a": entry(offsets=[0])}, "data_offsets"),
        ({"a": entry(offsets=[-24, 0])}, "data_offsets"),
        ({"a": entry(offsets=[0, 2**70])}, "data_offsets"),
        ({"a": entry(offsets=[8, 32])}, "begins at byte"),  # bytes of nobody before it
        ({"a": entry(), "b": entry()}, "begins at byte"),  # they overlap
        ({"a": entry(), "b": entry(offsets=[12, 36])}, "begins at byte"),
        ({"a": entry(), "b": entry(offsets=[24, 48])}, "end at byte"),  # beyond the file
        ({"a": entry(dtype="F4", shape=[1], offsets=[0, 0])}, "do not fit"),
        ({}, "end at byte"),
        ({"\ud800": entry()}, "surrogates"),
    ],
)
def test_a_header_that_lies_is_refused(header: Any, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        parsed(header, 24)


@given(raw=st.binary(max_size=200) | st.sampled_from([b"[" * 200_000, b"9" * 5000, b"{" * 9]))
def test_any_bytes_are_a_header_or_a_value_error(raw: bytes) -> None:
    for prefix in (raw[:8], struct.pack("<Q", len(raw))):
        try:
            assert header_size(prefix, 8 + len(raw)) <= len(raw)
        except ValueError:
            continue
    try:
        assert parse_header(raw, 8 + len(raw)) == {}
    except ValueError:
        return
    assert json.loads(raw).keys() <= {"__metadata__"}


@pytest.mark.parametrize("dtype", TORCH_DTYPES.values(), ids=TORCH_DTYPES)
def test_every_dtype_is_read_as_it_was_written(dtype: torch.dtype, tmp_path: Path) -> None:
    raw = torch.arange(6 * dtype.itemsize, dtype=torch.uint8) % 2  # a bool is 0 or 1
    tensor = raw.view(dtype).view(2, 3)
    save_file({"before": torch.ones(3), "x": tensor}, tmp_path / "model.safetensors")
    file = CheckpointFile(tmp_path / "model.safetensors")
    found = file.tensors["x"]
    assert TORCH_DTYPES[found.dtype] == dtype
    assert found.shape == (2, 3)
    again = torch.empty(found.shape, dtype=dtype)
    file.read(found.begin, bytes_of(again))
    assert torch.equal(again.view(torch.uint8), tensor.view(torch.uint8))
    assert torch.equal(file.mapped(found.begin, found.nbytes), raw)


def test_a_pipe_is_no_file(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="is not a file"):
        CheckpointFile(tmp_path / "model.safetensors")
