"""Loads everything of a model but the experts: mapped into a CPU's memory, or copied to a device.

On a CPU, tensors that are used as they are in the files stay in the page cache, where all ranks of
a host share them. On their way to a device they are read in pieces by several threads, each into
pinned memory of its own, from which the device copies one piece while the next is read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from flexpert.errors import ModelError
from flexpert.kernels.device_stream import DeviceStream
from flexpert.kernels.host_upload import HostUploads
from flexpert.models.checkpoint import TensorFiles, bytes_of
from flexpert.models.checkpoint_file import CheckpointFile
from flexpert.models.finite import check_finite
from flexpert.models.source import ModelSource
from flexpert.models.tensor_header import TORCH_DTYPES
from flexpert.parallel import read_threads, run_parallel

PIECE: Final = 4 * 2**20
"""Bytes of a copy to a device: so many take long enough to hide its launch. A thread locks two."""


def load_dense(
    model: PreTrainedModel, source: ModelSource, stream: DeviceStream | None = None
) -> None:
    """Give every parameter and persistent buffer outside the experts its value.

    Args:
        model: on the meta device but for other buffers.
        stream: of the device that the values are copied to; None: they stay on the host.

    Raises: ModelError: a tensor of the checkpoint cannot be read or has another shape.
    """
    plain: dict[str, str] = {}
    converted: list[str] = []
    for name, recipe in source.checkpoint.recipes.items():
        if source.expert_parameters.intersection(recipe.targets):
            continue
        key = _plain_key(source, name)
        if key is None:
            converted.append(name)
        else:
            _check_shape(model, source, name, source.checkpoint.files.shape(key))
            plain[name] = key
    loaded = (
        _load_on_host(model, source, plain, converted)
        if stream is None
        else _load_on_device(model, source, plain, converted, stream)
    )
    for name, tensor in loaded.items():
        replace_tensor(model, name, tensor)
    # transformers says which name of a tied pair to fill when the files hold only one
    everything = {*model.state_dict(), *source.expert_parameters}
    model.tie_weights(missing_keys=everything - source.held, recompute_mapping=False)


def mapped_nbytes(source: ModelSource) -> int:
    """Bytes of the weights outside the experts that a CPU uses where the files are mapped: they are
    no process's own."""
    experts, files = source.expert_parameters, source.checkpoint.files
    keys = (
        _plain_key(source, name)
        for name, recipe in source.checkpoint.recipes.items()
        if not experts.intersection(recipe.targets)
    )
    return sum(files.place(key)[1].nbytes for key in keys if key is not None)


def replace_tensor(model: PreTrainedModel, name: str, tensor: Tensor) -> None:
    """Put a tensor in the place of a parameter or buffer."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if leaf in module._buffers:
        module._buffers[leaf] = tensor
    else:
        module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)


def _plain_key(source: ModelSource, name: str) -> str | None:
    """The key in the files of a parameter that is used just as it is there."""
    recipe, files = source.checkpoint.recipes[name], source.checkpoint.files
    if recipe.converter is not None:
        return None
    key = recipe.sources[""][-1]
    same = files.is_plain(key) and TORCH_DTYPES.get(files.dtype(key)) == source.dtype_of(name)
    return key if same else None


def _check_shape(
    model: PreTrainedModel, source: ModelSource, name: str, shape: tuple[int, ...]
) -> None:
    expected = tuple(model.get_parameter_or_buffer(name).shape)
    if shape != expected:
        raise ModelError(f"{source.path}: {name} has shape {shape}, config.json says {expected}")


def _convert(model: PreTrainedModel, source: ModelSource, name: str) -> dict[str, Tensor]:
    """What the recipe of a parameter yields, by name, on the host."""
    found = {}
    for target, tensor in source.checkpoint.read(name).items():
        if source.checkpoint.leaves_out(target):
            continue  # made along with one that is wanted
        _check_shape(model, source, target, tuple(tensor.shape))
        found[target] = tensor.to(source.dtype_of(target)).contiguous()
        check_finite(found[target], f"{source.path}: {target}")
    return found


def _load_on_host(
    model: PreTrainedModel, source: ModelSource, plain: dict[str, str], converted: list[str]
) -> dict[str, Tensor]:
    files = source.checkpoint.files
    loaded = {name: files.mapped(key) for name, key in plain.items()}
    pieces = [
        piece for name, key in plain.items() for piece in _mapped_pieces(files, key, loaded[name])
    ]
    work: list[_Mapped | str] = [*converted, *pieces]  # what takes longest first

    def load(piece: _Mapped | str) -> None:
        if isinstance(piece, _Mapped):
            piece.file.announce(piece.begin, piece.numbers.nbytes)
            piece.file.check_finite(piece.begin, piece.numbers)
        else:
            loaded.update(_convert(model, source, piece))

    run_parallel(work, load, read_threads())
    return loaded


@dataclass(frozen=True, slots=True, eq=False)
class _Mapped:
    """A piece of a tensor in the page cache. begin: in the file. numbers: [elements]."""

    file: CheckpointFile
    begin: int
    numbers: Tensor


def _mapped_pieces(files: TensorFiles, key: str, tensor: Tensor) -> Iterator[_Mapped]:
    file, entry = files.place(key)
    flat, size = tensor.view(-1), tensor.element_size()
    for at in range(0, len(flat), PIECE // size):
        yield _Mapped(file, entry.begin + at * size, flat[at : at + PIECE // size])


@dataclass(frozen=True, slots=True, eq=False)
class _Bytes:
    """A piece of a tensor. begin: in the file. into: [bytes] uint8 on the device. dtype: of its
    numbers."""

    file: CheckpointFile
    begin: int
    into: Tensor
    dtype: torch.dtype

    def read(self, into: Tensor) -> None:
        self.file.read(self.begin, bytes_of(into), self.dtype)


def _load_on_device(
    model: PreTrainedModel,
    source: ModelSource,
    plain: dict[str, str],
    converted: list[str],
    stream: DeviceStream,
) -> dict[str, Tensor]:
    device = stream.device
    loaded: dict[str, Tensor] = {}
    pieces: list[_Bytes | str] = [*converted]  # what takes longest first
    for name, key in plain.items():
        file, entry = source.checkpoint.files.place(key)
        into = torch.empty(entry.shape, dtype=TORCH_DTYPES[entry.dtype], device=device)
        loaded[name] = into
        memory = into.view(-1).view(torch.uint8)
        pieces += [
            _Bytes(file, entry.begin + at, memory[at : at + PIECE], into.dtype)
            for at in range(0, entry.nbytes, PIECE)
        ]
    stream.synchronize()  # memory that torch hands out again may still be in use on this stream
    uploads = HostUploads(stream, PIECE)

    def load(piece: _Bytes | str) -> None:
        with uploads.acquire() as upload:
            if isinstance(piece, _Bytes):
                upload.send(piece.read, piece.into)
                return
            for target, tensor in _convert(model, source, piece).items():
                loaded[target] = torch.empty_like(tensor, device=device)
                upload.copy(tensor, loaded[target])

    try:
        run_parallel(pieces, load, read_threads())
    finally:
        uploads.synchronize()
    return loaded
