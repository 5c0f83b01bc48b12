"""The safetensors files of a checkpoint, read under the names and layouts of the model.

How names and layouts differ between disk and model is transformers' knowledge (its conversion
mapping); we ask it for the sources of each parameter and run its own operations on just the
tensors, or just the rows of them, that are needed.
"""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from flexpert.errors import ModelError
from flexpert.reading import shown

INDEX: Final = "model.safetensors.index.json"
SINGLE: Final = "model.safetensors"
_MOST_INDEX_BYTES: Final = 256 * 2**20
# of a tensor whose header does not say the truth
_UNREADABLE: Final = (SafetensorError, OSError, ValueError, TypeError, RuntimeError, MemoryError)


class Tensors(Protocol):
    """Tensors by the files' keys."""

    def shape(self, key: str) -> tuple[int, ...]: ...
    def read(self, key: str) -> Tensor: ...
    def read_row(self, key: str, row: int) -> Tensor: ...


class TensorFiles:
    """The safetensors files of a directory; opened and checked, nothing read. Thread-safe."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._file_of: dict[str, str] = {}
        self._open: dict[str, Any] = {}
        self._identity: dict[str, tuple[int, ...]] = {}
        for name in self._file_names():
            file = self._open[name] = self._open_file(name)
            for key in file.keys():  # noqa: SIM118 - not a mapping
                self._file_of[key] = name
        if not self._file_of:
            raise ModelError(f"{path} has safetensors files, but no tensor is in them")

    def _file_names(self) -> list[str]:
        index = self.path / INDEX
        if index.is_file():
            names = _names_in(index)
            missing = [name for name in names if not (self.path / name).is_file()]
            if missing:
                raise ModelError(
                    f"{self.path} lacks {len(missing)} of its {len(names)} weight files: "
                    f"{', '.join(missing[:4])}{' …' if len(missing) > 4 else ''}; download it again"
                )
            return names
        if (self.path / SINGLE).is_file():
            return [SINGLE]
        if any(self.path.glob("*.bin")) or any(self.path.glob("*.pth")):
            raise ModelError(
                f"{self.path} has only pickled weights, which flexpert does not read; convert them "
                "once: AutoModelForCausalLM.from_pretrained(…).save_pretrained(…)"
            )
        raise ModelError(f"{self.path} has neither {SINGLE} nor {INDEX}")

    def _open_file(self, name: str) -> Any:
        try:
            self._identity[name] = _identity(self.path / name)
            return safe_open(str(self.path / name), framework="pt", device="cpu")
        except (SafetensorError, OSError, ValueError, MemoryError, OverflowError) as error:
            raise ModelError(
                f"{self.path / name} is damaged or incomplete ({error}); download it again"
            ) from error

    def check_unchanged(self) -> None:
        """Refuse files that are not those opened at first: ranks must not mix two versions.

        Also what keeps a file that was truncated in place from ending the process (SIGBUS).

        Raises:
            ModelError: names the file.
        """
        for name, opened in self._identity.items():
            file = self.path / name
            try:
                found = _identity(file)
            except OSError as error:
                raise ModelError(f"cannot read {file}: {error.strerror}; put it back") from error
            if found != opened:
                raise ModelError(
                    f"{file} changed since the service opened it; put it back, or restart the "
                    "service to serve the new one"
                )

    def keys(self) -> Iterable[str]:
        return self._file_of.keys()

    def _refuse(self, key: str, error: Exception) -> ModelError:
        return ModelError(
            f"{self.path / self._file_of[key]} is damaged: {key} cannot be read ({error}); "
            "download it again"
        )

    def shape(self, key: str) -> tuple[int, ...]:
        with self._lock:
            return tuple(self._open[self._file_of[key]].get_slice(key).get_shape())

    def dtype(self, key: str) -> str:
        """As safetensors calls it."""
        with self._lock:
            return str(self._open[self._file_of[key]].get_slice(key).get_dtype())

    def read(self, key: str) -> Tensor:
        """The whole tensor."""
        try:
            with self._lock:
                tensor: Tensor = self._open[self._file_of[key]].get_tensor(key)
                return tensor
        except _UNREADABLE as error:
            raise self._refuse(key, error) from error

    def read_row(self, key: str, row: int) -> Tensor:
        """[1, …]: one row of a tensor; nothing else of it is read."""
        try:
            with self._lock:
                tensor: Tensor = self._open[self._file_of[key]].get_slice(key)[row : row + 1]
                return tensor
        except _UNREADABLE as error:
            raise self._refuse(key, error) from error


def _names_in(index: Path) -> list[str]:
    """The weight files that an index names, all of its own directory.

    Raises: ModelError: it is no index.
    """
    try:
        if (size := index.stat().st_size) > _MOST_INDEX_BYTES:
            raise ValueError(f"it has {size} bytes")
        told = json.loads(index.read_text(encoding="utf-8"))
        names = sorted({str(name) for name in told["weight_map"].values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        why = shown(f"{type(error).__name__}: {error}")
        raise ModelError(f"{index} is not an index of safetensors files: {why}") from error
    for name in names:
        # a file elsewhere is none of the checkpoint's, and may be one that only this user can read
        if "/" in name or "\0" in name or not name.endswith(".safetensors"):
            raise ModelError(
                f"{index} names {shown(name)!r} as a weight file; those are safetensors files "
                "in the same directory"
            )
    return names


def _identity(file: Path) -> tuple[int, ...]:
    """(device, inode, bytes, time of the last change): the same for an untouched file only."""
    stat = file.stat()
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


@dataclass(slots=True)
class Recipe:
    """How one parameter of the model (or several, converted together) comes from the files.

    converter: of transformers, or None if the tensor is taken as it is.
    sources: pattern of the converter → keys in the files, in the order of their indices.
    targets: names of the parameters it yields.
    """

    converter: WeightConverter | None
    sources: dict[str, list[str]] = field(default_factory=dict)
    targets: tuple[str, ...] = ()


class Checkpoint:
    """The tensors of a checkpoint, by the names of the model's parameters.

    Args:
        files: of the checkpoint.
        skeleton: the model on the meta device.
    """

    def __init__(self, files: TensorFiles, skeleton: PreTrainedModel) -> None:
        self.files = files
        self._skeleton = skeleton
        self.recipes: dict[str, Recipe] = {}
        conversions = get_model_conversion_mapping(skeleton)
        renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
        converters = [c for c in conversions if isinstance(c, WeightConverter)]
        by_pattern = {p: c for c in converters for p in c.source_patterns}
        known = skeleton.state_dict()
        prefix = skeleton.base_model_prefix
        for key in sorted(files.keys(), key=dot_natural_key):
            name, pattern = rename_source_key(key, renamings, converters, prefix, known)
            if name not in known and key in known:
                name, pattern = rename_source_key(key, [], [], prefix, known)
            if name not in known:
                continue  # e.g. layers for multi-token prediction, which no model class uses
            recipe = self.recipes.get(name)
            if recipe is None:
                converter = by_pattern[pattern] if pattern is not None else None
                targets = [name]
                if converter is not None:
                    first = converter.target_patterns[0]
                    targets = [name.replace(first, other) for other in converter.target_patterns]
                recipe = self.recipes[name] = Recipe(converter, targets=tuple(targets))
            recipe.sources.setdefault(pattern or "", []).append(key)

    @property
    def targets(self) -> set[str]:
        """Names of all parameters that the files hold."""
        return {target for recipe in self.recipes.values() for target in recipe.targets}

    def read(self, name: str, files: Tensors | None = None) -> dict[str, Tensor]:
        """The parameters that the recipe of `name` yields, by name.

        files: what to read instead of the files.
        """
        files = files or self.files
        recipe = self.recipes[name]
        if recipe.converter is None:
            return {name: files.read(recipe.sources[""][-1])}
        sources = {p: [files.read(k) for k in keys] for p, keys in recipe.sources.items()}
        return self._convert(recipe.converter, name, sources, self._skeleton)

    def read_expert(
        self, name: str, expert: int, experts: int, files: Tensors | None = None
    ) -> Tensor:
        """One expert's part of a parameter [experts, …]; reads only what it needs.

        files: what to read instead of the files.
        """
        files = files or self.files
        recipe = self.recipes.get(name)
        if recipe is None:
            raise ModelError(f"{self.files.path} lacks the experts' weights {name}")
        if recipe.converter is None:
            key = recipe.sources[""][-1]
            self._check_experts(name, files.shape(key)[0], experts)
            return files.read_row(key, expert)[0]
        sources: dict[str, list[Tensor]] = {}
        for pattern, keys in recipe.sources.items():
            if "*" in pattern:  # one tensor an expert
                self._check_experts(name, len(keys), experts)
                sources[pattern] = [files.read(keys[expert])]
            else:
                self._check_experts(name, files.shape(keys[0])[0], experts)
                if _moves_experts(recipe.converter, len(files.shape(keys[0]))):
                    return self.read(name, files)[name][expert].clone()
                sources[pattern] = [files.read_row(keys[0], expert)]
        one = _OneExpert(self._skeleton)
        return self._convert(recipe.converter, name, sources, one)[name][0]

    def joins_only(self, name: str) -> bool:
        """Whether a parameter is its tensors put together, and nothing is done to their elements.

        Then whatever goes with them by blocks of rows and columns may be put together likewise.
        """
        recipe = self.recipes[name]
        operations = [] if recipe.converter is None else recipe.converter.operations
        return all(isinstance(one, MergeModulelist | Concatenate) for one in operations)

    def _check_experts(self, name: str, found: int, experts: int) -> None:
        if found != experts:
            raise ModelError(
                f"{self.files.path} has {found} experts for {name}, its config.json says {experts}"
            )

    def _convert(
        self,
        converter: WeightConverter,
        name: str,
        sources: dict[str, list[Tensor]],
        model: PreTrainedModel | _OneExpert,
    ) -> dict[str, Tensor]:
        converter = copy.deepcopy(converter)  # collects tensors in itself
        for pattern, tensors in sources.items():
            for tensor in tensors:
                converter.add_tensor(name, name, pattern, tensor)
        try:
            converted = converter.convert(name, model=model, config=self._skeleton.config)
        except Exception as error:  # whatever the library's operations raise on odd shapes
            raise ModelError(f"{self.files.path}: cannot convert {name}: {error}") from error
        return {key: v[0] if isinstance(v, list) else v for key, v in converted.items()}


class _OneExpert:
    """The model as an operation sees it that works on a single expert."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model

    def get_parameter(self, name: str) -> Tensor:
        whole = self._model.get_parameter(name)
        return torch.empty((1, *whole.shape[1:]), dtype=whole.dtype, device="meta")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def _moves_experts(converter: WeightConverter, ndim: int) -> bool:
    """Whether an operation touches dimension 0, so that rows cannot be converted one by one."""
    for operation in converter.operations:
        for attribute in ("dim", "dim0", "dim1", "stack_dim", "concat_dim"):
            dim = getattr(operation, attribute, None)
            if dim is not None and dim % ndim == 0:
                return True
    return False
