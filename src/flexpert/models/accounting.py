"""Every tensor of a checkpoint is accounted for by the headers of its files, before any is read.

It is used, known to be unneeded, or the checkpoint is refused and the tensor named. What is used
has the dtype, the shape and the number of experts that the model needs.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor
from transformers import PreTrainedModel

from flexpert.errors import ModelError, UnsupportedModel
from flexpert.models.checkpoint import Checkpoint, Recipe, TensorFiles
from flexpert.models.unneeded import UnneededTensors

FLOATS: Final = frozenset({"BF16", "F16", "F32", "F64"})
"""safetensors' names of the dtypes whose numbers are weights as they stand."""

_QUANTIZED: Final = re.compile(
    r"(_scale(_inv|_2)?|_scales|\.scales|_global_scale|_zero_point|qzeros|qweight|g_idx|_packed"
    r"|weight_shape|_blocks|absmax|quant_map|quant_state\S*|\.SCB|weight_format)$"
)
"""Ends of names that tools for quantization give to what stands beside, or in place of, weights."""

_MOST_NAMED: Final = 3
_DIGITS: Final = re.compile(r"\d+")


@dataclass(frozen=True, slots=True)
class Skipped:
    """Tensors of one kind that are not read. reason: why nobody misses them."""

    kind: str
    reason: str
    keys: tuple[str, ...]
    nbytes: int


@dataclass(frozen=True, slots=True)
class Accounting:
    """What becomes of a checkpoint's tensors. used: how many; of them, and of their bytes."""

    used: int
    used_nbytes: int
    skipped: tuple[Skipped, ...]


def account(
    checkpoint: Checkpoint, skeleton: PreTrainedModel, expert_parameters: Collection[str]
) -> Accounting:
    """Where each tensor goes.

    Args:
        skeleton: the model on the meta device.
        expert_parameters: those of shape [experts, …].

    Raises:
        UnsupportedModel: weights are stored in a way that flexpert does not read.
        ModelError: tensors are missing, left over, or of another shape than config.json says.
    """
    files = checkpoint.files
    skipped, left_over = _sort_unused(checkpoint, skeleton)
    _check_explained(files, left_over)
    _check_dtypes(checkpoint, skeleton)
    _check_names(checkpoint, skeleton, left_over)
    for name, recipe in checkpoint.recipes.items():
        _check_sources(files.path, name, recipe)
        _check_shapes(checkpoint, skeleton, name, is_experts=name in expert_parameters)
    used = [key for recipe in checkpoint.recipes.values() for key in _keys(recipe)]
    return Accounting(sum(len(files.parts(key)) for key in used), files.nbytes_of(used), skipped)


def _keys(recipe: Recipe) -> Iterator[str]:
    return (key for keys in recipe.sources.values() for key in keys)


def _sort_unused(
    checkpoint: Checkpoint, skeleton: PreTrainedModel
) -> tuple[tuple[Skipped, ...], list[str]]:
    """(those that are not needed by kind, those that would be missed)"""
    files = checkpoint.files
    unneeded = UnneededTensors(skeleton, files.keys())
    kinds: dict[tuple[str, str], list[str]] = {}
    left_over = []
    for key, name in checkpoint.unused.items():
        kind = unneeded.kind(key, name)
        if kind is None:
            left_over.append(key)
        else:
            kinds.setdefault(kind, []).append(key)
    for part, keys in checkpoint.left_out.items():
        if keys:
            kinds[part, "no token of text passes through it"] = keys
    skipped = tuple(
        Skipped(kind, reason, tuple(keys), files.nbytes_of(keys))
        for (kind, reason), keys in kinds.items()
    )
    return skipped, left_over


def _check_explained(files: TensorFiles, left_over: Sequence[str]) -> None:
    """Raises: UnsupportedModel: tensors say that weights are quantized, and nothing says how."""
    scales = [key for key in left_over if _QUANTIZED.search(key)]
    if scales:
        raise UnsupportedModel(
            f"{files.path} has {_named(scales)}, of weights that are quantized, "
            f"{files.unexplained}; without them the weights would be other numbers"
        )


def _check_dtypes(checkpoint: Checkpoint, skeleton: PreTrainedModel) -> None:
    """Raises: UnsupportedModel: numbers that are no weights as they stand."""
    files = checkpoint.files
    for name, recipe in checkpoint.recipes.items():
        floats = skeleton.get_parameter_or_buffer(name).is_floating_point()
        for key in _keys(recipe):
            dtype = files.dtype(key)
            if (dtype in FLOATS) == floats or files.is_quantized(key):
                continue
            if not floats:
                raise ModelError(
                    f"{files.path}: {key} is stored as {dtype}; it holds whole numbers"
                )
            raise UnsupportedModel(f"{files.path}: {key} is stored as {dtype}, {files.unexplained}")


def _check_names(
    checkpoint: Checkpoint, skeleton: PreTrainedModel, left_over: Sequence[str]
) -> None:
    """Raises: ModelError: parameters without a tensor, tensors without a parameter."""
    missing = _missing(checkpoint.targets, skeleton)
    if not missing and not left_over:
        return
    family = type(skeleton).__name__
    said = []
    if missing:
        said.append(f"lacks {len(missing)} tensors of {family}: {_named(missing)}")
    if left_over:
        said.append(
            f"has {len(left_over)} tensors that {family} has no place for by its config.json: "
            f"{_named(left_over)}"
        )
    raise ModelError(f"{checkpoint.files.path} {'; and '.join(said)}")


def _missing(held: Collection[str], skeleton: PreTrainedModel) -> list[str]:
    tied = skeleton.all_tied_weights_keys
    ignored = [re.compile(p) for p in skeleton._keys_to_ignore_on_load_missing or ()]
    missing = []
    for name in skeleton.state_dict():
        if name in held or any(p.search(name) for p in ignored):
            continue
        partners = {tied.get(name), *(target for target, source in tied.items() if source == name)}
        if not partners & set(held):
            missing.append(name)
    return missing


def _check_sources(path: Path, name: str, recipe: Recipe) -> None:
    """Raises: ModelError: a parameter is in the files twice, or a part of it is not."""
    if recipe.converter is None:
        keys = list(_keys(recipe))
        if len(keys) > 1:
            raise ModelError(
                f"{path} has {name} twice, as {keys[0]} and {keys[1]}; which one counts is not "
                "known"
            )
        return
    desired = recipe.converter.source_patterns
    if odd := [pattern for pattern in recipe.sources if pattern not in desired]:
        both = (recipe.sources[odd[0]][0], next(_keys(recipe)))
        raise ModelError(f"{path} has {name} in two layouts: {both[0]} beside {both[1]}")


def _check_shapes(
    checkpoint: Checkpoint, skeleton: PreTrainedModel, name: str, *, is_experts: bool
) -> None:
    """Raises: ModelError: a tensor has another shape than config.json says, or an expert lacks."""
    files, recipe = checkpoint.files, checkpoint.recipes[name]
    expected = tuple(skeleton.get_parameter_or_buffer(name).shape)
    if recipe.converter is None:
        key = recipe.sources[""][-1]
        if files.shape(key) != expected:
            raise ModelError(
                f"{files.path}: {key} has shape {files.shape(key)}, config.json says {expected}"
            )
        return
    count = expected[0] if is_experts else None
    if count is not None:
        parts = len(recipe.targets)
        # some that need no weights may have them all the same, behind the others
        needed = getattr(skeleton.get_submodule(name.rpartition(".")[0]), "num_experts", count)
        if any(len(keys) == needed * parts for keys in recipe.sources.values()):
            count = int(needed)
        for pattern, keys in recipe.sources.items():
            if "*" in pattern:
                complete = len(keys) == count * parts  # those of the first parameter come first
                _check_experts(files, name, keys[:count] if complete else keys, count)
    try:
        made = _made(checkpoint, name, count)
    except ModelError as error:
        made = {name: f"no shape ({error})"}
    for target, shape in made.items():
        if checkpoint.leaves_out(target):
            continue
        whole = tuple(skeleton.get_parameter_or_buffer(target).shape)
        desired = whole[1:] if is_experts else whole
        if shape != desired:
            raise ModelError(
                f"{files.path}: {target} has shape {shape}, config.json says {desired}"
                f"{' of each expert' if is_experts else ''}; it is made of {_parts(files, recipe)}"
            )


def _made(
    checkpoint: Checkpoint, name: str, experts: int | None
) -> dict[str, tuple[int, ...] | str]:
    """The shapes of what a recipe yields; with `experts`, of one expert's part.

    Raises: ModelError: its tensors do not fit each other.
    """
    shapes = _Shapes(checkpoint.files)
    if experts is not None:
        return {name: tuple(checkpoint.read_expert(name, 0, experts, shapes).shape)}
    return {target: tuple(t.shape) for target, t in checkpoint.read(name, shapes).items()}


def _check_experts(files: TensorFiles, name: str, keys: Sequence[str], experts: int) -> None:
    """keys: one tensor an expert. Raises: ModelError"""
    numbers = _expert_numbers(keys)
    if len(keys) != experts or numbers not in (None, list(range(experts))):
        found = set(numbers or ())
        lacking = [str(number) for number in range(experts) if number not in found]
        raise ModelError(
            f"{files.path} has {len(keys)} experts for {name}, its config.json says {experts}"
            + (f"; such as {keys[0]}, without number {', '.join(lacking[:5])}" if lacking else "")
        )
    usual = Counter(files.shape(key) for key in keys).most_common(1)[0][0]
    for key in keys:
        if files.shape(key) != usual:
            raise ModelError(
                f"{files.path}: {key} has shape {files.shape(key)}, those of other experts {usual}"
            )


def _expert_numbers(keys: Sequence[str]) -> list[int] | None:
    """The number in which names differ; None: they differ in more, or there is one name."""
    numbers = [_DIGITS.findall(key) for key in keys]
    if len(keys) < 2 or len({len(each) for each in numbers}) > 1:
        return None
    differing = [
        place for place in zip(*numbers, strict=True) if any(one != place[0] for one in place)
    ]
    return [int(number) for number in differing[0]] if len(differing) == 1 else None


def _parts(files: TensorFiles, recipe: Recipe) -> str:
    """What a parameter is made of, for people."""
    patterns = recipe.converter.source_patterns if recipe.converter else []
    return ", ".join(
        f"{keys[0]} {files.shape(keys[0])}"
        if (keys := recipe.sources.get(pattern))
        else f"nothing like {pattern}"
        for pattern in patterns
    )


class _Shapes:
    """Tensors of the files' shapes that hold nothing."""

    def __init__(self, files: TensorFiles) -> None:
        self._files = files

    def shape(self, key: str) -> tuple[int, ...]:
        return self._files.shape(key)

    def read(self, key: str) -> Tensor:
        return torch.empty(self.shape(key), device="meta")

    def read_row(self, key: str, row: int) -> Tensor:
        return torch.empty((1, *self.shape(key)[1:]), device="meta")


def _named(names: Sequence[str]) -> str:
    return f"{', '.join(names[:_MOST_NAMED])}{' …' if len(names) > _MOST_NAMED else ''}"
