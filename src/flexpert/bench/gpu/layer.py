"""A whole MoE layer (route, dispatch, experts, combine) of a rank that holds all its experts.

Every baseline is the same module of transformers with another experts implementation, so router,
data and weights are the same. flexpert is there twice: as the only rank there can be, which sorts
its rows and exchanges nothing, and as one of several, whose rows go through the exchange.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import msgspec
import torch
from torch import Tensor
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from flexpert.bench.gpu.gpu_device import (
    Launch,
    MeasuredGpu,
    flusher,
    measure_gpu,
    replay_us,
    timed_us,
)
from flexpert.bench.gpu.layer_group import LayerGroupPlan, run_layer_group
from flexpert.bench.gpu.layer_report import (
    EXCHANGED,
    INPUTS,
    OURS,
    LayerPoint,
    LayerReport,
    LayerResult,
)
from flexpert.bench.gpu.layer_weights import TOLERANCE, LayerShape, LayerWeights
from flexpert.bench.machine import this_machine
from flexpert.bench.statistics import SpreadUs
from flexpert.comm import BufferSpec, make_buffer
from flexpert.errors import FlexpertError
from flexpert.kernels.cuda.device_experts import SlotAddresses
from flexpert.kernels.experts import ExpertWeights
from flexpert.kernels.kernel_set import open_gpu
from flexpert.moe.cuda.exchanged_experts import ExchangedExperts
from flexpert.moe.cuda.local_experts import LocalExperts
from flexpert.moe.moe_layers import LayerState
from flexpert.moe.placement import replan
from flexpert.moe.runtime import expert_tables

Ours = LocalExperts | ExchangedExperts

EXCHANGE_S = 60.0


def run_layer(
    shapes: Sequence[LayerShape],
    tokens: Sequence[int],
    baselines: Sequence[str],
    *,
    ranks: Sequence[int] = (1,),
    repeat: int,
    quantise: bool,
    seed: int,
    note: Callable[[str], None],
) -> LayerReport:
    """Check and time all baselines on one rank, and flexpert on several.

    Args:
        tokens: of each rank.
        quantise: flexpert's experts are fp8.

    Raises:
        ConfigError: no GPU.
        FlexpertError: one of several ranks failed, or took too long.
    """
    device = open_gpu()
    torch.manual_seed(seed)
    note("measuring the GPU")
    gpu = measure_gpu(device)
    points = []
    for shape in shapes:
        for count in ranks:
            if count == 1:
                note(f"{shape.name}: weights")
                weights = LayerWeights.drawn(shape, device, seed=seed, quantise=quantise)
                layer = Layer.build(weights)
                for each in tokens:
                    points.append(layer.point(each, baselines, gpu, repeat=repeat, note=note))
                del layer, weights
                torch.cuda.empty_cache()
                continue
            plan = LayerGroupPlan(shape, list(tokens), count, repeat, quantise, seed)
            points += run_layer_group(plan, gpu, note)
    return LayerReport(machine=this_machine(), gpu=gpu, points=points)


@dataclass(frozen=True, slots=True)
class Layer:
    """One rank's, and both of flexpert's ways to compute it.

    up, down: of all experts, fused, as transformers has them. experts: as flexpert computes
    with them.
    """

    weights: LayerWeights
    up: Tensor
    down: Tensor
    experts: list[ExpertWeights]
    local: LocalExperts

    @classmethod
    def build(cls, weights: LayerWeights) -> Layer:
        """All experts of the layer."""
        shape, device = weights.shape, weights.router.device
        up, down = weights.empty(shape.experts)
        experts = [weights.draw(e, ExpertWeights(up[e], down[e])) for e in range(shape.experts)]
        local = LocalExperts(0, 1, shape.experts, experts[0].shape, device)
        layer = cls(weights, up, down, experts, local)
        local.install(local.stage(layer.states()))
        return layer

    @property
    def shape(self) -> LayerShape:
        return self.weights.shape

    def states(self) -> list[LayerState[SlotAddresses]]:
        """All experts on rank 0."""
        table = expert_tables(replan(None, [0], experts=self.shape.experts, layers=1), 0)[0]
        return [LayerState(table, SlotAddresses.of(self.experts))]

    @contextlib.contextmanager
    def exchanged(self, tokens: int) -> Iterator[ExchangedExperts]:
        """The layer of one of two ranks, of which the other has not come yet."""
        shape, device = self.shape, self.up.device
        spec = BufferSpec(2, tokens, shape.hidden, shape.topk, self.up.dtype)
        with contextlib.closing(make_buffer(0, spec, backend="cuda")) as buffer:
            buffer.connect({0: buffer.address})
            moe = ExchangedExperts(buffer, 1, shape.experts, self.experts[0].shape, device)
            moe.install(moe.stage(self.states()))
            buffer.set_active([0], 1)
            buffer.post_vote(b"")
            buffer.collect_votes(EXCHANGE_S)
            moe.expect(tokens)
            yield moe
            buffer.check()

    def point(
        self,
        tokens: int,
        baselines: Sequence[str],
        gpu: MeasuredGpu,
        *,
        repeat: int,
        note: Callable[[str], None],
    ) -> LayerPoint:
        shape = self.shape
        device = self.up.device
        xs = [
            torch.empty(1, tokens, shape.hidden, dtype=self.up.dtype, device=device)
            for _ in range(INPUTS)
        ]
        flush = flusher(device)

        def fresh() -> None:
            for x in xs:
                x.normal_()
            flush()

        fresh()
        self.local.expect(tokens)
        active = sum(int(self.weights.chosen(x[0]).sum()) for x in xs) / INPUTS
        results: dict[str, LayerResult] = {}
        with torch.inference_mode(), self.exchanged(tokens) as exchanged:
            ours: dict[str, Ours] = {OURS: self.local, EXCHANGED: exchanged}
            for name in (*ours, *baselines):
                note(f"{shape.name}, {tokens} tokens: {name}")
                results[name] = self._result(name, ours.get(name), xs, fresh, repeat)
        own = results[OURS].us
        return LayerPoint(
            shape=shape,
            tokens=tokens,
            active=active,
            roofline_us=shape.roofline_s(gpu, tokens, active, self.experts[0].nbytes) * 1e6,
            results=[
                result
                if result.us is None or own is None
                else msgspec.structs.replace(result, times_ours=result.us.p50 / own.p50)
                for result in results.values()
            ],
            quantised=self.experts[0].gate_up_scale is not None,
        )

    def _result(
        self,
        name: str,
        moe: Ours | None,
        xs: list[Tensor],
        fresh: Launch,
        repeat: int,
    ) -> LayerResult:
        block = self.block(name, moe, xs[0].shape[1])
        error = max(self.error(block(x)[0], x[0]) for x in xs[:2])
        if not error < TOLERANCE:
            return LayerResult(
                baseline=name,
                error=error,
                wrong=True,
                skipped=f"differs from float64 by {error:.3g}",
            )
        launches: list[Launch] = [lambda x=x: block(x) for x in xs]  # type: ignore[misc]
        try:
            if name == "eager":
                for launch in launches:
                    launch()
                times = timed_us(launches, repeat=max(3, repeat // 10), before=fresh, parts=len(xs))
            else:
                times = replay_us(launches, repeat=repeat, before=fresh)
        except (FlexpertError, torch.OutOfMemoryError) as problem:
            return LayerResult(baseline=name, error=error, skipped=str(problem).splitlines()[0])
        return LayerResult(baseline=name, us=SpreadUs.of(times), error=error)

    def block(self, name: str, moe: Ours | None, tokens: int) -> Qwen3MoeSparseMoeBlock:
        """transformers' module, its experts computed by `moe` or by its own ways' `name`."""
        if moe is not None:
            return self.weights.block(moe, tokens)
        return self.weights.baseline(name, self.up, self.down)

    def error(self, y: Tensor, x: Tensor) -> float:
        """Of the first tokens, relative to float64."""
        return self.weights.error(y, x, lambda e: ExpertWeights(self.up[e], self.down[e]))
