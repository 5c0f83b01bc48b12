"""Reads the experts of a checkpoint: their bytes where they lie in the files, else converted."""

from __future__ import annotations

import logging
import threading
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from flexpert.errors import ModelError
from flexpert.kernels.experts import ExpertShape, ExpertWeights
from flexpert.kernels.weight_formats import format_of
from flexpert.models.checkpoint import Checkpoint, bytes_of
from flexpert.models.expert_extents import Extent, expert_extents
from flexpert.models.finite import check_finite
from flexpert.models.quantized_files import QuantizedFiles

logger = logging.getLogger(__name__)


class ExpertReader:
    """The experts of all MoE layers of a checkpoint. Any number of threads may read at once.

    Most checkpoints have an expert's tensors as they are used, or in rows that only need to be put
    one behind the other. Such an expert is read by its extents: bytes of files straight into its
    memory. That a family's files are like that follows from transformers' conversion of them; the
    first time, the bytes of two experts are compared with what that conversion makes of them. If
    they differ, all experts are converted.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        skeleton: PreTrainedModel,
        names: Sequence[str],
        experts: int,
        as_stored: Collection[str],
    ) -> None:
        """
        Args:
            skeleton: the model on the meta device.
            names: of the modules that have the experts of each MoE layer.
            experts: of each layer.
            as_stored: parameters whose codes and scales are taken as they are in the files.
        """
        self._checkpoint = checkpoint
        self._skeleton = skeleton
        self._names = tuple(names)
        self._experts = experts
        self._as_stored = as_stored
        self._lock = threading.Lock()
        self._extents_agree: bool | None = None  # None: not compared yet

    def read(self, layer: int, expert: int, into: ExpertWeights) -> None:
        """Fill an expert's memory, on any device.

        Raises: ModelError: the files do not hold it, cannot be read, or have changed.
        """
        if all(tensor.device.type == "cpu" and tensor.is_contiguous() for tensor in into.tensors):
            shape = into.shape
            extents = self.extents(layer, expert, shape)
            if extents is not None and self._agree(layer, expert, shape):
                for file in {extent.file for extent in extents}:
                    file.check_unchanged()
                read_extents(extents, into)
                return
        self._checkpoint.files.check_unchanged()
        self.read_converted(layer, expert, into)

    def mapped(self, layer: int, expert: int, shape: ExpertShape) -> ExpertWeights | None:
        """An expert where the page cache has it, each tensor whole and in place; None: that is not
        so in these files. Its numbers are checked, which reads them.

        Raises: ModelError: the files cannot be read, have changed, or have numbers that are not
            finite.
        """
        extents = self.extents(layer, expert, shape)
        if extents is None or len(extents) != len(shape.begins):  # one for each tensor
            return None
        parts = shape.over(torch.empty(shape.nbytes, dtype=torch.uint8, device="meta"))
        dtypes = {extent.part: getattr(parts, extent.part).dtype for extent in extents}
        if any(extent.begin % dtypes[extent.part].itemsize for extent in extents):
            return None
        for file in {extent.file for extent in extents}:
            file.check_unchanged()
        if not self._agree(layer, expert, shape):
            return None
        found: dict[str, Tensor] = {}
        for extent in extents:
            extent.file.announce(extent.begin, extent.nbytes)
        for extent in extents:
            numbers = extent.file.mapped(extent.begin, extent.nbytes).view(dtypes[extent.part])
            extent.file.check_finite(extent.begin, numbers)
            found[extent.part] = numbers.view(getattr(parts, extent.part).shape)
        return ExpertWeights(**found)

    def extents(self, layer: int, expert: int, shape: ExpertShape) -> list[Extent] | None:
        """Where the bytes of an expert lie; None: it has to be converted."""
        if self._module(layer).is_transposed:
            return None
        parameters = self._parameters(layer)
        return expert_extents(
            self._checkpoint, parameters, expert, self._experts, shape, self._as_stored
        )

    def read_converted(self, layer: int, expert: int, into: ExpertWeights) -> None:
        """Fill an expert's memory, on any device, by transformers' conversion of its tensors.

        Raises: ModelError: the files do not hold it, or cannot be read.
        """
        parameters = self._parameters(layer)

        def fill(part: str) -> None:
            target: Tensor | None = getattr(into, part)
            if target is None:
                return
            scales: Tensor | None = getattr(into, f"{part}_scale", None)
            name = parameters[part]
            files = self._checkpoint.files
            if name in self._as_stored and isinstance(files, QuantizedFiles) and scales is not None:
                self._copy_stored(files, name, expert, target, scales)
                return
            tensor = self._converted(layer, name, expert)
            if scales is None:
                tensor = tensor.to(target.dtype)
            check_finite(tensor.contiguous(), self._called(name, expert))
            to_format = format_of(target, scales)
            if scales is None or to_format is None:
                target.copy_(tensor)
                return
            try:
                quantized = to_format.quantize(tensor.to(target.device))
            except ValueError as error:
                raise ModelError(
                    f"{self._checkpoint.files.path}: expert {expert} of {name}: {error}"
                ) from None
            for to, made in zip((target, scales), quantized, strict=True):
                to.copy_(made)

        for part in ("gate_up", "down", "gate_up_bias", "down_bias"):
            fill(part)

    def _converted(self, layer: int, name: str, expert: int) -> Tensor:
        """An expert's part of a parameter: [out, in], or [out] of a bias."""
        tensor = self._checkpoint.read_expert(name, expert, self._experts)
        expected = tuple(self._skeleton.get_parameter(name).shape[1:])
        if tuple(tensor.shape) != expected:
            raise ModelError(
                f"{self._checkpoint.files.path}: expert {expert} of {name} has shape "
                f"{tuple(tensor.shape)}, config.json says {expected}"
            )
        return tensor.t() if tensor.ndim == 2 and self._module(layer).is_transposed else tensor

    def _copy_stored(
        self, files: QuantizedFiles, name: str, expert: int, weight: Tensor, scales: Tensor
    ) -> None:
        codes = weight if weight.dtype == torch.int32 else weight.view(torch.uint8)
        for part, into in ((files.stored("codes"), codes), (files.stored("scale"), scales)):
            tensor = self._checkpoint.read_expert(name, expert, self._experts, part)
            if tensor.shape != into.shape:
                raise ModelError(
                    f"{files.path}: expert {expert} of {name} has weights or scales of shape "
                    f"{tuple(tensor.shape)}, config.json says {tuple(into.shape)}"
                )
            into.copy_(tensor)
            numbers = tensor.view(weight.dtype) if into is codes else tensor
            check_finite(numbers.contiguous(), self._called(name, expert))

    def _called(self, name: str, expert: int) -> str:
        return f"{self._checkpoint.files.path}: expert {expert} of {name}"

    def _agree(self, layer: int, expert: int, shape: ExpertShape) -> bool:
        """Whether extents give what the conversion gives: tried once, with this expert."""
        if self._extents_agree is None:
            with self._lock:
                if self._extents_agree is None:
                    self._extents_agree = self._compare(layer, expert, shape)
        return self._extents_agree

    def _compare(self, layer: int, expert: int, shape: ExpertShape) -> bool:
        read, converted = shape.empty(), shape.empty()
        for each in (expert, (expert + 1) % self._experts):
            extents = self.extents(layer, each, shape)
            if extents is None:
                continue
            read_extents(extents, read)
            self.read_converted(layer, each, converted)
            for ours, theirs in zip(read.tensors, converted.tensors, strict=True):
                if not torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8)):
                    logger.warning(
                        "%s: experts are not their bytes in the files; converting each, which "
                        "takes longer",
                        self._checkpoint.files.path,
                    )
                    return False
        return True

    def _module(self, layer: int) -> Any:
        return self._skeleton.get_submodule(self._names[layer])

    def _parameters(self, layer: int) -> dict[str, str]:
        """Part of an expert → the parameter that has it."""
        name = self._names[layer]
        up = f"{name}.gate_up_proj" if self._module(layer).has_gate else f"{name}.up_proj"
        down = f"{name}.down_proj"
        return {
            "gate_up": up,
            "down": down,
            "gate_up_bias": f"{up}_bias",
            "down_bias": f"{down}_bias",
            "gate_up_scale": up,
            "down_scale": down,
        }


def read_extents(extents: Sequence[Extent], into: ExpertWeights) -> None:
    """Fill an expert's memory on the host.

    Raises: ModelError: a file cannot be read, or has numbers that are not finite.
    """
    parts = {extent.part: getattr(into, extent.part) for extent in extents}
    memory = {part: bytes_of(tensor) for part, tensor in parts.items()}
    for extent in extents:
        place = memory[extent.part][extent.into : extent.into + extent.nbytes]
        extent.file.read(extent.begin, place, parts[extent.part].dtype)
