"""Which bytes of which files an expert is, where it is just these."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import NamedTuple

import torch

from flexpert.kernels.experts import ExpertShape
from flexpert.models.checkpoint import Checkpoint, Piece
from flexpert.models.checkpoint_file import CheckpointFile
from flexpert.models.quantized_files import QuantizedFiles
from flexpert.models.tensor_header import TORCH_DTYPES, TensorEntry

Place = Callable[[str], tuple[CheckpointFile, TensorEntry]]
"""Where the bytes of a tensor are."""


@dataclass(frozen=True, slots=True)
class Extent:
    """Contiguous bytes of a file, and where they go.

    begin: in the file. part: the tensor of the expert, a field of `ExpertWeights`. into: where in
    that tensor's memory they begin, in bytes.
    """

    file: CheckpointFile
    begin: int
    nbytes: int
    part: str
    into: int


class _PartShape(NamedTuple):
    """One tensor of an expert."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def expert_extents(
    checkpoint: Checkpoint,
    parameters: Mapping[str, str],
    expert: int,
    experts: int,
    shape: ExpertShape,
    as_stored: Collection[str],
) -> list[Extent] | None:
    """Where an expert's bytes lie in the files, in our layout.

    Args:
        parameters: part of an expert → the parameter [experts, …] of the model that has it, which
            is not transposed.
        expert, experts: which one; how many a layer has.
        shape: of the expert in memory.
        as_stored: parameters whose packed weights and scales are taken as they are in the files.

    Returns:
        None: its bytes are in no file, because it is converted, dequantized, quantized or of
        another dtype there; or the files do not fit the configuration.
    """
    extents: list[Extent] = []
    for part, found in _part_shapes(shape).items():
        name = parameters[part]
        quantized = shape.format is not None and not part.endswith("_bias")
        if quantized and name not in as_stored:
            return None
        pieces = checkpoint.expert_pieces(name, expert, experts)
        if pieces is None:
            return None
        files = checkpoint.files
        place = files.place
        if quantized and isinstance(files, QuantizedFiles):
            place = files.stored("scale" if part.endswith("_scale") else "codes").place
        elif not all(files.is_plain(piece.key) for piece in pieces):
            return None
        of_part = _joined(place, pieces, experts, part, found)
        if of_part is None:
            return None
        extents += of_part
    return extents


def _joined(
    place: Place, pieces: list[Piece], experts: int, part: str, desired: _PartShape
) -> list[Extent] | None:
    """The pieces one behind the other; None: they do not make up the part."""
    extents: list[Extent] = []
    done = 0
    for piece in pieces:
        file, entry = place(piece.key)
        shape, begin, nbytes = entry.shape, entry.begin, entry.nbytes
        if piece.row is not None:
            if not shape or shape[0] != experts:
                return None
            nbytes //= experts
            shape, begin = shape[1:], begin + piece.row * nbytes
        same_rows = len(shape) == len(desired.shape) and shape[1:] == desired.shape[1:]
        if not same_rows or TORCH_DTYPES.get(entry.dtype) != desired.dtype:
            return None
        last = extents[-1] if extents else None
        if last is not None and last.file is file and last.begin + last.nbytes == begin:
            extents[-1] = Extent(file, last.begin, last.nbytes + nbytes, part, last.into)
        else:
            extents.append(Extent(file, begin, nbytes, part, done))
        done += nbytes
    return extents if done == desired.nbytes else None


@lru_cache
def _part_shapes(shape: ExpertShape) -> dict[str, _PartShape]:
    """The tensors of an expert by name."""
    weights = shape.over(torch.empty(shape.nbytes, dtype=torch.uint8, device="meta"))
    return {
        name: _PartShape(tuple(tensor.shape), tensor.dtype)
        for name in type(weights).__slots__
        if (tensor := getattr(weights, name)) is not None
    }
