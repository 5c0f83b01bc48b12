"""Weights of a checkpoint read as ranks would load them, without a rank."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from flexpert.models import registrations
from flexpert.models.dense_weights import load_dense
from flexpert.models.source import ModelSource
from flexpert.parallel import read_threads, run_parallel


def read_dense(source: ModelSource) -> PreTrainedModel:
    """The model with its dense weights on the host, and without experts.

    Raises: ModelError: something cannot be read or is not finite.
    """
    model = source.build(attention=registrations.IMPLEMENTATION)
    for name in source.experts_names:
        model.get_submodule(name)._parameters.clear()
    with torch.no_grad():
        load_dense(model, source)
    return model


def read_everything(source: ModelSource, done: Callable[[int], None] = lambda nbytes: None) -> None:
    """Read dense weights and experts, and see that all are finite.

    done: told the bytes of each expert that has been read, in any thread.

    Raises: ModelError: something cannot be read or is not finite.
    """
    read_dense(source)
    source.try_extents()
    places = threading.local()

    def read(key: tuple[int, int]) -> None:
        nbytes = source.expert_shape(key[0]).nbytes
        memory: Tensor | None = getattr(places, "memory", None)
        if memory is None or len(memory) != nbytes:
            memory = places.memory = torch.empty(nbytes, dtype=torch.uint8, device="cpu")
        source.read_expert(*key, memory)
        done(nbytes)

    layers, experts = range(source.info.moe_layers), range(source.info.experts)
    run_parallel([(layer, e) for layer in layers for e in experts], read, read_threads())
