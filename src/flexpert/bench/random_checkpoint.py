"""A checkpoint of any size with random weights, written as fast as the disk takes it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Final

import torch
from transformers import PreTrainedConfig

from flexpert.bench.model_shapes import qwen3_30b_a3b
from flexpert.models.tensor_header import PREFIX

_SHARD_BYTES: Final = 4 * 10**9
_NUMBERS: Final = 32 * 2**20  # different ones; tensors begin anywhere among them
_BYTES: Final = torch.bfloat16.itemsize

Shapes = dict[str, tuple[int, ...]]


def make_random_checkpoint(folder: Path, nbytes: int) -> None:
    """Qwen3-30B-A3B with as many layers as fit into the bytes, at least one, in bfloat16.

    Raises: OSError: it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ends = _size(dict(_outer(qwen3_30b_a3b(1))))
    layer = _size(dict(_layer(qwen3_30b_a3b(1), 0)))
    config = qwen3_30b_a3b(max(1, (nbytes - ends) // layer))
    config.dtype = torch.bfloat16
    config.save_pretrained(folder)
    shards: list[Shapes] = [{}]
    for name, shape in _tensors(config):
        if _size(shards[-1]) + _BYTES * prod(shape) > _SHARD_BYTES:
            shards.append({})
        shards[-1][name] = shape
    numbers = (torch.randn(_NUMBERS, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    weight_map = {}
    for number, shapes in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        _write(folder / file, shapes, numbers)
        weight_map.update(dict.fromkeys(shapes, file))
    index = {"metadata": {"total_size": sum(map(_size, shards))}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _size(shapes: Shapes) -> int:
    return _BYTES * sum(map(prod, shapes.values()))


def _tensors(config: PreTrainedConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    for layer in range(config.num_hidden_layers):
        yield from _layer(config, layer)
    yield from _outer(config)


def _outer(config: PreTrainedConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    table = config.vocab_size, config.hidden_size
    yield "lm_head.weight", table
    yield "model.embed_tokens.weight", table
    yield "model.norm.weight", (config.hidden_size,)


def _layer(config: PreTrainedConfig, layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """In the order in which safetensors writes them."""
    name, hidden, inter = f"model.layers.{layer}", config.hidden_size, config.moe_intermediate_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    yield f"{name}.input_layernorm.weight", (hidden,)
    for expert in range(config.num_experts):
        of = f"{name}.mlp.experts.{expert}"
        yield f"{of}.down_proj.weight", (hidden, inter)
        yield f"{of}.gate_proj.weight", (inter, hidden)
        yield f"{of}.up_proj.weight", (inter, hidden)
    yield f"{name}.mlp.gate.weight", (config.num_experts, hidden)
    yield f"{name}.post_attention_layernorm.weight", (hidden,)
    yield f"{name}.self_attn.k_norm.weight", (config.head_dim,)
    yield f"{name}.self_attn.k_proj.weight", (keys, hidden)
    yield f"{name}.self_attn.o_proj.weight", (hidden, queries)
    yield f"{name}.self_attn.q_norm.weight", (config.head_dim,)
    yield f"{name}.self_attn.q_proj.weight", (queries, hidden)
    yield f"{name}.self_attn.v_proj.weight", (keys, hidden)


def _write(file: Path, shapes: Shapes, numbers: torch.Tensor) -> None:
    """A safetensors file, its tensors one behind the other."""
    header, at = {}, 0
    for name, shape in shapes.items():
        end = at + _BYTES * prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % PREFIX)
    memory = numbers.view(torch.uint8).numpy().data
    with file.open("wb") as out:
        out.write(len(text).to_bytes(PREFIX, "little") + text)
        begin = 0
        for shape in shapes.values():
            left = _BYTES * prod(shape)
            while left:
                piece = memory[begin : begin + left]
                out.write(piece)
                left -= len(piece)
                begin = (begin + len(piece)) % len(memory)
