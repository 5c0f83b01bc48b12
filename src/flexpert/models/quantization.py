"""What a checkpoint's configuration says of how its weights are quantized: layouts by module.

It is config.json's `quantization_config`, or ModelOpt's side file hf_quant_config.json. What it
leaves out of the quantization needs no reading: such weights lie in the files as they are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from flexpert.errors import ConfigError, ModelError, UnsupportedModel
from flexpert.models.packed_formats import (
    AwqCodes,
    Fp4Groups,
    GptqCodes,
    MxBlocks,
    PackedIntegers,
)
from flexpert.models.scale_grid import PER_CHANNEL, PER_TENSOR, Grid
from flexpert.models.stored_formats import ScaledElements, StoredFormat
from flexpert.reading import read_text, shown

SIDE_FILE: Final = "hf_quant_config.json"
MODELOPT: Final = "modelopt"
REMEDY: Final = "use an unquantized (bfloat16) checkpoint of it"

_MOST_BYTES: Final = 64 * 2**20  # ModelOpt's names every layer
_MOST_PATTERN: Final = 4096  # characters of a regular expression

Settings = Mapping[str, Any]
"""A JSON object."""

Formats = tuple[StoredFormat, ...]
"""Those that a module's weight may have; the names of its tensors and their dtypes tell which."""

FormatsOf = Callable[[str], Formats]
"""By the name of a module in the files."""


@dataclass(frozen=True)
class Quantization:
    """How the weights of a checkpoint are quantized.

    method: as the checkpoint calls it. formats_of: a module's; those of one that is not quantized
    may be any. source: the file that says so.
    """

    method: str
    formats_of: FormatsOf
    source: str


def read_quantization(path: Path) -> Quantization | None:
    """Of a checkpoint's directory; None: nothing there says that it is quantized.

    Raises:
        UnsupportedModel: it is quantized in a way that is not served.
        ModelError: a file cannot be read.
    """
    name, settings = "config.json", _settings_in(_read(path / "config.json"))
    if (settings is None or settings.get("quant_method") == MODELOPT) and (
        path / SIDE_FILE
    ).is_file():
        # where ModelOpt writes both, only this one has all sizes
        name, settings = SIDE_FILE, _from_side_file(path / SIDE_FILE, _read(path / SIDE_FILE))
    if settings is None:
        return None
    method = str(settings.get("quant_method", "?"))
    make = METHODS.get(method)
    try:
        if make is None:
            raise _UnservedError("its method is not served")
        return Quantization(method, make(settings), name)
    except _UnservedError as unserved:
        raise UnsupportedModel(
            f"{path} is quantized ({shown(method)}, {name}): {unserved}; served are "
            f"{', '.join(METHODS)} (docs/quantization.md says which of their layouts); {REMEDY}"
        ) from None


class _UnservedError(Exception):
    """Says why."""


def _read(file: Path) -> Settings:
    try:
        told = json.loads(read_text(file, "the configuration", most=_MOST_BYTES))
    except (ConfigError, ValueError, RecursionError) as error:
        raise ModelError(f"{file} cannot be read: {shown(error)}") from None
    if not isinstance(told, dict):
        raise ModelError(f"{file} cannot be read: it is no JSON object")
    return told


def _settings_in(config: Settings) -> Settings | None:
    """Of the model, or of the text model in a wrapper."""
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        for name in ("quantization_config", "compression_config"):
            if isinstance(found := part.get(name), dict) and found:
                return found
    return None


def _from_side_file(file: Path, told: Settings) -> Settings:
    """ModelOpt's, as it writes the same into config.json."""
    inner = told.get("quantization")
    if not isinstance(inner, dict):
        raise ModelError(f"{file} is not ModelOpt's: it has no `quantization`; download it again")
    return {**inner, "quant_method": MODELOPT}


# ---- fp8 and MXFP4, as models are published ---------------------------------------------------


def _fp8(settings: Settings) -> FormatsOf:
    """transformers' "fp8" (DeepSeek-V3's, Qwen3's and others'), scales beside the weights."""
    if settings.get("expert_dtype", "fp8") != "fp8":
        raise _UnservedError(f"expert_dtype {shown(settings['expert_dtype'])}")
    if settings.get("fmt", "e4m3") != "e4m3":
        raise _UnservedError(f"fmt {shown(settings['fmt'])}; e4m3 is served")
    block = settings.get("weight_block_size")
    if block is None:
        grids: list[Grid] = [PER_TENSOR, PER_CHANNEL]
    else:
        grids = [(_count(block, 0, "weight_block_size"), _count(block, 1, "weight_block_size"))]
    names = ("{}_scale_inv", "{}_scale", "scale", "qscale_{}")
    formats = tuple(ScaledElements(grid, "F8_E4M3", name) for name in names for grid in grids)
    return lambda module: formats


def _fbgemm(settings: Settings) -> FormatsOf:
    formats: Formats = (ScaledElements(PER_CHANNEL, "F8_E4M3", "{}_scale"),)
    return lambda module: formats


def _mxfp4(settings: Settings) -> FormatsOf:
    formats: Formats = (MxBlocks((1, 32)),)
    return lambda module: formats


# ---- GPTQ and AWQ -----------------------------------------------------------------------------


def _gptq(settings: Settings) -> FormatsOf:
    packing = str(settings.get("checkpoint_format") or settings.get("format") or "gptq")
    if packing not in {"gptq", "gptq_v2"}:
        raise _UnservedError(f"checkpoint_format {shown(packing)}; gptq and gptq_v2 are served")
    if settings.get("pack_dtype", "int32") not in {"int32", "torch.int32"}:
        raise _UnservedError(f"pack_dtype {shown(settings['pack_dtype'])}; int32 is served")

    def made(told: Settings) -> Formats:
        bits = told.get("bits")
        if bits not in {2, 3, 4, 8}:
            raise _UnservedError(f"bits {shown(bits)}; 2, 3, 4 and 8 are served")
        return (GptqCodes((1, _group(told, "group_size")), bits, packing == "gptq"),)

    formats = made(settings)
    # gptqmodel's settings of single modules: a regular expression, "-:" before it leaves them out
    own = [
        (_pattern(name.removeprefix("+:")), made({**settings, **change}))
        for name, change in (settings.get("dynamic") or {}).items()
        if not name.startswith("-:") and isinstance(change, dict)
    ]

    def of(module: str) -> Formats:
        return next((those for pattern, those in own if pattern.match(module)), formats)

    return of


def _awq(settings: Settings) -> FormatsOf:
    version = str(settings.get("version") or settings.get("format") or "gemm").lower()
    if version != "gemm":
        raise _UnservedError(f"version {shown(version)}; gemm is served")
    bits = settings.get("bits", settings.get("w_bit", 4))
    if bits != 4:
        raise _UnservedError(f"bits {shown(bits)}; 4 is served")
    name = "q_group_size" if "group_size" not in settings else "group_size"
    formats: Formats = (AwqCodes((1, _group(settings, name, 128))),)
    return lambda module: formats


# ---- compressed-tensors -----------------------------------------------------------------------


def _compressed_tensors(settings: Settings) -> FormatsOf:
    settings = settings.get("quantization_config") or settings
    sparsity = settings.get("sparsity_config")
    if isinstance(sparsity, dict) and sparsity.get("format", "dense") != "dense":
        raise _UnservedError(f"its weights are sparse ({shown(sparsity['format'])})")
    if settings.get("transform_config"):
        raise _UnservedError("its activations are transformed (transform_config)")
    groups = settings.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise _UnservedError("it has no config_groups")
    found: list[tuple[list[str], Formats]] = []
    for name, group in groups.items():
        if isinstance(group, list):
            raise _UnservedError(f"{shown(name)} is a preset, without its settings")
        targets, weights = group.get("targets"), group.get("weights")
        if weights is not None:
            layout = group.get("format") or settings.get("format")
            found.append((_names(targets), _of_scheme(str(name), weights, layout)))
    return _by_targets(found)


_COMPRESSED: Final = {
    "int-quantized",
    "float-quantized",
    "naive-quantized",
    "pack-quantized",
    "nvfp4-pack-quantized",
    "mxfp4-pack-quantized",
    "mxfp8-quantized",
    "mixed-precision",
}


def _of_scheme(group: str, weights: Settings, layout: object) -> Formats:
    """compressed-tensors' settings of a group's weights."""
    if layout is not None and layout not in _COMPRESSED:
        raise _UnservedError(f"format {shown(layout)}; served are {', '.join(sorted(_COMPRESSED))}")
    bits, kind = weights.get("num_bits", 8), str(weights.get("type", "int")).lower()
    grid = _strategy(weights)
    if kind == "float" and bits == 4:
        if grid[1] == 32:
            return (Fp4Groups(grid),)
        return (Fp4Groups(grid, global_name="{}_global_scale", divided=True),)
    if kind == "float" and bits == 8:
        return (ScaledElements(grid, "F8_E4M3", "{}_scale"),)
    if kind == "int" and isinstance(bits, int) and 2 <= bits <= 8:
        symmetric = bool(weights.get("symmetric", True))
        elements = ScaledElements(grid, "I8", "{}_scale", symmetric)
        return (PackedIntegers(grid, bits, symmetric), elements)
    raise _UnservedError(f"{shown(group)} has weights of {shown(bits)} bits, type {shown(kind)}")


def _strategy(weights: Settings) -> Grid:
    strategy, size = weights.get("strategy"), weights.get("group_size")
    if strategy is None:
        strategy = "tensor" if size is None else "channel" if size == -1 else "group"
    if strategy == "block":
        block = weights.get("block_structure")
        if isinstance(block, str):  # "128x128" of older releases
            block = [int(part) if part.isdigit() else 0 for part in block.split("x")]
        return _count(block, 0, "block_structure"), _count(block, 1, "block_structure")
    if strategy in {"group", "tensor_group"}:
        return 1, _count([size], 0, "group_size")
    if strategy in {"tensor", "channel"}:
        return PER_TENSOR if strategy == "tensor" else PER_CHANNEL
    raise _UnservedError(f"strategy {shown(strategy)}")


def _by_targets(groups: Sequence[tuple[list[str], Formats]]) -> FormatsOf:
    """Names go before patterns, these before classes of modules (all are linear layers here)."""
    names: dict[str, Formats] = {}
    patterns: list[tuple[re.Pattern[str], Formats]] = []
    rest: list[Formats] = []
    for targets, formats in groups:
        for target in targets:
            if target.startswith("re:"):
                patterns.append((_pattern(target.removeprefix("re:")), formats))
            elif "." in target or target in {"lm_head"}:
                names.setdefault(target, formats)
            else:
                rest.append(formats)
    everywhere = tuple(dict.fromkeys(one for formats in rest for one in formats))

    def of(module: str) -> Formats:
        if module in names:
            return names[module]
        return next((those for pattern, those in patterns if pattern.match(module)), everywhere)

    return of


# ---- ModelOpt ---------------------------------------------------------------------------------


def _modelopt(settings: Settings) -> FormatsOf:
    algorithm = settings.get("quant_algo")
    if algorithm != "MIXED_PRECISION":
        formats = _of_algorithm(algorithm, settings)
        return lambda module: formats
    layers = settings.get("quantized_layers")
    if not isinstance(layers, dict) or not all(isinstance(one, dict) for one in layers.values()):
        raise _UnservedError("its precision is mixed, and quantized_layers does not say how")
    own = {name: _of_algorithm(one.get("quant_algo"), one) for name, one in layers.items()}
    return lambda module: own.get(module, ())


def _of_algorithm(algorithm: object, settings: Settings) -> Formats:
    """ModelOpt's name of a way to quantize."""

    def group(default: int) -> int:
        groups = settings.get("config_groups")
        told = [settings, *(groups.values() if isinstance(groups, dict) else ())]
        weights = [one.get("weights", one) for one in told if isinstance(one, dict)]
        sizes = [one.get("group_size") for one in weights if isinstance(one, dict)]
        return _count([next((size for size in sizes if size), default)], 0, "group_size")

    match str(algorithm).upper():
        case "FP8":
            return _elements(PER_TENSOR, "F8_E4M3")
        case "FP8_PER_CHANNEL_PER_TOKEN" | "FP8_PC_PT":
            return _elements(PER_CHANNEL, "F8_E4M3")
        case "FP8_PB_WO" | "FP8_PB_REAL":
            return _elements((group(128), group(128)), "F8_E4M3")
        case "W8A16" | "W8A8_SQ_PER_CHANNEL":
            return _elements(PER_CHANNEL, "I8")
        case "MXFP8":
            return _elements((1, group(32)), "F8_E4M3")
        case "NVFP4" | "W4A16_NVFP4" | "W4A8_NVFP4_FP8" | "NVFP4_AWQ":
            return _fp4((1, group(16)), global_scale=True)
        case "MXFP4" | "W4A8_MXFP4_FP8":
            return _fp4((1, group(32)), global_scale=False)
    raise _UnservedError(
        f"quant_algo {shown(algorithm)}; FP8, FP8_PER_CHANNEL_PER_TOKEN, FP8_PB_WO, MXFP8, W8A16, "
        "W8A8_SQ_PER_CHANNEL, NVFP4 and its variants, and MXFP4 are served"
    )


def _elements(grid: Grid, dtype: str) -> Formats:
    """Of a linear layer, or of all experts in one tensor, whose scales have longer names."""
    return tuple(
        ScaledElements(grid, dtype, name, smoothed=True) for name in ("{}_scale", "{}_weight_scale")
    )


def _fp4(grid: Grid, global_scale: bool) -> Formats:
    """Likewise; experts in one tensor may lie the other way round."""
    return tuple(
        Fp4Groups(
            grid, "{}", name, f"{name}_2" if global_scale else None, turned=turned, smoothed=True
        )
        for name, turned in (
            ("{}_scale", False),
            ("{}_weight_scale", False),
            ("{}_weight_scale", True),
        )
    )


# ---- values -----------------------------------------------------------------------------------


def _count(values: object, index: int, name: str) -> int:
    if not isinstance(values, list | tuple) or len(values) <= index or len(values) > 2:
        raise _UnservedError(f"{name} is {shown(values)}, not two numbers such as [128, 128]")
    value = values[index]
    if type(value) is not int or value <= 0:
        raise _UnservedError(f"{name} is {shown(value)}, which is no size")
    return value


def _group(settings: Settings, name: str, default: int | None = None) -> int | None:
    size = settings.get(name, default)
    return None if size == -1 else _count([size], 0, name)


def _names(targets: object) -> list[str]:
    if not isinstance(targets, Iterable) or isinstance(targets, str):
        raise _UnservedError(f"targets is {shown(targets)}, not a list of names")
    return [str(target) for target in targets]


def _pattern(expression: str) -> re.Pattern[str]:
    try:
        if len(expression) > _MOST_PATTERN:
            raise re.error(f"it has {len(expression)} characters")
        return re.compile(expression)
    except re.error as error:
        raise _UnservedError(f"{shown(expression)} is no regular expression ({error})") from None


METHODS: Final[Mapping[str, Callable[[Settings], FormatsOf]]] = {
    "fp8": _fp8,
    "fbgemm_fp8": _fbgemm,
    "mxfp4": _mxfp4,
    "compressed-tensors": _compressed_tensors,
    MODELOPT: _modelopt,
    "gptq": _gptq,
    "awq": _awq,
}
"""Those that are served, as `quant_method` names them."""
