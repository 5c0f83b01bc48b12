"""How fast a checkpoint is read: `measure.py experts` and `measure.py dense`.

Each writes a random one of Qwen3-30B-A3B's shapes, but of fewer layers with fewer experts.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig

from flexpert.kernels.device_stream import stream_of
from flexpert.models import registrations
from flexpert.models.dense_weights import load_dense
from flexpert.models.model_runner import compute_buffers
from flexpert.models.source import ModelSource
from flexpert.parallel import run_parallel

HIDDEN, INTER, EXPERTS, HEADS, KV_HEADS, DIM, VOCAB = 2048, 768, 32, 32, 4, 128, 151_936
LAYER_BYTES = EXPERTS * 3 * HIDDEN * INTER * 2


def measure_experts(gib: float, threads: int, directory: str) -> None:
    """GB/s of reading every expert once into a few buffers that stay, as a pipeline has them.

    Medians of three.
    """
    with _checkpoint(gib, directory) as path:
        source = ModelSource.open(str(path))
        shape = source.expert_shape()
        keys = [
            (layer, expert)
            for layer in range(source.info.moe_layers)
            for expert in range(source.info.experts)
        ]
        total = len(keys) * shape.nbytes
        pinned = torch.cuda.is_available()
        buffers = [
            torch.zeros(shape.nbytes, dtype=torch.uint8, pin_memory=pinned) for _ in range(threads)
        ]

        def rate(read: Callable[[int, int, Tensor], None], count: int) -> float:
            free, local = iter(buffers), threading.local()

            def one(key: tuple[int, int]) -> None:
                if not hasattr(local, "buffer"):
                    local.buffer = next(free)
                read(*key, local.buffer)

            began = time.perf_counter()
            run_parallel(keys, one, count)
            return total / (time.perf_counter() - began) / 1e9

        def convert(layer: int, expert: int, into: Tensor) -> None:
            source._experts.read_converted(layer, expert, shape.over(into))

        print(
            f"{total / 1e9:.1f} GB of experts of {shape.nbytes / 1e6:.1f} MB into "
            f"{'pinned' if pinned else 'plain'} memory; GB/s with 1 and {threads} threads"
        )
        for name, cached, read in (
            ("converted, from the page cache", True, convert),
            ("by extents, from the page cache", True, source.read_expert),
            ("by extents, from the disk", False, source.read_expert),
        ):
            print(f"  {name:32}", end="", flush=True)
            for count in (1, threads):
                rates = []
                for _ in range(3):
                    if cached:
                        rate(source.read_expert, threads)
                    else:
                        _forget(path)
                    rates.append(rate(read, count))
                print(f" {statistics.median(rates):6.2f}", end="", flush=True)
            print()


def measure_dense(gib: float, directory: str) -> None:
    """Seconds until the dense weights of a GPU, or of the CPU in its place, are there."""
    with _checkpoint(gib, directory) as path:
        source = ModelSource.open(str(path))
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        stream = stream_of(device)
        print(f"{source.dense_nbytes() / 1e9:.1f} GB to {device}, from the page cache; s")
        for name, pieces in (("mapped, then moved", None), ("in pieces", stream)):
            times = []
            for _ in range(4):
                model = source.build(attention=registrations.IMPLEMENTATION)
                for module in source.experts_names:
                    model.get_submodule(module)._parameters.clear()
                began = time.perf_counter()
                with torch.no_grad():
                    compute_buffers(model)
                    load_dense(model, source, pieces)
                    model.to(device)
                stream.synchronize()
                times.append(time.perf_counter() - began)
                del model
                gc.collect()
            print(f"  {name:20} {times[0]:.2f} at first, then {min(times[1:]):.2f}")


@contextmanager
def _checkpoint(gib: float, directory: str) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=directory, prefix="flexpert-reads-") as made:
        path = Path(made)
        _write(path, max(1, round(gib * 2**30 / LAYER_BYTES)))
        yield path


def _write(path: Path, layers: int) -> None:
    """One file a layer, and one for the rest."""
    AutoConfig.for_model(
        "qwen3_moe",
        architectures=["Qwen3MoeForCausalLM"],
        dtype="bfloat16",
        num_hidden_layers=layers,
        num_experts=EXPERTS,
        num_experts_per_tok=8,
        hidden_size=HIDDEN,
        moe_intermediate_size=INTER,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=DIM,
        vocab_size=VOCAB,
    ).save_pretrained(path)
    files = {f"layer-{layer}.safetensors": _layer(layer) for layer in range(layers)}
    files["rest.safetensors"] = {
        "model.embed_tokens.weight": (VOCAB, HIDDEN),
        "lm_head.weight": (VOCAB, HIDDEN),
        "model.norm.weight": (HIDDEN,),
    }
    for name, shapes in files.items():
        save_file({key: _random(shape) for key, shape in shapes.items()}, path / name)
    index = {key: name for name, shapes in files.items() for key in shapes}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def _layer(layer: int) -> dict[str, tuple[int, ...]]:
    experts = {
        f"mlp.experts.{expert}.{part}_proj.weight": shape
        for expert in range(EXPERTS)
        for part, shape in (
            ("gate", (INTER, HIDDEN)),
            ("up", (INTER, HIDDEN)),
            ("down", (HIDDEN, INTER)),
        )
    }
    dense = {
        "mlp.gate.weight": (EXPERTS, HIDDEN),
        "self_attn.q_proj.weight": (HEADS * DIM, HIDDEN),
        "self_attn.k_proj.weight": (KV_HEADS * DIM, HIDDEN),
        "self_attn.v_proj.weight": (KV_HEADS * DIM, HIDDEN),
        "self_attn.o_proj.weight": (HIDDEN, HEADS * DIM),
        "self_attn.q_norm.weight": (DIM,),
        "self_attn.k_norm.weight": (DIM,),
        "input_layernorm.weight": (HIDDEN,),
        "post_attention_layernorm.weight": (HIDDEN,),
    }
    return {f"model.layers.{layer}.{key}": shape for key, shape in {**experts, **dense}.items()}


def _random(shape: tuple[int, ...]) -> Tensor:
    """bfloat16 of any bits, but no NaN."""
    return torch.randint(-(2**14), 2**14, shape, dtype=torch.int16).view(torch.bfloat16)


def _forget(path: Path) -> None:
    """Have the page cache drop the files, as far as nobody else uses them."""
    for file in path.glob("*.safetensors"):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
