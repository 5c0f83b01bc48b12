"""Opens the tokenizer of a checkpoint, with transformers, which is imported for it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

from flexpert.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FILES: Final = ("tokenizer.json", "tekken.json", "*.tiktoken")


def open_tokenizer(path: Path, *, trusted: bool = False) -> PreTrainedTokenizerBase:
    """
    Args:
        path: of the checkpoint's directory.
        trusted: code that it brings may be run.

    Raises:
        ModelError: it has none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            path, trust_remote_code=trusted
        )
    except (OSError, ValueError, ImportError, KeyError, TypeError) as error:
        raise ModelError(f"{path} has no tokenizer that can be read: {error}") from error
    # without files transformers makes an empty one of some families, which reads every text as
    # no token at all
    files = {*_FILES, *type(tokenizer).vocab_files_names.values()}
    if not any(any(path.glob(name)) for name in files):
        raise ModelError(
            f"{path} has no tokenizer: none of {', '.join(sorted(files))} is there; put "
            "the model's there, or leave it out with --skip-tokenizer-init"
        )
    return tokenizer
