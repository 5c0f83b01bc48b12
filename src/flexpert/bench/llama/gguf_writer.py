"""Writes the GGUF file of a checkpoint, in a process of its own.

    python -m flexpert.bench.llama.gguf_writer MODEL FILE

The client of a measurement shall not be left with what torch and transformers take.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flexpert.bench.llama.gguf_layout import (
    ARCHITECTURE,
    GgufTensor,
    check_fits,
    settings,
    tensors,
    vocabulary,
)
from flexpert.errors import FlexpertError, ModelError
from flexpert.models.checkpoint import TensorFiles
from flexpert.models.remote_code import read_config
from flexpert.models.source import locate
from flexpert.models.tokenizer_files import open_tokenizer

_MOSTLY_BF16 = 32  # LlamaFileType of gguf
_PRE_TOKENIZER = "qwen2"  # how llama.cpp splits text before merges; prompts come as token ids


def main() -> None:
    model, file = sys.argv[1:]
    try:
        write_gguf(locate(model), Path(file))
    except FlexpertError as error:
        sys.exit(str(error))


def write_gguf(path: Path, file: Path) -> None:
    """Write a checkpoint's directory as one GGUF file in bfloat16.

    Raises:
        ModelError: it is none of Qwen3-MoE in bfloat16, or lacks tensors.
        OSError: the file cannot be written.
    """
    from gguf import GGUFWriter

    config = read_config(path, trusted=False)
    check_fits(config)
    files = TensorFiles(path)
    found = list(tensors(config))
    _check_tensors(files, found)
    writer = GGUFWriter(file, ARCHITECTURE)
    writer.add_name(path.name)
    writer.add_file_type(_MOSTLY_BF16)
    for name, value in settings(config).items():
        add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        add(f"{ARCHITECTURE}.{name}", value)
    _add_vocabulary(writer, path, config)
    for tensor in found:
        _announce(writer, tensor, files)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in found:
        writer.write_tensor_data(_bytes(_values(files, tensor)))
    writer.close()


def _check_tensors(files: TensorFiles, found: list[GgufTensor]) -> None:
    """Raises: ModelError: tensors are missing, or are not in bfloat16."""
    there = set(files.keys())
    keys = [key for tensor in found for key in tensor.sources]
    missing = [key for key in keys if key not in there]
    if missing:
        raise ModelError(
            f"{files.path} has no tensor {missing[0]} (and {len(missing) - 1} more are missing); "
            "only checkpoints with one tensor for each expert are written as GGUF"
        )
    other = {files.place(key)[1].dtype for key in keys} - {"BF16"}
    if other:
        raise ModelError(
            f"{files.path} has weights in {', '.join(sorted(other))}; the comparison with "
            "llama.cpp is one in bfloat16, so convert the checkpoint first"
        )


def _add_vocabulary(writer: Any, path: Path, config: Any) -> None:
    tokenizer: Any = open_tokenizer(path)
    file = path / "tokenizer.json"
    merges = []
    if file.is_file():
        merges = json.loads(file.read_text(encoding="utf-8"))["model"].get("merges", [])
    found = vocabulary(tokenizer.get_vocab(), tokenizer.all_special_ids, merges, config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_PRE_TOKENIZER)
    writer.add_token_list(found.tokens)
    writer.add_token_types(found.kinds)
    writer.add_token_merges(found.merges)
    writer.add_add_bos_token(False)
    if tokenizer.eos_token_id is not None:
        writer.add_eos_token_id(tokenizer.eos_token_id)


def _announce(writer: Any, tensor: GgufTensor, files: TensorFiles) -> None:
    """Name and shape, whose bytes are written later."""
    import numpy
    from gguf import GGMLQuantizationType

    shape = list(files.shape(tensor.sources[0]))
    if len(tensor.sources) > 1:
        shape.insert(0, len(tensor.sources))
    kind = GGMLQuantizationType.F32 if tensor.float32 else GGMLQuantizationType.BF16
    dtype = numpy.dtype(numpy.float32 if tensor.float32 else numpy.uint16)
    count = int(numpy.prod(shape))
    writer.add_tensor_info(tensor.name, shape, dtype, count * dtype.itemsize, raw_dtype=kind)


def _values(files: TensorFiles, tensor: GgufTensor) -> Tensor:
    """In the shape and dtype of the file."""
    parts = [files.read(key) for key in tensor.sources]
    values = torch.stack(parts) if len(parts) > 1 else parts[0]
    return values.float() if tensor.float32 else values


def _bytes(values: Tensor) -> Any:
    """A numpy array of the same bytes; numpy has no bfloat16."""
    return (values if values.dtype == torch.float32 else values.view(torch.uint16)).numpy()


if __name__ == "__main__":
    main()
