"""Which files of a directory hold the weights: those that transformers would read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from flexpert.errors import ModelError
from flexpert.models.checkpoint_file import CheckpointFile
from flexpert.reading import shown

INDEX: Final = "model.safetensors.index.json"
SINGLE: Final = "model.safetensors"
_INDEX_SUFFIX: Final = ".safetensors.index.json"
_MOST_INDEX_BYTES: Final = 256 * 2**20
_MOST_NAMED: Final = 4


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """names: of the files that are read, in order.

    index: tensor → the file that has it, by the index; empty: there is none. passed_over: files of
    weights that stand beside them and are not read, as transformers would not read them.
    """

    names: Sequence[str]
    index: Mapping[str, str] = field(default_factory=dict)
    passed_over: Sequence[str] = ()

    def check(self, files: Sequence[CheckpointFile]) -> None:
        """Whether the files, opened in the order of `names`, hold what the index says, once.

        Raises: ModelError: names a tensor that is missing, or that two files have.
        """
        holders: dict[str, CheckpointFile] = {}
        for file in files:
            for key in file.tensors:
                other = holders.setdefault(key, file)
                if other is not file:
                    raise ModelError(
                        f"{key} is in two files, {other.path} and {file.path.name}; which one "
                        "counts is not known: download the checkpoint again"
                    )
        missing = [key for key in self.index if key not in holders]
        if missing:
            promised = files[0].path.parent / self.index[missing[0]]
            raise ModelError(
                f"{promised} lacks {missing[0]}, which the index says is in it"
                + (f" ({len(missing)} such tensors)" if len(missing) > 1 else "")
                + "; the index and the files are of different checkpoints: download it again"
            )


def find_weight_files(path: Path, named: object = None) -> WeightFiles:
    """As `from_pretrained` chooses: what config.json names, else the single file, else the index.

    Args:
        path: the directory.
        named: `transformers_weights` of config.json.

    Raises: ModelError: there is none that can be read, or one of several is missing.
    """
    if named is not None:
        named = _checked_name(path / "config.json", named, (".safetensors", _INDEX_SUFFIX))
        if named.endswith(_INDEX_SUFFIX):
            return _indexed(path, named)
        if not (path / named).is_file():
            raise ModelError(f"{path} lacks {named}, which its config.json names as its weights")
        return WeightFiles([named], passed_over=_others(path, [named]))
    if (path / SINGLE).is_file():
        return WeightFiles([SINGLE], passed_over=_others(path, [SINGLE]))
    if (path / INDEX).is_file():
        return _indexed(path, INDEX)
    if any(path.glob("*.bin")) or any(path.glob("*.pth")):
        raise ModelError(
            f"{path} has only pickled weights, which flexpert does not read; convert them "
            "once: AutoModelForCausalLM.from_pretrained(…).save_pretrained(…)"
        )
    raise ModelError(f"{path} has neither {SINGLE} nor {INDEX}")


def _indexed(path: Path, name: str) -> WeightFiles:
    index = _weight_map(path / name)
    names = sorted(set(index.values()))
    missing = [name for name in names if not (path / name).is_file()]
    if missing:
        raise ModelError(
            f"{path} lacks {len(missing)} of its {len(names)} weight files: "
            f"{', '.join(missing[:_MOST_NAMED])}{' …' if len(missing) > _MOST_NAMED else ''}; "
            "download it again"
        )
    return WeightFiles(names, index, _others(path, names))


def _others(path: Path, read: Sequence[str]) -> list[str]:
    return sorted(
        file.name
        for file in path.glob("*.safetensors")
        if file.name not in read and file.is_file() and not file.name.startswith("adapter_")
    )


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor → weight file, all of the index's own directory.

    Raises: ModelError: it is no index.
    """
    try:
        if (size := index.stat().st_size) > _MOST_INDEX_BYTES:
            raise ValueError(f"it has {size} bytes")
        told = json.loads(index.read_text(encoding="utf-8"))
        found = dict(told["weight_map"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        why = shown(f"{type(error).__name__}: {error}")
        raise ModelError(f"{index} is not an index of safetensors files: {why}") from error
    return {key: _checked_name(index, name, (".safetensors",)) for key, name in found.items()}


def _checked_name(teller: Path, name: object, ends: tuple[str, ...]) -> str:
    """Raises: ModelError: it is none of a file of this kind in this directory."""
    # a file elsewhere is none of the checkpoint's, and may be one that only this user can read
    if not isinstance(name, str) or "/" in name or "\0" in name or not name.endswith(ends):
        raise ModelError(
            f"{teller} names {shown(name)!r} as a weight file; those are safetensors files "
            "in the same directory"
        )
    return name
