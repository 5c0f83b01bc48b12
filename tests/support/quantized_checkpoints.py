"""Checkpoints quantized in published layouts, written here word by word, and the same dequantized.

They share no code with what reads them. `make_quantized_checkpoint(layout, family, dir)` writes
both of one random model in float32.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from support.checkpoints import make_checkpoint

SIZES = {"hidden_size": 64, "moe_intermediate_size": 64, "intermediate_size": 64}
GROUP = 32
FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)

Parts = dict[str, Tensor]
"""By the end of their names, which takes the place of "weight"."""

Quantize = Callable[[Tensor], tuple[Parts, Tensor]]
"""[out, in] float32 → its parts, and what these stand for in float32."""


def packed(codes: Tensor, bits: int, dim: int) -> Tensor:
    """Codes side by side in words, the first in the lowest bits."""
    each = 32 // bits
    turned = codes.long().movedim(dim, -1)
    words = torch.zeros(*turned.shape[:-1], turned.shape[-1] // each, dtype=torch.int64)
    for place in range(each):
        words |= turned[..., place::each] << (bits * place)
    words = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
    return words.movedim(-1, dim).contiguous()


def integers(weight: Tensor, bits: int, groups: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes [out, in], scales and zero points [out, groups], and what they stand for.

    groups: [in] the group of each column.
    """
    count = int(groups.max()) + 1
    scales = torch.zeros(weight.shape[0], count)
    zeros = torch.zeros(weight.shape[0], count)
    for group in range(count):
        part = weight[:, groups == group]
        low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
        scales[:, group] = ((high - low) / (2**bits - 1)).clamp(min=1e-6).half().float()
        # 0 is left out: GPTQ's first format cannot say it without taking from its neighbour
        zeros[:, group] = (-low / scales[:, group]).round().clamp(1, 2**bits - 1)
    codes = (weight / scales[:, groups] + zeros[:, groups]).round().clamp(0, 2**bits - 1)
    return codes, scales, zeros, (codes - zeros[:, groups]) * scales[:, groups]


def in_order(columns: int) -> Tensor:
    return torch.arange(columns) // GROUP


def out_of_order(columns: int) -> Tensor:
    generator = torch.Generator().manual_seed(columns)
    return in_order(columns)[torch.randperm(columns, generator=generator)]


def gptq(weight: Tensor) -> tuple[Parts, Tensor]:
    groups = out_of_order(weight.shape[1])
    codes, scales, zeros, dequantized = integers(weight, 4, groups)
    return {
        "qweight": packed(codes.T, 4, 0),
        "qzeros": packed((zeros - 1).T, 4, 1),
        "scales": scales.T.contiguous().half(),
        "g_idx": groups.int(),
    }, dequantized


def awq(weight: Tensor) -> tuple[Parts, Tensor]:
    codes, scales, zeros, dequantized = integers(weight, 4, in_order(weight.shape[1]))

    def ordered(turned: Tensor) -> Tensor:
        rows, columns = turned.shape
        return turned.view(rows, columns // 8, 8)[..., AWQ_ORDER].reshape(rows, columns)

    return {
        "qweight": packed(ordered(codes.T.contiguous()), 4, 1),
        "qzeros": packed(ordered(zeros.T.contiguous()), 4, 1),
        "scales": scales.T.contiguous().half(),
    }, dequantized


def compressed_int4(weight: Tensor) -> tuple[Parts, Tensor]:
    """Asymmetric, with the order of activations, which releases up to 0.19 wrote."""
    groups = out_of_order(weight.shape[1])
    codes, scales, zeros, dequantized = integers(weight, 4, groups)
    return {
        "weight_packed": packed(codes, 4, 1),
        "weight_scale": scales,
        "weight_zero_point": packed(zeros, 4, 0),
        "weight_shape": torch.tensor(weight.shape),
        "weight_g_idx": groups.int(),
    }, dequantized


def w4a16(weight: Tensor) -> tuple[Parts, Tensor]:
    """compressed-tensors' as it is published most: symmetric, scales in bfloat16."""
    grouped = weight.view(weight.shape[0], -1, GROUP)
    scales = (grouped.abs().amax(-1) / 7).clamp(min=1e-6).bfloat16()
    signed = (grouped / scales.float().unsqueeze(-1)).round().clamp(-8, 7)
    return {
        "weight_packed": packed((signed + 8).view(weight.shape), 4, 1),
        "weight_scale": scales,
        "weight_shape": torch.tensor(weight.shape),
    }, (signed * scales.float().unsqueeze(-1)).view(weight.shape)


def fp8_rows(weight: Tensor) -> tuple[Parts, Tensor]:
    scales = (weight.abs().amax(1, keepdim=True) / 448).bfloat16()
    codes = (weight / scales.float()).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale": scales}, codes.float() * scales.float()


def fp8_tensor(weight: Tensor) -> tuple[Parts, Tensor]:
    scale = weight.abs().amax() / 448
    codes = (weight / scale).to(torch.float8_e4m3fn)
    return {
        "weight": codes,
        "weight_scale": scale,
        "input_scale": torch.tensor(0.03),
    }, codes.float() * scale


def fp8_powers(weight: Tensor) -> tuple[Parts, Tensor]:
    """Blocks of 32 x 32 whose scales are powers of two, as DeepSeek-V3.1's."""
    rows, columns = weight.shape
    blocks = weight.view(rows // 32, 32, columns // 32, 32)
    exponents = (blocks.abs().amax((1, 3)) / 448).log2().ceil()
    scales = 2.0**exponents
    codes = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn)
    dequantized = (codes.float() * scales[:, None, :, None]).view(rows, columns)
    return {
        "weight": codes.view(rows, columns),
        "weight_scale_inv": (exponents + 127).to(torch.uint8).view(torch.float8_e8m0fnu),
    }, dequantized


def fp4(weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Codes [out, in] of a weight that is scaled already, and their values."""
    nearest = (weight.abs().unsqueeze(-1) - FP4).abs().argmin(-1)
    return nearest + 8 * (weight < 0), FP4[nearest] * weight.sign()


def nibbles(codes: Tensor) -> Tensor:
    return (codes[..., ::2] | codes[..., 1::2] << 4).to(torch.uint8)


def modelopt_nvfp4(weight: Tensor) -> tuple[Parts, Tensor]:
    """With factors of columns, as AWQ leaves them."""
    rows, columns = weight.shape
    factors = 1.0 + torch.arange(columns) % 3
    smoothed = weight / factors
    whole = smoothed.abs().amax() / (6 * 448)
    blocks = smoothed.view(rows, columns // 16, 16)
    scales = (blocks.abs().amax(-1) / 6 / whole).to(torch.float8_e4m3fn)
    each = scales.float().clamp(min=2**-9).unsqueeze(-1) * whole
    codes, values = fp4(blocks / each, 16)
    return {
        "weight": nibbles(codes.view(rows, columns)),
        "weight_scale": each.squeeze(-1).div(whole).to(torch.float8_e4m3fn),
        "weight_scale_2": whole,
        "pre_quant_scale": factors,
        "input_scale": torch.tensor(0.1),
    }, (values * each).view(rows, columns) * factors


def mx_blocks(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[..., out, in] → blocks [..., out, in / 32, 16], scales [..., out, in / 32], dequantized."""
    blocks = weight.reshape(*weight.shape[:-1], -1, 32)
    exponents = blocks.abs().amax(-1).log2().floor() - 2
    each = (2.0**exponents).unsqueeze(-1)
    codes, values = fp4(blocks / each, 32)
    return nibbles(codes), (exponents + 127).to(torch.uint8), (values * each).flatten(-2)


_INT4 = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": GROUP}
_FP8 = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}

LAYOUTS: dict[str, tuple[dict[str, Any], list[tuple[str, Quantize]]]] = {
    "gptq": (
        {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": True, "sym": False},
        [(".*", gptq)],
    ),
    "awq": (
        {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"},
        [(".*", awq)],
    ),
    "mixed": (
        {
            "quant_method": "compressed-tensors",
            "format": "mixed-precision",
            "config_groups": {
                "rest": {"targets": ["Linear"], "weights": _FP8, "format": "float-quantized"},
                "experts": {
                    "targets": [r"re:.*\.experts\..*"],
                    "weights": _INT4,
                    "format": "pack-quantized",
                },
            },
        },
        [(r".*\.experts\.", compressed_int4), (".*", fp8_rows)],
    ),
    "w4a16": (
        {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {
                "group_0": {"targets": ["Linear"], "weights": {**_INT4, "symmetric": True}}
            },
        },
        [(".*", w4a16)],
    ),
    "fp8_powers": (
        {"quant_method": "fp8", "weight_block_size": [32, 32], "scale_fmt": "ue8m0"},
        [(".*", fp8_powers)],
    ),
    "modelopt_fp8": (
        {"quant_method": "modelopt", "quant_algo": "FP8"},
        [(".*", fp8_tensor)],
    ),
    "modelopt_nvfp4": (
        {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16},
        [(".*", modelopt_nvfp4)],
    ),
    "mxfp4": ({"quant_method": "mxfp4"}, []),
}
"""Layout → what the configuration says, and how the weights of modules are quantized."""

_KEPT = re.compile(r"embed|norm|(mlp|moe|block)\.(gate|router)\.|router")


def make_quantized_checkpoint(
    layout: str, family: str, directory: Path, side_file: bool = False, **changes: Any
) -> tuple[Path, Path]:
    """(quantized, the same dequantized) of one random model in float32.

    side_file: ModelOpt's has what is said of it, config.json has not.
    """
    told, rules = LAYOUTS[layout]
    plain = make_checkpoint(family, directory / "plain", **{**SIZES, **changes})
    quantized: Parts = {}
    dequantized: Parts = {}
    for key, tensor in load_file(plain / "model.safetensors").items():
        stem = key.removesuffix("weight")
        quantized[key] = dequantized[key] = tensor
        if layout == "mxfp4" and key.endswith(("gate_up_proj", "down_proj")):
            blocks, scales, values = mx_blocks(tensor.mT.contiguous())
            del quantized[key]
            quantized |= {f"{key}_blocks": blocks, f"{key}_scales": scales}
            dequantized[key] = values.mT.contiguous()
        elif (
            tensor.ndim == 2
            and key.endswith(".weight")
            and not _KEPT.search(key)
            and all(size % GROUP == 0 for size in tensor.shape)
        ):
            rule = next((made for name, made in rules if re.match(name, key)), None)
            if rule is not None:
                parts, dequantized[key] = rule(tensor)
                del quantized[key]
                quantized |= {stem + name: part for name, part in parts.items()}
    small, large = directory / "quantized", directory / "dequantized"
    for path, state in ((small, quantized), (large, dequantized)):
        path.mkdir()
        contiguous = {key: tensor.contiguous() for key, tensor in state.items()}
        save_file(contiguous, path / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((plain / "config.json").read_text())
        if path is small and not side_file:
            config["quantization_config"] = told
        (path / "config.json").write_text(json.dumps(config))
    if side_file:
        inner = {name: value for name, value in told.items() if name != "quant_method"}
        side = {"producer": {"name": "modelopt", "version": "0.47.0"}, "quantization": inner}
        (small / "hf_quant_config.json").write_text(json.dumps(side))
    return small, large
