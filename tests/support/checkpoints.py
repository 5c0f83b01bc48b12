"""Small random checkpoints of real families, transformers' own answers, and a lone rank to compare.

`make_checkpoint(family, dir, dtype, seed)` writes one; `reference_logits` and `greedy` say what
transformers computes with it; `LocalMoE` and `Sequences` drive a ModelRunner without engine or
exchange.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from flexpert.kernels.cpu.expert_products import LayerExperts
from flexpert.kernels.kernel_set import Kernels
from flexpert.models.batch import ForwardBatch
from flexpert.models.model_runner import ModelRunner
from flexpert.models.source import ExpertFormat, ModelSource
from flexpert.models.state_runs import NO_STATE, StateRuns
from support.small_configs import small_settings

COMMON: dict[str, Any] = {
    "vocab_size": 160,
    "hidden_size": 72,
    "intermediate_size": 88,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
MLA: dict[str, Any] = {
    "kv_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 20,
    "num_key_value_heads": 4,
}
ROUTED: dict[str, Any] = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 40,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}

FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {
        "head_dim": 24,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 40,
        "norm_topk_prob": True,
        "tie_word_embeddings": True,
    },
    "mixtral": {"num_local_experts": 6, "num_experts_per_tok": 2, "sliding_window": 19},
    "olmoe": {"num_experts": 8, "num_experts_per_tok": 3, "num_key_value_heads": 4},
    "deepseek_v3": {**MLA, **ROUTED, "q_lora_rank": 32, "n_group": 4, "topk_group": 2},
    "gpt_oss": {
        "head_dim": 24,
        "num_local_experts": 8,
        "num_experts_per_tok": 3,
        "sliding_window": 9,
        "num_hidden_layers": 4,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 150000.0,
            "factor": 8.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 32,
        },
    },
    "granitemoe": {
        "num_local_experts": 8,
        "num_experts_per_tok": 3,
        "embedding_multiplier": 2.0,
        "logits_scaling": 3.0,
        "residual_multiplier": 0.7,
        "attention_multiplier": 0.2,
    },
    "glm4_moe": {**ROUTED, "head_dim": 24, "use_qk_norm": True, "attention_bias": True},
    "deepseek_v2": {
        **MLA,
        **ROUTED,
        "q_lora_rank": None,
        "n_group": 4,
        "topk_group": 2,
        "topk_method": "group_limited_greedy",
    },
}
"""Model type → what its configuration sets beyond COMMON. Sizes are no multiples of a vector."""

FURTHER_FAMILIES = (
    "afmoe",
    "axk1",
    "beam",
    "cohere2_moe",
    "dots1",
    "ernie4_5_moe",
    "exaone_moe",
    "flex_olmo",
    "flint",
    "glm4_moe_lite",
    "granitemoe_swa",
    "granitemoeshared",
    "hunyuan_v1_moe",
    "hy_v3",
    "kolibri1",
    "laguna",
    "mellum",
    "mimo_v2_flash",
    "minimax_m2",
    "phimoe",
    "qwen2_moe",
    "solar_open",
)
"""Other families, with experts on disk in layouts of many kinds."""

SLOTS = 80
"""For the states of sequences, of a runner that is given none: two for each that is stepped."""

_COMPUTED = ("slope_rate", "query_decay", "key_decay", "diagonal_decay", "balancing_biases")
"""Ends of the names of buffers that a checkpoint holds and does not choose: they follow from the
configuration, or transformers sets them when it loads (the last one of ZAYA's biases)."""

MAIN_FAMILIES = ("qwen3_moe", "mixtral", "olmoe", "deepseek_v3", "gpt_oss")


def random_model(family: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A float32 model whose weights are large enough that routing and attention matter."""
    settings = {**COMMON, **FAMILIES[family]} if family in FAMILIES else small_settings(family)
    config = AutoConfig.for_model(family, **{**settings, **changes})
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    random_weights(model, seed)
    return model.eval()


def random_weights(model: PreTrainedModel, seed: int = 0) -> None:
    """Weights large enough that routing and attention matter, in place of a model's own."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        known = model.state_dict().keys()
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if name not in known or not tensor.is_floating_point():
                continue
            if name.endswith(_COMPUTED):
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            if "norm" in name:
                tensor.copy_(1.0 + 0.2 * noise)
            elif tensor.ndim == 1 or name.endswith("_bias"):
                tensor.copy_(noise if "sinks" in name else 0.1 * noise)
            else:
                module = model.get_submodule(name.rpartition(".")[0])
                transposed = tensor.ndim == 3 and getattr(module, "is_transposed", False)
                fan_in = tensor.shape[1] if transposed else tensor.shape[-1]
                scale = 1.0 if "embed" in name else 1.3 * fan_in**-0.5
                tensor.copy_(scale * noise)


def make_checkpoint(
    family: str, directory: Path, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any
) -> Path:
    """Write a checkpoint as save_pretrained does: experts in the family's own layout on disk."""
    model = random_model(family, seed, **changes).to(dtype)
    if dtype != torch.float32:
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.data = buffer.data.float()
    model.save_pretrained(directory)
    return directory


@functools.lru_cache(maxsize=4)
def reference(directory: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The checkpoint in transformers, all eager."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype, attn_implementation="eager", experts_implementation="eager"
    )
    return model.eval()


def reference_logits(
    directory: Path, tokens: Sequence[int], dtype: torch.dtype = torch.float32
) -> Tensor:
    """[tokens, vocab] float32: transformers' logits of one sequence in one pass."""
    with torch.inference_mode():
        logits: Tensor = reference(directory, dtype)(torch.tensor([tokens])).logits[0]
    return logits.float()


def greedy(directory: Path, prompt: Sequence[int], count: int) -> list[int]:
    """transformers' next `count` tokens."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(reference_logits(directory, tokens)[-1].argmax()))
    return tokens[len(prompt) :]


class LocalMoE:
    """All experts in this process, no exchange: the sum of each token's experts in router order."""

    def __init__(self, source: ModelSource, *, deterministic: bool = False) -> None:
        self.calls: list[int] = []
        self._layers = []
        for layer in range(source.info.moe_layers):
            held = source.load_experts(layer, range(source.info.experts))
            experts = [held[e] for e in range(source.info.experts)]
            self._layers.append(LayerExperts(experts, deterministic=deterministic))

    def expect(self, tokens: int, mean_tokens: int = 0) -> None:
        pass

    def forward(
        self,
        layer: int,
        x: Tensor,
        expert_ids: Tensor,
        weights: Tensor,
        apply_gate: Callable[[Tensor], Tensor],
    ) -> Tensor:
        with torch._C.DisableTorchFunction():  # bookkeeping of the test, not the model's arithmetic
            self.calls.append(layer)
            tokens, k = expert_ids.shape
            order = expert_ids.reshape(-1).argsort(stable=True)
            counts = torch.bincount(expert_ids.reshape(-1), minlength=self._layers[layer].slots)
            offsets = torch.zeros(len(counts) + 1, dtype=torch.int32)
            offsets[1:] = counts.cumsum(0)
            rows = x[order // k]
        y = self._layers[layer].compute(rows, offsets, apply_gate)
        with torch._C.DisableTorchFunction():
            back = torch.empty_like(y)
            back[order] = y
            each = back.view(tokens, k, x.shape[1]).float() * weights.unsqueeze(-1)
            total = torch.zeros((tokens, x.shape[1]))
            for i in range(k):  # an order of its own, not the library's reduction
                total += each[:, i]
            return total.to(x.dtype)


class Sequences:
    """Sequences over one ModelRunner, with scattered KV blocks. batch: of the last step."""

    batch: ForwardBatch

    def __init__(self, runner: ModelRunner, block_size: int, seed: int = 0) -> None:
        self.runner = runner
        self.block_size = block_size
        blocks = runner.kv.layers[0][0].shape[0]
        self._free = torch.randperm(blocks, generator=torch.Generator().manual_seed(seed)).tolist()
        self._tables: dict[object, list[int]] = {}
        self._free_slots = list(range(runner.kv.slots))
        self._slots: dict[object, int] = {}
        self._lengths: dict[object, int] = {}

    def drop(self, name: object) -> None:
        self._free.extend(self._tables.pop(name, []))
        self._lengths.pop(name, None)
        if name in self._slots:
            self._free_slots.append(self._slots.pop(name))

    def _decodes(self, name: object, new: Sequence[int]) -> bool:
        return len(new) == 1 and name in self._slots

    def step(self, work: dict[Any, Sequence[int]], *, each: bool = False) -> dict[Any, Tensor]:
        """Append tokens to sequences, all in one packed pass; name → [tokens, vocab] logits.

        each: they decode, and of models that keep states there is one behind every token, as
        behind those that are proposed.
        """
        runs = None
        if self.runner.kv.states:
            work = dict(sorted(work.items(), key=lambda one: not self._decodes(*one)))
            decodes = sum(self._decodes(*one) for one in work.items())
            sources = [self._slots.get(name, NO_STATE) for name in work]
            targets = [self._free_slots.pop() for _ in work]
            between = [self._free_slots.pop() for new in work.values() for _ in new[1:] if each]
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        starts, contexts = [0], []
        for name, new in work.items():
            length = self._lengths.get(name, 0)
            table = self._tables.setdefault(name, [])
            while len(table) * self.block_size < length + len(new):
                table.append(self._free.pop())
            for position in range(length, length + len(new)):
                block, offset = divmod(position, self.block_size)
                slots.append(table[block] * self.block_size + offset)
                positions.append(position)
            tokens.extend(new)
            starts.append(len(tokens))
            self._lengths[name] = length + len(new)
            contexts.append(length + len(new))
        if self.runner.kv.states:
            runs = StateRuns(starts, sources, targets, decodes)
            if each:
                runs = _run_for_each_row(runs, between)
                self._free_slots += between
            self._slots.update(zip(work, targets, strict=True))
            self._free_slots += [slot for slot in sources if slot != NO_STATE]
        width = max(len(self._tables[name]) for name in work)
        tables = torch.full((len(work), width), -1, dtype=torch.int32)
        for row, name in enumerate(work):
            table = self._tables[name]
            tables[row, : len(table)] = torch.tensor(table, dtype=torch.int32)
        self.batch = ForwardBatch(
            token_ids=torch.tensor(tokens),
            positions=torch.tensor(positions),
            query_start=torch.tensor(starts, dtype=torch.int32),
            context_len=torch.tensor(contexts, dtype=torch.int32),
            block_tables=tables,
            slot_mapping=torch.tensor(slots),
            sample_rows=torch.arange(len(tokens)),
            states=runs,
        )
        logits = self.runner.forward(self.batch)
        return {name: logits[starts[i] : starts[i + 1]] for i, name in enumerate(work)}


def _run_for_each_row(runs: StateRuns, between: Sequence[int]) -> StateRuns:
    """between: slots for the states behind all rows but the last one of each run."""
    sources, targets, others = list[int](), list[int](), iter(between)
    counts = [end - begin for begin, end in itertools.pairwise(runs.begins)]
    for count, source, target in zip(counts, runs.sources, runs.targets, strict=True):
        behind = [*(next(others) for _ in range(count - 1)), target]
        sources += [source, *behind[:-1]]
        targets += behind
    rows = len(targets)
    return StateRuns(range(rows + 1), sources, targets, rows)


def single_runner(
    model: str | Path,
    *,
    dtype: str = "auto",
    deterministic: bool = False,
    experts: ExpertFormat = "unquantized",
    blocks: int = 64,
    block_size: int = 8,
    latent_cache: bool = False,
    drafts: bool = False,
    kernels: Kernels | None = None,
) -> Sequences:
    """A whole model in this process, ready to be stepped. kernels: default: a CPU's."""
    source = ModelSource.open(
        str(model), dtype=dtype, experts=experts, latent_cache=latent_cache, drafts=drafts
    )
    runner = ModelRunner.load(
        source,
        moe=LocalMoE(source, deterministic=deterministic),
        kv_blocks=blocks,
        kv_block_size=block_size,
        deterministic=deterministic,
        state_slots=SLOTS,
        kernels=kernels,
    )
    return Sequences(runner, block_size)


def prompt_of(length: int, seed: int, vocab: int = 160) -> list[int]:
    """Random tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocab, (length,), generator=generator).tolist()
