"""Files whose weights are fp8, each block with a scale, as DeepSeek-V3's and Qwen3's fp8 ones are.

With a weight W of [out, in] comes W_scale_inv of [ceil(out / rows), ceil(in / columns)]; their
product is the weight. What has no scale is stored as it is: norms, the router, the embedding.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from flexpert.errors import ModelError, UnsupportedModel
from flexpert.kernels import block_fp8 as fp8
from flexpert.models.checkpoint import TensorFiles

SUFFIX = "_scale_inv"
REMEDY = "use a bfloat16 checkpoint of it"

Block = tuple[int, int]
"""(rows, columns) that share a scale."""


def block_of(path: Path, config: PreTrainedConfig) -> Block | None:
    """What a checkpoint's configuration says of its weights; None: they are not quantized.

    Raises:
        UnsupportedModel: they are quantized in another way than fp8 with blocks.
    """
    quantization = getattr(config, "quantization_config", None)
    if not quantization:
        return None
    settings: dict[str, Any] = (
        quantization if isinstance(quantization, dict) else quantization.to_dict()
    )
    method = settings.get("quant_method", "?")
    if method != "fp8":
        raise UnsupportedModel(
            f"{path} is quantized ({method}); flexpert reads fp8 with scales of blocks, and no "
            f"other quantization; {REMEDY}"
        )
    block = settings.get("weight_block_size")
    if (
        not isinstance(block, list | tuple)
        or len(block) != 2
        or not all(isinstance(size, int) and size > 0 for size in block)
    ):
        raise UnsupportedModel(
            f"{path} is quantized to fp8 with weight_block_size {block!r}; flexpert reads scales "
            f"of blocks, such as [128, 128]; {REMEDY}"
        )
    return block[0], block[1]


class Fp8Files(TensorFiles):
    """`read` and `read_row` give weights as float32, their scales counted in.

    Raises: ModelError: files are missing or damaged, or a weight has no scale.
    """

    def __init__(self, path: Path, block: Block, named: object = None) -> None:
        super().__init__(path, named)
        self.block = block
        self.weights = _As(self, "")
        self.scales = _As(self, SUFFIX)
        self._fp8 = frozenset(key for key in self._place if self.dtype(key) == "F8_E4M3")
        scales = {key + SUFFIX for key in self._fp8}
        self._keys = tuple(key for key in self._place if key not in scales)
        for key in sorted(self._fp8):
            if key + SUFFIX not in self._place:
                raise ModelError(
                    f"{path} has {key} in fp8 without its scales {key}{SUFFIX}; download it again"
                )
            self._check_scales(key, self.shape(key), self.shape(key + SUFFIX))

    @property
    def format(self) -> str:
        return f"fp8 with scales of blocks of {self.block[0]} x {self.block[1]}"

    def keys(self) -> Iterable[str]:
        """Of weights, without their scales."""
        return self._keys

    def parts(self, key: str) -> Sequence[str]:
        return (key, key + SUFFIX) if key in self._fp8 else (key,)

    @property
    def unexplained(self) -> str:
        return (
            "and config.json's quantization_config says fp8, of which flexpert reads F8_E4M3 with "
            f"scales in {SUFFIX}"
        )

    def is_quantized(self, key: str) -> bool:
        return key in self._fp8

    def scaled(self, key: str) -> bool:
        """Whether a tensor is a weight with scales."""
        return key in self._fp8

    def is_fp8(self, key: str) -> bool:
        return key in self._fp8

    def is_plain(self, key: str) -> bool:
        return not self.scaled(key) and super().is_plain(key)

    def read(self, key: str) -> Tensor:
        tensor = super().read(key)
        if not self.scaled(key):
            return tensor
        return self._dequantized(key, tensor, super().read(key + SUFFIX))

    def read_row(self, key: str, row: int) -> Tensor:
        tensor = super().read_row(key, row)
        if not self.scaled(key):
            return tensor
        return self._dequantized(key, tensor, super().read_row(key + SUFFIX, row))

    def stored(self, key: str) -> Tensor:
        """As it lies in the files."""
        return super().read(key)

    def stored_row(self, key: str, row: int) -> Tensor:
        return super().read_row(key, row)

    def _dequantized(self, key: str, weight: Tensor, scales: Tensor) -> Tensor:
        self._check_scales(key, weight.shape, scales.shape)
        return fp8.dequantize(weight, scales, self.block)

    def _check_scales(self, key: str, weight: Sequence[int], scales: Sequence[int]) -> None:
        desired = tuple(-(-n // b) for n, b in zip(weight[-2:], self.block, strict=True))
        if tuple(scales) != (*weight[:-2], *desired):
            raise ModelError(
                f"{self.path}: the scales of {key} have shape {tuple(scales)}, blocks of "
                f"{self.block[0]} x {self.block[1]} need {(*weight[:-2], *desired)}"
            )


class _As:
    """Either part of the weights by the weights' keys, as it lies in the files."""

    def __init__(self, files: Fp8Files, suffix: str) -> None:
        self._files = files
        self._suffix = suffix

    def shape(self, key: str) -> tuple[int, ...]:
        return self._files.shape(key + self._suffix)

    def read(self, key: str) -> Tensor:
        return self._plain(self._files.stored(key + self._suffix))

    def read_row(self, key: str, row: int) -> Tensor:
        return self._plain(self._files.stored_row(key + self._suffix, row))

    def _plain(self, tensor: Tensor) -> Tensor:
        return tensor.float() if self._suffix else tensor.view(torch.uint8)
