"""What the header of a safetensors file says, checked before anything is read by it.

A file is 8 bytes with the length of the header (little-endian), the header (JSON: name → dtype,
shape, data_offsets), and the tensors' bytes, one tensor behind the other without a gap.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import prod
from typing import Final, TypeGuard

import torch

PREFIX: Final = 8
"""Bytes before the header: its length."""

_MOST_HEADER_BYTES: Final = 100_000_000  # as safetensors' own reader
_MOST_DIMENSIONS: Final = 32
_MOST_SIZE: Final = 2**63 - 1

TORCH_DTYPES: Final = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
}
"""safetensors' names of the dtypes that can be read."""

_BITS: Final = {
    **{name: 8 * dtype.itemsize for name, dtype in TORCH_DTYPES.items()},
    # torch has no dtype for these
    **{"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6},
}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a file.

    dtype: as safetensors calls it. begin: of its bytes, from the start of the file.
    """

    dtype: str
    shape: tuple[int, ...]
    begin: int
    nbytes: int


def header_size(prefix: bytes, file_bytes: int) -> int:
    """Bytes of the header of a file.

    prefix: the file's first 8 bytes, or as many as there are.

    Raises: ValueError: the file cannot have such a header.
    """
    if len(prefix) < PREFIX:
        raise ValueError(f"it has {len(prefix)} bytes")
    size = int.from_bytes(prefix, "little")
    if size > min(_MOST_HEADER_BYTES, file_bytes - PREFIX):
        raise ValueError(f"its header would have {size} bytes, the file has {file_bytes}")
    return size


def parse_header(header: bytes, file_bytes: int) -> dict[str, TensorEntry]:
    """The tensors of a file by name.

    Args:
        header: the JSON.
        file_bytes: of the whole file.

    Raises: ValueError: it is no header, or does not describe a file of that size: tensors that
        overlap, leave bytes between them, or end elsewhere than the file.
    """
    try:
        told = json.loads(header.decode("utf-8"))
    except RecursionError as error:
        raise ValueError("its header is nested too deeply") from error
    if not isinstance(told, dict):
        raise ValueError("its header is no JSON object")
    begin = PREFIX + len(header)
    entries = {
        name: _entry(name, entry, begin) for name, entry in told.items() if name != "__metadata__"
    }
    end = begin
    for name, entry in sorted(entries.items(), key=lambda pair: (pair[1].begin, pair[1].nbytes)):
        if entry.begin != end:
            raise ValueError(f"{name[:200]!r} begins at byte {entry.begin} instead of {end}")
        end += entry.nbytes
    if end != file_bytes:
        raise ValueError(f"its tensors end at byte {end}, the file at {file_bytes}")
    return entries


def _entry(name: str, told: object, data: int) -> TensorEntry:
    """data: where the bytes of the file's tensors begin. Raises: ValueError"""
    name.encode("utf-8")  # a lone surrogate is no name
    if not isinstance(told, dict):
        raise ValueError(f"{name[:200]!r} has no description")
    dtype, shape, offsets = (told.get(part) for part in ("dtype", "shape", "data_offsets"))
    bits = _BITS.get(dtype) if isinstance(dtype, str) else None
    if not isinstance(dtype, str) or bits is None:
        raise ValueError(f"{name[:200]!r} has the dtype {str(dtype)[:50]!r}, which is unknown")
    if not _are_sizes(shape) or len(shape) > _MOST_DIMENSIONS:
        raise ValueError(f"{name[:200]!r} has no shape")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"{name[:200]!r} has no data_offsets")
    nbytes = offsets[1] - offsets[0]
    if prod(shape) * bits != 8 * nbytes:
        raise ValueError(f"{name[:200]!r} has {nbytes} bytes, which do not fit its shape and dtype")
    return TensorEntry(dtype, tuple(shape), data + offsets[0], nbytes)


def _are_sizes(told: object) -> TypeGuard[list[int]]:
    return isinstance(told, list) and all(
        type(size) is int and 0 <= size <= _MOST_SIZE for size in told
    )
