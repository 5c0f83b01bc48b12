"""The safetensors files of a checkpoint, read under the names and layouts of the model.

How names and layouts differ between disk and model is transformers' knowledge (its conversion
mapping); we ask it for the sources of each parameter and run its own operations on just the
tensors, or just the rows of them, that are needed.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
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
from flexpert.models.checkpoint_file import CheckpointFile
from flexpert.models.draft_layer import DraftNames
from flexpert.models.tensor_header import TORCH_DTYPES, TensorEntry
from flexpert.models.weight_files import find_weight_files


class Tensors(Protocol):
    """Tensors by the files' keys."""

    def shape(self, key: str) -> tuple[int, ...]: ...
    def read(self, key: str) -> Tensor: ...
    def read_row(self, key: str, row: int) -> Tensor: ...


class TensorFiles:
    """The safetensors files of a directory; their headers checked, nothing else read. Thread-safe.

    Tensors are read into memory of their own. A file that was truncated meanwhile gives a
    ModelError, never other bytes.

    Attributes:
        names: of the files that are read.
        passed_over: names of further files with weights in the directory, which are not read.
    """

    def __init__(self, path: Path, named: object = None) -> None:
        """named: the file or index that config.json says has the weights.

        Raises: ModelError: files are missing, damaged, or not those of their index.
        """
        self.path = path
        found = find_weight_files(path, named)
        self._files = [CheckpointFile(path / name) for name in found.names]
        found.check(self._files)
        self.names = tuple(found.names)
        self.passed_over = tuple(found.passed_over)
        self._place: dict[str, tuple[CheckpointFile, TensorEntry]] = {
            key: (file, entry) for file in self._files for key, entry in file.tensors.items()
        }
        if not self._place:
            raise ModelError(f"{path} has safetensors files, but no tensor is in them")

    def hold(self) -> None:
        """Open all files for their bytes, see `CheckpointFile.hold`. Raises: ModelError"""
        for file in self._files:
            file.hold()

    def check_unchanged(self) -> None:
        """Refuse files that are not those opened at first: ranks must not mix two versions.

        Raises:
            ModelError: names the file.
        """
        for file in self._files:
            file.check_unchanged()

    @property
    def nbytes(self) -> int:
        """Of all tensors in the files."""
        return self.dtypes.total()

    @property
    def format(self) -> str:
        """How weights are stored, for people."""
        return "unquantized"

    @property
    def dtypes(self) -> Counter[str]:
        """Bytes of all tensors by dtype, as safetensors calls it."""
        found: Counter[str] = Counter()
        for _, entry in self._place.values():
            found[entry.dtype] += entry.nbytes
        return found

    @property
    def main_dtype(self) -> torch.dtype:
        """The one of most of the bytes, of those that a model computes in; float32: there is none.

        transformers takes that of the first tensor, which may be a router's float32 bias.
        """
        found = self.dtypes
        names = [name for name in ("BF16", "F16", "F32") if found[name]]
        return TORCH_DTYPES[max(names, key=found.__getitem__)] if names else torch.float32

    def parts(self, key: str) -> Sequence[str]:
        """The keys in the files that a tensor is read from: its own, and those of its scales."""
        return (key,)

    def nbytes_of(self, keys: Iterable[str]) -> int:
        """What tensors take in the files, with all parts."""
        return sum(self._place[part][1].nbytes for key in keys for part in self.parts(key))

    @property
    def unexplained(self) -> str:
        """What is wrong with weights that are not in a dtype of weights: the end of a sentence."""
        beside = self.path / "hf_quant_config.json"
        told = f", and {beside.name}, which does, is not read" if beside.is_file() else ""
        return f"and config.json has no quantization_config that says how to read them{told}"

    def is_quantized(self, key: str) -> bool:
        """Whether a tensor is read by its other parts, whatever its dtype."""
        return False

    def keys(self) -> Iterable[str]:
        return self._place.keys()

    def place(self, key: str) -> tuple[CheckpointFile, TensorEntry]:
        """Where the bytes of a tensor are."""
        return self._place[key]

    def is_plain(self, key: str) -> bool:
        """Whether `read` gives just the bytes of the file, in its dtype."""
        return self._place[key][1].dtype in TORCH_DTYPES

    def shape(self, key: str) -> tuple[int, ...]:
        return self._place[key][1].shape

    def dtype(self, key: str) -> str:
        """As safetensors calls it."""
        return self._place[key][1].dtype

    def read(self, key: str) -> Tensor:
        """The whole tensor."""
        _, entry = self._place[key]
        return self._read(key, entry.shape, entry.begin, entry.nbytes)

    def read_row(self, key: str, row: int) -> Tensor:
        """[1, …]: one row of a tensor; nothing else of it is read."""
        _, entry = self._place[key]
        if not entry.shape or not 0 <= row < entry.shape[0]:
            raise self._refuse(key, f"it has the shape {entry.shape}, and so no row {row}")
        size = entry.nbytes // entry.shape[0]
        return self._read(key, (1, *entry.shape[1:]), entry.begin + row * size, size)

    def mapped(self, key: str) -> Tensor:
        """The whole tensor where the page cache has it, shared by all who map it.

        A file that is truncated later ends the process (SIGBUS).
        """
        file, entry = self._place[key]
        dtype = self._torch_dtype(key)
        if entry.begin % dtype.itemsize or not entry.nbytes:
            return self.read(key)
        return file.mapped(entry.begin, entry.nbytes).view(dtype).view(entry.shape)

    def _read(self, key: str, shape: tuple[int, ...], begin: int, nbytes: int) -> Tensor:
        dtype = self._torch_dtype(key)
        try:
            tensor = torch.empty(shape, dtype=dtype)
        except (RuntimeError, MemoryError) as error:
            raise self._refuse(key, f"there is no memory for its {nbytes} bytes") from error
        self._place[key][0].read(begin, bytes_of(tensor))
        return tensor

    def _torch_dtype(self, key: str) -> torch.dtype:
        name = self._place[key][1].dtype
        if name not in TORCH_DTYPES:
            raise self._refuse(key, f"flexpert does not read the dtype {name}")
        return TORCH_DTYPES[name]

    def _refuse(self, key: str, why: str) -> ModelError:
        return ModelError(f"{self._place[key][0].path}: {key} cannot be read: {why}")


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the host, to be read into."""
    return tensor.view(-1).view(torch.uint8).numpy().data


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


class Piece(NamedTuple):
    """A tensor of the files, or one row of it. row: along dimension 0; None: the whole."""

    key: str
    row: int | None


class Checkpoint:
    """The tensors of a checkpoint, by the names of the model's parameters.

    Args:
        files: of the checkpoint.
        skeleton: the model on the meta device, whole.
        left_out: names of its modules whose tensors are not wanted.
        drafts: what the files call the tensors of its draft layer; None: it has none.

    Attributes:
        recipes: by the name of the first parameter that each yields.
        unused: keys of tensors that the model has no place for → what transformers calls them.
        left_out: keys of the tensors of modules that are left out, by module.
    """

    def __init__(
        self,
        files: TensorFiles,
        skeleton: PreTrainedModel,
        left_out: Collection[str] = (),
        drafts: DraftNames | None = None,
    ) -> None:
        self.files = files
        self._skeleton = skeleton
        self.left_out: dict[str, list[str]] = {part: [] for part in left_out}
        self.recipes: dict[str, Recipe] = {}
        self.unused: dict[str, str] = {}
        conversions = get_model_conversion_mapping(skeleton)
        renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
        converters = [c for c in conversions if isinstance(c, WeightConverter)]
        by_pattern = {p: c for c in converters for p in c.source_patterns}
        known = skeleton.state_dict()
        prefix = skeleton.base_model_prefix
        for key in sorted(files.keys(), key=dot_natural_key):
            asked = key if drafts is None else drafts.ours(key)
            name, pattern = rename_source_key(asked, renamings, converters, prefix, known)
            if name not in known and asked in known:
                name, pattern = rename_source_key(asked, [], [], prefix, known)
            if name not in known:
                self.unused[key] = name
                continue
            part = self._left_out_part(name)
            if part is not None:
                self.left_out[part].append(key)
                continue
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

    def leaves_out(self, name: str) -> bool:
        """Whether a parameter is one of a module that is left out."""
        return self._left_out_part(name) is not None

    def _left_out_part(self, name: str) -> str | None:
        return next((part for part in self.left_out if name.startswith(f"{part}.")), None)

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
            if "*" in pattern:  # one tensor an expert, of all targets one after the other
                parts = len(recipe.targets)
                self._check_experts(name, len(keys) // parts, experts)
                key = keys[recipe.targets.index(name) * len(keys) // parts + expert]
                sources[pattern] = [files.read(key)] * parts
            else:
                self._check_experts(name, files.shape(keys[0])[0], experts)
                if _moves_experts(recipe.converter, len(files.shape(keys[0]))):
                    return self.read(name, files)[name][expert].clone()
                sources[pattern] = [files.read_row(keys[0], expert)]
        one = _OneExpert(self._skeleton)
        return self._convert(recipe.converter, name, sources, one)[name][0]

    def expert_pieces(self, name: str, expert: int, experts: int) -> list[Piece] | None:
        """What one expert's part of a parameter [experts, …] is put together of, row after row.

        None: it is more than that, or not what the configuration says; `read_expert` tells.
        """
        recipe = self.recipes.get(name)
        if recipe is None or not _joins_rows(recipe):
            return None
        patterns = [""] if recipe.converter is None else recipe.converter.source_patterns
        pieces = []
        for pattern in patterns:
            keys = recipe.sources.get(pattern, [])
            if "*" in pattern:
                if len(keys) != experts:
                    return None
                pieces.append(Piece(keys[expert], None))
            elif keys:
                pieces.append(Piece(keys[-1 if recipe.converter is None else 0], expert))
        return pieces

    def joins_only(self, name: str) -> bool:
        """Whether a parameter is its tensors put together, and nothing is done to their elements.

        Then whatever goes with them by blocks of rows and columns may be put together likewise.
        """
        recipe = self.recipes[name]
        operations = [] if recipe.converter is None else recipe.converter.operations
        return all(isinstance(one, MergeModulelist | Concatenate) for one in operations)

    def _check_experts(self, name: str, found: int, experts: int) -> None:
        # some that need no weights may have them all the same, behind the others
        if found not in (experts, self._skeleton.get_parameter(name).shape[0]):
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


def _joins_rows(recipe: Recipe) -> bool:
    """Whether an expert is its tensors, or its rows of them, one behind the other."""
    if recipe.converter is None:
        return True
    operations = recipe.converter.operations
    return len(recipe.targets) == 1 and all(
        (type(one) is MergeModulelist and one.dim == 0)
        or (type(one) is Concatenate and one.dim == 1)  # dimension 0 is the experts'
        for one in operations
    )
