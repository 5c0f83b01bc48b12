"""A decode step of a random model as large as a real one: ours, another way, and the roofline.

Times are of the wall, from one step's tokens to the next; of several ranks, the slowest one's.
"""

from __future__ import annotations

import gc
import inspect
import time
from collections.abc import Callable, Sequence

import msgspec
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from flexpert.bench.gpu.decode_group import GroupPlan, GroupResult, place_on, run_group
from flexpert.bench.gpu.decode_rank import CHECK_TOKENS, WARM_UP, DecodeRank, check_prompts
from flexpert.bench.gpu.gpu_device import MeasuredGpu, measure_gpu, most_sharing
from flexpert.bench.gpu.model import RandomModel
from flexpert.bench.machine import Machine, this_machine
from flexpert.bench.model_shapes import DECODE_SHAPES, Compared
from flexpert.bench.statistics import SpreadUs
from flexpert.errors import FlexpertError
from flexpert.kernels.kernel_set import open_gpu
from flexpert.moe.cuda.local_experts import LocalExperts


class DecodePoint(msgspec.Struct, frozen=True, kw_only=True):
    """One batch size. ranks: which have it together. gpus: that they run on.

    active: experts a layer that get a token, mean over the layers of one step.
    roofline_ms: weights in use and keys and values, read once, and states, read and written once,
        at the rate of the GPU's memory; on several GPUs, by the one with the most ranks, with
        experts and caches dealt out evenly.
    ours_us, compared_us: of a step; skipped: why there is no figure of what it is compared with.
    captures: graphs captured until then.
    """

    ranks: int = 1
    gpus: int = 1
    batch: int
    active: float
    roofline_ms: float
    ours_us: SpreadUs
    captures: int
    compared_us: SpreadUs | None = None
    skipped: str | None = None

    @property
    def times_roofline(self) -> float:
        return self.ours_us.p50 / 1e3 / self.roofline_ms

    @property
    def times_ours(self) -> float | None:
        if self.compared_us is None:
            return None
        return self.compared_us.p50 / self.ours_us.p50


class DecodeReport(msgspec.Struct, frozen=True, kw_only=True):
    """quantised: the experts are fp8, and transformers has them restored, in bf16.
    error: of the last logits of short prompts, relative to transformers'; the worst of all
    numbers of ranks. captures, capture_s: graphs of one rank, and the time they took.
    shape: in `DECODE_SHAPES`. kv_bytes: of a token in all layers; compared_kv_bytes: expanded."""

    machine: Machine
    gpu: MeasuredGpu
    layers: int
    context: int
    steps: int
    error: float
    build_s: float
    captures: int
    capture_s: float
    points: list[DecodePoint]
    shape: str = "qwen3-30b-a3b"
    compared: Compared = "transformers"
    kv_bytes: int = 0
    compared_kv_bytes: int = 0
    quantised: bool = False

    @property
    def correct(self) -> bool:
        return self.error < DECODE_SHAPES[self.shape].tolerance


def run_decode(
    batches: Sequence[int],
    *,
    shape: str,
    compared: Compared,
    ranks: Sequence[int],
    layers: int,
    context: int,
    steps: int,
    quantise: bool = False,
    seed: int,
    note: Callable[[str], None],
) -> DecodeReport:
    """Build, check, time.

    Args:
        batches: sequences of all ranks together.
        ranks: numbers of ranks, dealt out to the GPUs in turn; one rank exchanges nothing.
        context: tokens of each sequence before the first timed step.
        shape: in `DECODE_SHAPES`.
        compared: what else is timed: with "expanded", of one rank.
        quantise: the experts are fp8.

    Raises:
        ConfigError: no GPU.
        FlexpertError: too little memory on one, or a rank failed.
    """
    device = open_gpu()
    torch.manual_seed(seed)
    note("measuring the GPU")
    gpu = measure_gpu(device)
    torch.cuda.empty_cache()
    config = DECODE_SHAPES[shape].config(layers)
    groups = {
        count: run_group(
            GroupPlan(config, count, batches, context, steps, seed, quantise=quantise), note
        )
        for count in ranks
        if count > 1
    }
    note("building the model")
    began = time.perf_counter()
    try:
        model = RandomModel.build(config, device, seed=seed, place=place_on(1), quantise=quantise)
        torch.cuda.synchronize()
        build_s = time.perf_counter() - began
        with torch.inference_mode():
            captures, capture_s, logits = 0, 0.0, {}
            points: list[DecodePoint] = []
            if 1 in ranks:
                ours = single_rank(model, batches, context + steps + WARM_UP + 1, note)
                logits[1] = ours.logits(check_prompts(model.info.vocab, seed)).float().cpu()
                points = [_point(ours, batch, gpu, context, steps, note) for batch in batches]
                captures, capture_s = ours.graphs.captures, ours.capture_s
                ours.runner.graphs = None  # their memory goes before others need it
                del ours
                gc.collect()
                torch.cuda.empty_cache()
            expanded = model.expanded() if compared == "expanded" else model
            if compared == "expanded":
                points, logits[0] = _with_expanded(points, expanded, context, steps, seed, note)
            for count, group in groups.items():
                points += _points_of(group, count, batches, model, gpu, context, steps)
                captures, capture_s = group.captures, group.capture_s
                logits[count] = group.logits
            note("comparing with transformers")
            reference = model.transformers()
            error = max(difference(reference, found, seed) for found in logits.values())
            if compared == "transformers":
                points = _with_baseline(points, reference, context, steps, note)
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
        captures=captures,
        capture_s=capture_s,
        points=points,
        shape=shape,
        compared=compared,
        kv_bytes=model.info.kv_bytes_per_token(),
        compared_kv_bytes=expanded.info.kv_bytes_per_token(),
        quantised=quantise,
    )


def single_rank(
    model: RandomModel, batches: Sequence[int], longest: int, note: Callable[[str], None]
) -> DecodeRank:
    """One rank that holds all experts, with its graphs captured.

    batches: sequences; longest: tokens of a sequence.
    """
    note("capturing graphs")
    info = model.info
    device = next(iter(model.weights.values())).device
    local = LocalExperts(0, info.moe_layers, info.experts, model.expert_shape, device)
    return DecodeRank(model, local, batches, longest)


def _point(
    ours: DecodeRank,
    batch: int,
    gpu: MeasuredGpu,
    context: int,
    steps: int,
    note: Callable[[str], None],
) -> DecodePoint:
    note(f"batch {batch}")
    active = float(ours.active(batch, context).sum(1).float().mean())
    nbytes = _bytes_read(ours.model, 1, active, batch, context + steps / 2)
    return DecodePoint(
        ranks=1,
        batch=batch,
        active=active,
        roofline_ms=gpu.roofline_s(nbytes, 0.0) * 1e3,
        ours_us=SpreadUs.of(ours.times_us(batch, context, steps)),
        captures=ours.graphs.captures,
    )


def _points_of(
    group: GroupResult,
    ranks: int,
    batches: Sequence[int],
    model: RandomModel,
    gpu: MeasuredGpu,
    context: int,
    steps: int,
) -> list[DecodePoint]:
    points = []
    gpus = min(ranks, torch.cuda.device_count())
    share = most_sharing(ranks, gpus) / ranks
    for batch, active, times in zip(batches, group.active, group.times_us, strict=True):
        nbytes = _bytes_read(model, ranks, active, batch, context + steps / 2)
        points.append(
            DecodePoint(
                ranks=ranks,
                gpus=gpus,
                batch=batch,
                active=active,
                roofline_ms=gpu.roofline_s(nbytes * share, 0.0) * 1e3,
                ours_us=SpreadUs.of(times),
                captures=group.captures,
            )
        )
    return points


def _bytes_read(
    model: RandomModel, ranks: int, active: float, sequences: int, context: float
) -> float:
    """By all ranks in a step, and of states what is written. context: tokens of each sequence."""
    info = model.info
    experts = active * info.moe_layers * model.expert_nbytes
    each = context * info.kv_bytes_per_token() + 2 * info.state_nbytes
    return ranks * model.dense_nbytes + experts + sequences * each


def difference(
    reference: PreTrainedModel, ours: Tensor, seed: int, tokens: int = CHECK_TOKENS
) -> float:
    """Of the logits of the check's prompts, relative to transformers'.

    ours: [prompts, vocab] float32 on a CPU.
    """
    prompts = check_prompts(reference.config.vocab_size, seed, tokens).to(reference.device)
    theirs = reference(input_ids=prompts, logits_to_keep=1).logits[:, 0].float().cpu()
    return float((ours - theirs).norm() / theirs.norm())


def _with_expanded(
    points: list[DecodePoint],
    model: RandomModel,
    context: int,
    steps: int,
    seed: int,
    note: Callable[[str], None],
) -> tuple[list[DecodePoint], Tensor]:
    """The same steps with keys and values of all heads in the cache, and its logits of the check.

    A batch whose cache the GPU does not hold beside the weights is left out.
    """
    longest = context + steps + WARM_UP + 1
    found: dict[int, SpreadUs] = {}
    room = torch.cuda.mem_get_info()[0]
    needed = {
        point.batch: point.batch * longest * model.info.kv_bytes_per_token() for point in points
    }
    fit = [batch for batch, nbytes in needed.items() if nbytes < 0.9 * room] or [1]
    ours = single_rank(model, fit, longest, note)
    logits = ours.logits(check_prompts(model.info.vocab, seed)).float().cpu()
    for batch in fit:
        note(f"batch {batch}: expanded")
        found[batch] = SpreadUs.of(ours.times_us(batch, context, steps))
    ours.runner.graphs = None
    del ours
    gc.collect()
    torch.cuda.empty_cache()
    return [
        msgspec.structs.replace(point, compared_us=found[point.batch])
        if point.batch in found
        else msgspec.structs.replace(point, skipped=f"no {needed[point.batch] >> 30} GiB free")
        for point in points
    ], logits


def _with_baseline(
    points: list[DecodePoint],
    model: PreTrainedModel,
    context: int,
    steps: int,
    note: Callable[[str], None],
) -> list[DecodePoint]:
    """The same steps by transformers: its cache, sdpa, grouped_mm, launched by the host."""
    found: dict[int, SpreadUs | str] = {}
    for batch in dict.fromkeys(point.batch for point in points):
        note(f"batch {batch}: transformers")
        try:
            found[batch] = SpreadUs.of(_transformers_us(model, batch, context, steps))
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            found[batch] = "out of memory"
    return [
        msgspec.structs.replace(point, skipped=theirs)
        if isinstance(theirs := found[point.batch], str)
        else msgspec.structs.replace(point, compared_us=theirs)
        for point in points
    ]


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
