"""A MoE layer of several ranks, each with its share of the experts and tokens of its own.

Each is a process of its own; they compute the layer in lock-step, through the exchange.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from time import perf_counter

import msgspec
import torch
from torch import Tensor, nn

from flexpert.bench.gpu.gpu_device import (
    Launch,
    MeasuredGpu,
    flusher,
    most_sharing,
    replay_us,
)
from flexpert.bench.gpu.layer_report import EXCHANGED, INPUTS, LayerPoint, LayerResult
from flexpert.bench.gpu.layer_weights import TOLERANCE, LayerShape, LayerWeights
from flexpert.bench.gpu.rank_group import (
    ParentOfRank,
    RankGroup,
    meet,
    open_rank_device,
    serve_rank,
)
from flexpert.bench.statistics import SpreadUs
from flexpert.comm import Buffer, BufferSpec
from flexpert.kernels.cuda.device_experts import SlotAddresses
from flexpert.moe.cuda.exchanged_experts import ExchangedExperts
from flexpert.moe.moe_layers import LayerState
from flexpert.moe.placement import Placement, replan
from flexpert.moe.runtime import expert_tables


class LayerGroupPlan(msgspec.Struct, frozen=True):
    """What the ranks do. tokens: of each rank, one measurement after the other. dtype: a name of
    torch's."""

    shape: LayerShape
    tokens: list[int]
    ranks: int
    repeat: int
    quantise: bool
    seed: int
    dtype: str = "bfloat16"

    def placement(self) -> Placement:
        """Each expert once, dealt out evenly."""
        return replan(None, range(self.ranks), experts=self.shape.experts, layers=1)


class BeginLayer(msgspec.Struct, frozen=True):
    """What a rank is told."""

    rank: int
    plan: LayerGroupPlan


class RankPoint(msgspec.Struct, frozen=True):
    """chosen: [inputs, experts], which got a token of this rank's. error: relative to float64.
    times_us: of one pass in each replay."""

    chosen: list[list[bool]]
    error: float
    times_us: list[float]


class Built(msgspec.Struct, frozen=True):
    """roofline_s is computed with it: bytes of an expert as it is computed with."""

    expert_nbytes: int


def run_layer_group(
    plan: LayerGroupPlan, gpu: MeasuredGpu, note: Callable[[str], None]
) -> list[LayerPoint]:
    """Start the ranks, check and time, end them.

    Raises: FlexpertError: a rank failed, or took too long.
    """
    shape, ranks = plan.shape, plan.ranks
    begins = [BeginLayer(rank, plan) for rank in range(ranks)]
    gpus = min(ranks, max(1, torch.cuda.device_count()))
    with RankGroup.started(f"{__name__}:serve", begins) as group:
        note(f"{shape.name}: {ranks} ranks draw their weights")
        group.connect()
        nbytes = group.answers(Built)[0].expert_nbytes
        points = []
        for count in plan.tokens:
            note(f"{shape.name}: {ranks} ranks, {count} tokens each")
            found = group.answers(RankPoint)
            chosen = torch.tensor([point.chosen for point in found]).any(0)
            active = float(chosen.sum(1).float().mean()) / gpus
            rows = count * most_sharing(ranks, gpus)
            points.append(
                LayerPoint(
                    shape=shape,
                    tokens=count,
                    active=active,
                    roofline_us=shape.roofline_s(gpu, rows, active, nbytes) * 1e6,
                    results=[_result(found)],
                    quantised=plan.quantise,
                    ranks=ranks,
                    gpus=gpus,
                )
            )
        return points


def _result(found: Sequence[RankPoint]) -> LayerResult:
    """The slowest rank's time of each pass, and the largest error."""
    error = max(point.error for point in found)
    if not error < TOLERANCE:
        why = f"differs from float64 by {error:.3g}"
        return LayerResult(baseline=EXCHANGED, error=error, skipped=why, wrong=True)
    slowest = [max(times) for times in zip(*(point.times_us for point in found), strict=True)]
    return LayerResult(baseline=EXCHANGED, us=SpreadUs.of(slowest), error=error)


def serve(end: socket.socket) -> None:
    """A rank's process."""
    serve_rank(end, BeginLayer, _measure)


def _measure(begin: BeginLayer, parent: ParentOfRank) -> None:
    rank, plan = begin.rank, begin.plan
    device = open_rank_device(rank)
    torch.manual_seed(plan.seed + rank)
    shape, dtype = plan.shape, getattr(torch, plan.dtype)
    weights = LayerWeights.drawn(shape, device, seed=plan.seed, quantise=plan.quantise, dtype=dtype)
    placement = plan.placement()
    experts = [weights.served(expert) for expert in placement.held_by(rank)[0]]
    spec = BufferSpec(plan.ranks, max(plan.tokens), shape.hidden, shape.topk, dtype)
    with parent.connected(rank, spec) as buffer:
        moe = ExchangedExperts(buffer, 1, shape.experts, experts[0].shape, device)
        table = expert_tables(placement, rank)[0]
        moe.install(moe.stage([LayerState(table, SlotAddresses.of(experts))]))
        buffer.set_active(range(plan.ranks), 1)
        meet(buffer)
        parent.say(Built(experts[0].nbytes))
        for count in plan.tokens:
            parent.say(_point(weights, moe, buffer, count, plan.repeat))
            buffer.check()
        meet(buffer)


def _point(
    weights: LayerWeights, moe: ExchangedExperts, buffer: Buffer, tokens: int, repeat: int
) -> RankPoint:
    moe.expect(tokens, tokens)
    block = weights.block(moe, tokens)
    router = weights.router
    xs = [router.new_empty(1, tokens, weights.shape.hidden).normal_() for _ in range(INPUTS)]
    chosen: list[list[bool]] = [weights.chosen(x[0]).tolist() for x in xs]
    outputs = [block(x)[0] for x in xs[:2]]
    errors = [weights.error(y, x[0], weights.restored) for y, x in zip(outputs, xs, strict=False)]
    times = (_replayed_us if router.device.type == "cuda" else _walked_us)(
        block, xs, buffer, repeat
    )
    return RankPoint(chosen, max(errors), times)


def _replayed_us(block: nn.Module, xs: list[Tensor], buffer: Buffer, repeat: int) -> list[float]:
    """Of a captured pass, all ranks beginning at once."""
    flush, first = flusher(xs[0].device), xs[0].clone()

    def fresh() -> None:
        for x in xs:
            x.normal_()
        torch.cuda.synchronize()
        meet(buffer)
        block(first)  # its exchange ends on all GPUs at once
        flush()

    launches: list[Launch] = [lambda x=x: block(x) for x in xs]  # type: ignore[misc]
    return replay_us(launches, repeat=repeat, before=fresh)


def _walked_us(block: nn.Module, xs: list[Tensor], buffer: Buffer, repeat: int) -> list[float]:
    """In the interpreter, which captures nothing."""
    times = []
    for _ in range(repeat):
        meet(buffer)
        began = perf_counter()
        for x in xs:
            block(x)
        times.append((perf_counter() - began) * 1e6 / len(xs))
    return times
