"""A decode step of a random model as large as a real one: ours, transformers', and the limit.

Ours is the engine's own path: a batch on the host becomes inputs on the GPU, a captured graph is
replayed, the likeliest tokens come back. Times are of the wall, from one step's tokens to the next.
"""

from __future__ import annotations

import gc
import inspect
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import msgspec
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from flexpert.bench.gpu.device import Gpu, Spread, measure_gpu
from flexpert.bench.gpu.model import RandomModel, qwen3_30b_a3b
from flexpert.bench.machine import Machine, this_machine
from flexpert.errors import FlexpertError
from flexpert.models.batch import ForwardBatch
from flexpert.models.shard import ModelShard
from flexpert.moe.cuda.experts import Gate
from flexpert.moe.cuda.runtime import LocalExperts
from flexpert.moe.kernels import open_gpu

WARM_UP = 3
BLOCK = 16
CHECK_TOKENS = 33
TOLERANCE = 0.05
"""‖logits − transformers'‖ / ‖…‖: bf16 rounds differently in other kernels, and where two experts
are almost equally likely the router then takes the other one."""


class DecodePoint(msgspec.Struct, frozen=True, kw_only=True):
    """One batch size.

    active: experts a layer that get a token, mean over the layers of one step.
    limit_ms: weights in use and keys and values, read once, at the rate of the GPU's memory.
    ours_ms, transformers_ms: of a step; skipped: why there is no figure of transformers.
    captures: graphs captured until then.
    """

    batch: int
    active: float
    limit_ms: float
    ours_us: Spread
    captures: int
    transformers_us: Spread | None = None
    skipped: str | None = None

    @property
    def over_limit(self) -> float:
        return self.ours_us.p50 / 1e3 / self.limit_ms

    @property
    def times_ours(self) -> float | None:
        if self.transformers_us is None:
            return None
        return self.transformers_us.p50 / self.ours_us.p50


class DecodeReport(msgspec.Struct, frozen=True, kw_only=True):
    """error: of the last logits of a short prompt, relative to transformers'."""

    machine: Machine
    gpu: Gpu
    layers: int
    context: int
    steps: int
    error: float
    build_s: float
    capture_s: float
    points: list[DecodePoint]

    @property
    def correct(self) -> bool:
        return self.error < TOLERANCE


@dataclass(slots=True)
class _Counting:
    """Counts, while asked to, the experts that get a token."""

    local: LocalExperts
    counting: bool = False
    active: list[int] = field(default_factory=list)

    def expect(self, tokens: int) -> None:
        self.local.expect(tokens)

    def forward(
        self, layer: int, x: Tensor, expert_ids: Tensor, weights: Tensor, apply_gate: Gate
    ) -> Tensor:
        if self.counting:
            self.active.append(int(torch.bincount(expert_ids.flatten()).count_nonzero()))
        return self.local.forward(layer, x, expert_ids, weights, apply_gate)


def run_decode(
    batches: Sequence[int],
    *,
    layers: int,
    context: int,
    steps: int,
    rival: bool,
    seed: int,
    note: Callable[[str], None],
) -> DecodeReport:
    """Build, check, time.

    Args:
        context: tokens of each sequence before the first timed step.
        rival: time transformers, too.

    Raises:
        ConfigError: no GPU.
        FlexpertError: too little memory on it.
    """
    device = open_gpu()
    torch.manual_seed(seed)
    note("measuring the GPU")
    gpu = measure_gpu(device)
    note("building the model")
    began = time.perf_counter()
    try:
        model = RandomModel.build(qwen3_30b_a3b(layers), device)
        torch.cuda.synchronize()
        build_s = time.perf_counter() - began
        with torch.inference_mode():
            ours = _Ours(model, batches, context + steps + WARM_UP + 1, note)
            reference = model.transformers()
            note("comparing with transformers")
            error = ours.compare(reference)
            points = [ours.point(batch, gpu, context, steps, note) for batch in batches]
            capture_s = ours.capture_s
            ours.shard.graphs = None  # their memory goes before transformers needs it
            del ours
            gc.collect()
            torch.cuda.empty_cache()
            if rival:
                points = [_with_rival(p, reference, context, steps, note) for p in points]
    except torch.OutOfMemoryError as full:
        raise FlexpertError(
            f"the GPU's memory does not hold it: {str(full).splitlines()[0]}; give fewer "
            "--layers, a smaller --batch or a shorter --context"
        ) from full
    return DecodeReport(
        machine=this_machine(),
        gpu=gpu,
        layers=layers,
        context=context,
        steps=steps,
        error=error,
        build_s=build_s,
        capture_s=capture_s,
        points=points,
    )


class _Ours:
    """The engine's shard, with a cache that holds the largest batch."""

    def __init__(
        self,
        model: RandomModel,
        batches: Sequence[int],
        longest: int,
        note: Callable[[str], None],
    ) -> None:
        info = model.info
        device = next(iter(model.weights.values())).device
        local = LocalExperts(0, info.moe_layers, info.experts, model.expert_shape, device)
        self.model = model
        self.runtime = _Counting(local)
        self.width = -(-max(longest, CHECK_TOKENS + 1) // BLOCK)
        blocks = max(*batches, 2) * self.width
        self.shard: ModelShard = model.shard(
            local, kv_blocks=blocks, kv_block_size=BLOCK, runtime=self.runtime
        )
        for cache in self.shard.kv.layers:
            for tensor in cache:
                tensor.normal_()
        self.tables = torch.randperm(blocks).int().view(-1, self.width)
        note("capturing graphs")
        began = time.perf_counter()
        self.shard.capture(sorted({*batches, 2}), self.width)
        torch.cuda.synchronize()
        self.capture_s = time.perf_counter() - began

    def batch(self, tokens: list[list[int]], begin: int) -> ForwardBatch:
        """As many tokens of each sequence, at `begin` and on; logits of each one's last."""
        each = len(tokens[0])
        sequences = len(tokens)
        positions = torch.arange(begin, begin + each)
        tables = self.tables[:sequences]
        slots = tables[:, positions // BLOCK].long() * BLOCK + positions % BLOCK
        ends = torch.arange(1, sequences + 1) * each
        return ForwardBatch(
            token_ids=torch.tensor(tokens).flatten(),
            positions=positions.repeat(sequences),
            query_start=torch.cat([torch.zeros(1), ends]).int(),
            context_len=torch.full((sequences,), begin + each, dtype=torch.int32),
            block_tables=tables,
            slot_mapping=slots.flatten(),
            sample_rows=ends - 1,
        )

    def compare(self, reference: PreTrainedModel) -> float:
        """Two prompts: all but the last token at once, the last by a graph."""
        prompts = torch.randint(0, self.model.info.vocab, (2, CHECK_TOKENS))
        self.shard.forward(self.batch(prompts[:, :-1].tolist(), 0))
        assert self.shard.graphs is not None
        last = self.batch(prompts[:, -1:].tolist(), CHECK_TOKENS - 1)
        if not self.shard.graphs.fits(last):
            raise AssertionError("a decode step that no graph was captured for")
        ours = self.shard.forward(last)
        device = ours.device
        theirs = reference(input_ids=prompts.to(device), logits_to_keep=1).logits[:, 0].float()
        return float((ours - theirs).norm() / theirs.norm())

    def point(
        self, batch: int, gpu: Gpu, context: int, steps: int, note: Callable[[str], None]
    ) -> DecodePoint:
        note(f"batch {batch}")
        shard = self.shard
        assert shard.graphs is not None
        tokens = torch.randint(0, self.model.info.vocab, (batch, 1)).tolist()
        graphs, shard.graphs = shard.graphs, None  # once module by module, to count experts
        self.runtime.counting, self.runtime.active = True, []
        shard.forward(self.batch(tokens, context))
        self.runtime.counting, shard.graphs = False, graphs
        active = sum(self.runtime.active) / len(self.runtime.active)

        times = []
        for step in range(WARM_UP + steps):
            prepared = self.batch(tokens, context + step)
            torch.cuda.synchronize()
            began = time.perf_counter()
            chosen = shard.forward(prepared).argmax(dim=-1).tolist()
            times.append((time.perf_counter() - began) * 1e6)
            tokens = [[token] for token in chosen]
        info = self.model.info
        kv = batch * (context + steps / 2) * info.kv_bytes_per_token()
        experts = active * info.moe_layers * self.model.expert_nbytes
        nbytes = self.model.dense_nbytes + experts + kv
        return DecodePoint(
            batch=batch,
            active=active,
            limit_ms=gpu.limit_s(nbytes, 0.0) * 1e3,
            ours_us=Spread.of(times[WARM_UP:]),
            captures=graphs.captures,
        )


def _with_rival(
    point: DecodePoint,
    model: PreTrainedModel,
    context: int,
    steps: int,
    note: Callable[[str], None],
) -> DecodePoint:
    """The same steps by transformers: its cache, sdpa, grouped_mm, launched by the host."""
    note(f"batch {point.batch}: transformers")
    try:
        times = _transformers_us(model, point.batch, context, steps)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return msgspec.structs.replace(point, skipped="out of memory")
    return msgspec.structs.replace(point, transformers_us=Spread.of(times))


def _transformers_us(model: PreTrainedModel, batch: int, context: int, steps: int) -> list[float]:
    config = model.config
    device = next(model.parameters()).device
    cache = DynamicCache(config=config)
    shape = (batch, config.num_key_value_heads, context, config.head_dim)
    for layer in range(config.num_hidden_layers):
        keys, values = (torch.randn(shape, dtype=torch.bfloat16, device=device) for _ in range(2))
        cache.update(keys, values, layer)
    tokens = torch.randint(0, config.vocab_size, (batch, 1), device=device)
    known = inspect.signature(model.forward).parameters
    given = {"cache" if "cache" in known else "past_key_values": cache, "use_cache": True}
    times = []
    for _ in range(WARM_UP + steps):
        torch.cuda.synchronize()
        began = time.perf_counter()
        logits = model(input_ids=tokens, **given).logits
        chosen = logits[:, -1].argmax(dim=-1).tolist()
        times.append((time.perf_counter() - began) * 1e6)
        tokens = torch.tensor(chosen, device=device)[:, None]
    return times[WARM_UP:]
