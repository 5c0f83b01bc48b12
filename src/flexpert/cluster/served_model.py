"""What a head knows of its model: told by a process that has opened it."""

from __future__ import annotations

from typing import Any

import msgspec

from flexpert.engine.rank_memory import RankMemoryPlan


class ServedModel(msgspec.Struct, frozen=True, kw_only=True):
    """A checkpoint under the settings of a service.

    path, trusted: of its directory, and whether code that it brings may be run.
    vocab, max_model_len: token ids, and tokens of prompt and answer together.
    eos_token_ids: all that end an answer, those of tokenizer and chat template among them.
    experts: of a layer. largest_expert, all_experts: bytes of one, and of those of all layers.
    kv_blocks: of a rank.
    host, device: what ranks need; device: None where they compute on CPUs.
    gpus: that CUDA sees on the machine where it was opened; None: ranks compute on CPUs, perhaps in
    the place of GPUs.
    sampling_defaults: that its authors recommend, by our names.
    description: see `describe_model`; empty if it was not asked for.
    """

    path: str
    trusted: bool
    name: str
    vocab: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    experts: int
    moe_layers: int
    largest_expert: int
    all_experts: int
    kv_blocks: int
    host: RankMemoryPlan
    device: RankMemoryPlan | None
    gpus: int | None
    sampling_defaults: dict[str, Any]
    description: dict[str, str]
