"""Weights that public tools quantized, each read as the tools' own code dequantizes it.

data/quantized_weights.safetensors has one small weight of each layout as its tool wrote it, with
the configuration and a hash of what the tool's library makes of it; data/README.md says how.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from flexpert.errors import ModelError
from flexpert.models.packed_codes import FP4_VALUES, fp4_values, fp8_values, unpack_awq, unpack_bits
from flexpert.models.quantization import SIDE_FILE, read_quantization
from flexpert.models.quantized_files import QuantizedFiles

DATA = Path(__file__).parent / "data" / "quantized_weights.safetensors"
MODULE = "model.layers.0.mlp.experts.0.down_proj"

with safe_open(DATA, "pt") as _file:
    WRITTEN: dict[str, dict[str, Any]] = {
        name: json.loads(told) for name, told in _file.metadata().items()
    }


def parts_of(name: str) -> dict[str, torch.Tensor]:
    with safe_open(DATA, "pt") as file:
        return {
            key.removeprefix(f"{name}/"): file.get_tensor(key)
            for key in file.keys()  # noqa: SIM118
            if key.startswith(f"{name}/")
        }


def written(
    directory: Path,
    parts: dict[str, torch.Tensor],
    config: dict[str, Any] | None,
    side: dict[str, Any] | None = None,
) -> Path:
    """A directory with these parts of a weight and what is said of them."""
    tensors = {f"{MODULE}.{part}": tensor for part, tensor in parts.items()}
    save_file(tensors, directory / "model.safetensors")
    told = {} if config is None else {"quantization_config": config}
    (directory / "config.json").write_text(json.dumps(told))
    if side is not None:
        (directory / SIDE_FILE).write_text(json.dumps(side))
    return directory


def opened(path: Path) -> QuantizedFiles:
    quantization = read_quantization(path)
    assert quantization is not None
    return QuantizedFiles(path, quantization)


def digest(tensor: torch.Tensor) -> str:
    added = (tensor + 0).contiguous()  # tools differ in the sign of a zero
    octets = added.view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(octets).hexdigest()[:16]


@pytest.mark.parametrize("name", sorted(WRITTEN))
def test_a_weight_is_what_its_tool_dequantizes(name: str, tmp_path: Path) -> None:
    told = WRITTEN[name]
    files = opened(written(tmp_path, parts_of(name), told["config"], told["side"]))
    assert list(files.keys()) == [f"{MODULE}.weight"]  # no part of it is taken for a parameter
    read = files.read(f"{MODULE}.weight")
    assert list(read.shape) == told["shape"] == list(files.shape(f"{MODULE}.weight"))
    assert digest(read.to(getattr(torch, told["dtype"]))) == told["sha256"]


@pytest.mark.parametrize("name", sorted(n for n, told in WRITTEN.items() if told["side"]))
def test_modelopts_side_file_is_enough(name: str, tmp_path: Path) -> None:
    told = WRITTEN[name]
    files = opened(written(tmp_path, parts_of(name), None, told["side"]))
    read = files.read(f"{MODULE}.weight")
    assert digest(read.to(getattr(torch, told["dtype"]))) == told["sha256"]


UNNEEDED = {"input_scale", "input_global_scale", "g_idx"}


@pytest.mark.parametrize("name", sorted(WRITTEN))
def test_every_part_that_is_left_out_is_missed_by_name(name: str, tmp_path: Path) -> None:
    told, parts = WRITTEN[name], parts_of(name)
    for left_out in sorted(parts.keys() - UNNEEDED - {"pre_quant_scale"}):
        rest = {part: tensor for part, tensor in parts.items() if part != left_out}
        path = written(tmp_path, rest, told["config"], told["side"])
        with pytest.raises(ModelError, match=r"experts\.0\.down_proj\.\w+"):
            opened(path)


@pytest.mark.parametrize("name", sorted(WRITTEN))
def test_scales_of_another_shape_are_refused_by_name(name: str, tmp_path: Path) -> None:
    told, parts = WRITTEN[name], parts_of(name)
    scale = next(part for part in ("weight_scale_inv", "weight_scale", "scales") if part in parts)
    wrong = parts[scale].reshape(-1)[:1].repeat(7).view(7, 1)  # 7 divides no size here
    path = written(tmp_path, {**parts, scale: wrong}, told["config"], told["side"])
    with pytest.raises(ModelError, match=r"down_proj\.\w+.*the scales have shape \(7, 1\)"):
        opened(path)


@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_of_any_width_are_unpacked(bits: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 1 << bits, (3, 64), generator=generator)
    words = torch.zeros(3, 2 * bits, dtype=torch.int64)
    for row in range(3):
        whole = sum(int(code) << (bits * place) for place, code in enumerate(codes[row]))
        for word in range(2 * bits):
            words[row, word] = (whole >> (32 * word)) & 0xFFFFFFFF
    packed = words.to(torch.uint32).view(torch.int32)
    assert torch.equal(unpack_bits(packed, bits, 61).long(), codes[:, :61])


def test_awq_has_an_order_of_its_own() -> None:
    word = torch.tensor([[0x76543210]], dtype=torch.int32)
    assert unpack_awq(word).T.tolist() == [[0, 4, 1, 5, 2, 6, 3, 7]]


def test_a_byte_of_fp4_has_its_first_code_in_the_low_half() -> None:
    octets = torch.arange(256, dtype=torch.uint8)
    values = [*FP4_VALUES, *(-value for value in FP4_VALUES)]
    expected = [values[code] for octet in range(256) for code in (octet & 15, octet >> 4)]
    assert fp4_values(octets).tolist() == expected


def test_fp8_is_looked_up_as_torch_converts_it() -> None:
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        codes = torch.arange(256, dtype=torch.uint8).repeat(2)[3:].view(dtype)
        for part in (codes, codes[1:]):  # an odd number of them, and an even one
            torch.testing.assert_close(fp8_values(part), part.float(), equal_nan=True)
