"""What a rank needs of the memory of a GPU: planned before it starts (pure)."""

from __future__ import annotations

from flexpert.comm import BufferSpec
from flexpert.comm.cuda.cuda_layout import layout
from flexpert.config import EngineConfig
from flexpert.engine.device_profile import captured_shapes, result_rows
from flexpert.engine.memory_plan import buffer_spec, kv_blocks, most_samples, state_slots
from flexpert.engine.rank_memory import RankMemoryPlan
from flexpert.engine.rank_protocol import Memory
from flexpert.models.device_indexers import SCORES
from flexpert.models.device_latents import WORKSPACE_NUMBERS
from flexpert.models.kv_cache import KVCache
from flexpert.models.source import ModelInfo, ModelSource
from flexpert.models.state_layers import DECODED_ON_GPU

CONTEXT_BYTES = 640 * 2**20
"""An estimate of what the driver takes for a process besides what that allocates: its context, the
code of its kernels, its graphs."""

_PLACE = 256  # bytes; places of experts are whole multiples
_LOGIT_BYTES = 4
_STATE_COPIES = 3  # of a step's tokens in float32, each with the heads' dimensions of its layer


def expert_place_nbytes(source: ModelSource) -> int:
    """What one expert takes on the device."""
    return -(-source.expert_nbytes() // _PLACE) * _PLACE


def planned_device_memory(
    source: ModelSource,
    config: EngineConfig,
    capacity: int,
    experts: int,
    runtime: int | None = None,
) -> Memory:
    """What a rank needs when it holds `experts` replicas (all layers).

    runtime: as a rank has measured it; default: an estimate.
    """
    return device_memory_plan(source, config, capacity).needs(experts, capacity, runtime)


def device_memory_plan(source: ModelSource, config: EngineConfig, capacity: int) -> RankMemoryPlan:
    """What any rank needs, with an estimate of its runtime."""
    info = source.info
    return RankMemoryPlan(
        dense=source.dense_nbytes(),
        expert=expert_place_nbytes(source),
        kv=KVCache.nbytes(
            info, kv_blocks(info, config), config.kv_block_size, state_slots(info, config)
        ),
        windows=window_nbytes(source, config, capacity),
        runtime=CONTEXT_BYTES + workspace_nbytes(source, config, capacity),
        capacity=capacity,
    )


def window_nbytes(source: ModelSource, config: EngineConfig, capacity: int) -> int:
    """What the exchange takes of the device: sized for the capacity, whoever is there."""
    spec = buffer_spec(source.info, config, capacity)
    if config.all2all == "nixl_ep" and capacity > 1:
        return _nixl_ep_nbytes(spec, source.info.experts)
    return layout(spec, choices=result_rows(config, spec.topk)).size


def _nixl_ep_nbytes(spec: BufferSpec, experts: int) -> int:
    """About what NVIDIA's kernels take: room to send and to receive each token for each expert that
    the capacity has slots for, for two exchanges at once."""
    message = spec.hidden * spec.dtype.itemsize + 16
    return 2 * 2 * spec.capacity * experts * spec.max_tokens * message


def workspace_nbytes(source: ModelSource, config: EngineConfig, capacity: int) -> int:
    """About what torch's pools hold of a warm rank besides the dense weights: the rows of the
    experts' products, for the largest step and for the graphs, and the logits."""
    info, shape = source.info, source.expert_shape()
    step = capacity * config.max_tokens_per_step
    captured = captured_shapes(most_samples(config), config.max_tokens_per_step)
    row = (shape.height // 2 + info.hidden) * info.dtype.itemsize
    # of a step without a graph; of one with prompts, and what all of these leave them in
    rows = 3 * most_samples(config) + sum(shape.sequences for shape in captured if shape.decodes)
    logits = rows * info.vocab * _LOGIT_BYTES
    layers = _latent_nbytes(info) + _state_nbytes(info, config.max_tokens_per_step)
    layers += _index_nbytes(info)
    return 2 * step * info.topk * row + logits + _draft_nbytes(info, config) + layers


def _draft_nbytes(info: ModelInfo, config: EngineConfig) -> int:
    """What a layer that proposes tokens takes beside: states of a step's rows, block tables."""
    if not info.drafts:
        return 0
    states = (config.max_tokens_per_step + most_samples(config)) * info.hidden
    table = -(-info.max_model_len // config.kv_block_size) * 4
    head = most_samples(config) * info.vocab * _LOGIT_BYTES
    return states * info.dtype.itemsize + most_samples(config) * table + head


def _latent_nbytes(info: ModelInfo) -> int:
    """What attention to latents makes of a sequence, in a step and in the graphs, at most."""
    kept = [shape.key_dim for shape in info.attention if shape.value_in_key]
    if not kept:
        return 0
    return (2 * WORKSPACE_NUMBERS + info.max_model_len * max(kept)) * info.dtype.itemsize


def _index_nbytes(info: ModelInfo) -> int:
    """The scores of an indexer that are there at one time, in a step and in the graphs."""
    return 2 * SCORES * 4 if any(shape.indexed for shape in info.attention) else 0


def _state_nbytes(info: ModelInfo, tokens: int) -> int:
    """What a layer with states makes of a step of so many tokens, and of the states of a step that
    decodes, about."""
    if not info.states:
        return 0
    numbers = max(sum(state.shape[0] for state in layer) for layer in info.states)
    wide = max(
        sum(state.shape[0] * sum(state.shape[1:]) for state in layer if len(state.shape) > 2)
        for layer in info.states
    )
    return _STATE_COPIES * tokens * (numbers + wide) * 4 + DECODED_ON_GPU
