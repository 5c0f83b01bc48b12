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
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from flexpert.bench.gpu.gpu_device import (
    Launch,
    MeasuredGpu,
    flusher,
    measure_gpu,
    replay_us,
    timed_us,
)
from flexpert.bench.gpu.model import quantised_with
from flexpert.bench.machine import Machine, this_machine
from flexpert.bench.statistics import SpreadUs
from flexpert.comm import BufferSpec, make_buffer
from flexpert.errors import FlexpertError
from flexpert.kernels.cuda.device_experts import SlotAddresses
from flexpert.kernels.experts import ExpertWeights
from flexpert.kernels.kernel_set import open_gpu
from flexpert.models import registrations
from flexpert.models.model_runner import RoutedExperts
from flexpert.moe.cuda.exchanged_experts import ExchangedExperts
from flexpert.moe.cuda.local_experts import LocalExperts
from flexpert.moe.moe_layers import LayerState
from flexpert.moe.placement import replan
from flexpert.moe.runtime import expert_tables

OURS = "flexpert"
EXCHANGED = "flexpert, exchanged"
BASELINE_FAMILIES = ("grouped_mm", "eager")
"""transformers' own: torch's grouped product, and a loop over the experts that waits for the GPU
to tell it which ones."""

Ours = LocalExperts | ExchangedExperts

INPUTS = 4  # different batches in one graph, so that the L2 does not keep one's experts
EXCHANGE_S = 60.0
CHECKED = 4  # tokens compared with float64
TOLERANCE = 1e-2  # ‖out − ref‖ / ‖ref‖, where bf16 rounds the intermediate once


class LayerShape(msgspec.Struct, frozen=True):
    """Of a MoE layer."""

    name: str
    hidden: int
    inter: int
    experts: int
    topk: int


SHAPES = {
    "qwen3-30b-a3b": LayerShape("qwen3-30b-a3b", 2048, 768, 128, 8),
    "deepseek-v3": LayerShape("deepseek-v3", 7168, 2048, 256, 8),
}


class LayerResult(msgspec.Struct, frozen=True, kw_only=True):
    """One baseline at one number of tokens.

    error: relative to float64. times_ours: of the medians. skipped: why there are no figures;
    wrong: it computed something else.
    """

    baseline: str
    us: SpreadUs | None = None
    error: float | None = None
    times_ours: float | None = None
    skipped: str | None = None
    wrong: bool = False


class LayerPoint(msgspec.Struct, frozen=True, kw_only=True):
    """active: experts that get a token, mean. roofline_us: bytes or flops over what the GPU can.
    quantised: flexpert's experts are fp8, and the roofline is theirs; the baselines have bf16."""

    shape: LayerShape
    tokens: int
    active: float
    roofline_us: float
    results: list[LayerResult]
    quantised: bool = False


class LayerReport(msgspec.Struct, frozen=True, kw_only=True):
    machine: Machine
    gpu: MeasuredGpu
    points: list[LayerPoint]

    @property
    def correct(self) -> bool:
        return not any(result.wrong for point in self.points for result in point.results)


def run_layer(
    shapes: Sequence[LayerShape],
    tokens: Sequence[int],
    baselines: Sequence[str],
    *,
    repeat: int,
    quantise: bool,
    seed: int,
    note: Callable[[str], None],
) -> LayerReport:
    """Check and time all baselines.

    quantise: flexpert's experts are fp8.

    Raises: ConfigError: no GPU.
    """
    device = open_gpu()
    torch.manual_seed(seed)
    note("measuring the GPU")
    gpu = measure_gpu(device)
    points = []
    for shape in shapes:
        note(f"{shape.name}: weights")
        layer = Layer.build(shape, device, quantise=quantise)
        for count in tokens:
            points.append(layer.point(count, baselines, gpu, repeat=repeat, note=note))
        del layer
        torch.cuda.empty_cache()
    return LayerReport(machine=this_machine(), gpu=gpu, points=points)


def _distinct(ids: Tensor) -> int:
    return int(torch.bincount(ids.flatten()).count_nonzero())


@dataclass(frozen=True, slots=True)
class Layer:
    """Its weights, and both of flexpert's ways to compute it."""

    shape: LayerShape
    router: Tensor
    up: Tensor
    down: Tensor
    experts: list[ExpertWeights]
    local: LocalExperts

    @classmethod
    def build(
        cls,
        shape: LayerShape,
        device: torch.device,
        *,
        quantise: bool,
        dtype: torch.dtype = torch.bfloat16,
    ) -> Layer:
        """Random weights that keep the size of what passes through them."""

        def weights(*size: int) -> Tensor:
            tensor = torch.empty(size, dtype=dtype, device=device)
            for part in tensor if tensor.ndim == 3 else [tensor]:
                part.normal_(std=size[-1] ** -0.5)
            return tensor

        up = weights(shape.experts, 2 * shape.inter, shape.hidden)
        down = weights(shape.experts, shape.hidden, shape.inter)
        experts = [ExpertWeights(up[e], down[e]) for e in range(shape.experts)]
        if quantise:
            experts = [quantised_with(whole) for whole in experts]
        local = LocalExperts(0, 1, shape.experts, experts[0].shape, device)
        layer = cls(shape, weights(shape.experts, shape.hidden), up, down, experts, local)
        local.install(local.stage(layer.states()))
        return layer

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
        active = sum(_distinct(self._route(x)[0]) for x in xs) / INPUTS
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
            roofline_us=self._roofline_s(gpu, tokens, active) * 1e6,
            results=[
                result
                if result.us is None or own is None
                else msgspec.structs.replace(result, times_ours=result.us.p50 / own.p50)
                for result in results.values()
            ],
            quantised=self.experts[0].gate_up_scale is not None,
        )

    def _roofline_s(self, gpu: MeasuredGpu, tokens: int, active: float) -> float:
        """Weights of the experts that are used, the router's, and tokens in and out, once each."""
        nbytes = active * self.experts[0].nbytes + self.router.nbytes
        nbytes += 2 * tokens * self.shape.hidden * self.up.element_size()
        elements = self.up[0].numel() + self.down[0].numel()
        flops = 2.0 * tokens * self.shape.topk * elements + 2.0 * tokens * self.router.numel()
        return gpu.roofline_s(nbytes, flops)

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
        shape = self.shape
        config = Qwen3MoeConfig(
            hidden_size=shape.hidden,
            moe_intermediate_size=shape.inter,
            num_experts=shape.experts,
            num_experts_per_tok=shape.topk,
            norm_topk_prob=True,
        )
        registrations.register()
        config._experts_implementation = name if moe is None else registrations.IMPLEMENTATION
        with torch.device("meta"):
            block = Qwen3MoeSparseMoeBlock(config)
        parameters = {
            "gate.weight": self.router,
            "experts.gate_up_proj": self.up,
            "experts.down_proj": self.down,
        }
        block.load_state_dict(parameters, assign=True)
        if moe is not None:
            routed = RoutedExperts(0, block.experts, moe, shape.topk)
            registrations.bind(block.experts, routed)
            routed.rows = tokens
        return block.eval()

    def _route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(expert ids, weights) [tokens, k], by the rule of the module and its rounding."""
        logits = x[0] @ self.router.t()
        weights, ids = logits.float().softmax(-1).topk(self.shape.topk)
        return ids, (weights / weights.sum(-1, keepdim=True)).to(logits.dtype)

    def error(self, y: Tensor, x: Tensor) -> float:
        """Of the first tokens, relative to float64."""
        ids, weights = self._route(x[None])
        found, expected = [], []
        for token in range(min(CHECKED, x.shape[0])):
            total = torch.zeros(self.shape.hidden, dtype=torch.float64, device=x.device)
            for expert, weight in zip(ids[token].tolist(), weights[token].double(), strict=True):
                a, b = (self.up[expert].double() @ x[token].double()).chunk(2)
                h = torch.nn.functional.silu(a) * b
                total += weight * (self.down[expert].double() @ h)
            expected.append(total)
            found.append(y[token].double())
        difference = torch.stack(found) - torch.stack(expected)
        return float(difference.norm() / torch.stack(expected).norm())
