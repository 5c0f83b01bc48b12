"""Whether two hosts have the same model: said in words, and by samples of its weights."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the head and its tests need not import transformers for this
    from flexpert.models.checkpoint import TensorFiles
    from flexpert.models.source import ModelSource

MOST_SAMPLES = 512
"""Tensors of which some bytes are read: cheap for a checkpoint of any size, on any disk."""
_SAMPLE_BYTES = 256  # of each, from its middle
_MOST_WORDS = 60
_MOST_SAID = 3  # differences
_NOT_COMPARED = ("name",)  # a folder may be called as it likes


def describe_model(source: ModelSource) -> dict[str, str]:
    """Equal for two checkpoints that make the same model, whatever their folders are called.

    Of the weights up to `MOST_SAMPLES` tensors are looked at, so that a checkpoint that was trained
    further is another one, while a change of a single tensor may stay unseen.

    Raises: ModelError: the files cannot be read.
    """
    info = source.info
    described = {
        field.name.replace("_", " "): str(getattr(info, field.name))
        for field in fields(info)
        if field.name not in _NOT_COMPARED
    }
    described["attention"] = _digest([repr(info.attention)])
    described["shapes of the experts"] = _digest([repr(source.expert_shapes())])
    described["parameters"] = _digest(sorted(source.held))
    described["weights"] = _digest(_samples(source.checkpoint.files))
    return described


def differences(there: Mapping[str, str], here: Mapping[str, str]) -> str:
    """In words, of two descriptions; "": there are none. there: what another host says."""
    different = [
        f"{name[:_MOST_WORDS]!a} is {_short(there.get(name))} there, {_short(here.get(name))} here"
        for name in sorted({*there, *here})
        if there.get(name) != here.get(name)
    ]
    more = len(different) - _MOST_SAID
    return "; ".join(different[:_MOST_SAID]) + (f"; and {more} more" if more > 0 else "")


def _short(value: str | None) -> str:
    return "missing" if value is None else f"{value[:_MOST_WORDS]!a}"


def _digest(parts: Iterable[str | bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()[:16]


def _samples(files: TensorFiles) -> Iterable[bytes]:
    """Of tensors that lie evenly among all names: a few bytes from the middle of each."""
    keys = sorted(files.keys())
    step = max(1, -(-len(keys) // MOST_SAMPLES))
    for key in keys[::step]:
        file, entry = files.place(key)
        sample = bytearray(min(_SAMPLE_BYTES, entry.nbytes))
        file.read(entry.begin + (entry.nbytes - len(sample)) // 2, memoryview(sample))
        yield f"{key} {entry.dtype} {entry.shape}".encode()
        yield bytes(sample)
