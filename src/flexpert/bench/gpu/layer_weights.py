"""Random weights of a MoE layer: what every way to compute it has, and what its result should be.

They depend on a seed and the number of an expert alone, so each rank draws its own, and any rank
can draw another's to see what its tokens should give.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import msgspec
import torch
from torch import Tensor
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from flexpert.bench.gpu.gpu_device import MeasuredGpu
from flexpert.bench.gpu.model import quantised_with
from flexpert.kernels.experts import ExpertWeights
from flexpert.models import registrations
from flexpert.models.model_runner import RoutedExperts
from flexpert.moe.cuda.exchanged_experts import ExchangedExperts
from flexpert.moe.cuda.local_experts import LocalExperts

CHECKED = 4  # tokens compared with float64
TOLERANCE = 1e-2  # ‖out − ref‖ / ‖ref‖, where bf16 rounds the intermediate once


class LayerShape(msgspec.Struct, frozen=True):
    """Of a MoE layer."""

    name: str
    hidden: int
    inter: int
    experts: int
    topk: int

    def roofline_s(self, gpu: MeasuredGpu, tokens: int, active: float, expert_nbytes: int) -> float:
        """Weights of the experts that are used, the router's, and tokens in and out, once each.

        Args:
            tokens: whose rows one GPU computes, in bf16 as the router.
            active: experts of that GPU that get any.
            expert_nbytes: of one as it is computed with.
        """
        nbytes = active * expert_nbytes + 2 * self.hidden * (self.experts + 2 * tokens)
        elements = 3 * self.inter * self.hidden * self.topk + self.experts * self.hidden
        return gpu.roofline_s(nbytes, 2.0 * tokens * elements)


SHAPES = {
    "qwen3-30b-a3b": LayerShape("qwen3-30b-a3b", 2048, 768, 128, 8),
    "deepseek-v3": LayerShape("deepseek-v3", 7168, 2048, 256, 8),
}


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """They keep the size of what passes through them.

    router: [experts, hidden]. quantise: flexpert's experts are fp8.
    """

    shape: LayerShape
    router: Tensor
    seed: int
    quantise: bool

    @classmethod
    def drawn(
        cls,
        shape: LayerShape,
        device: torch.device,
        *,
        seed: int,
        quantise: bool,
        dtype: torch.dtype = torch.bfloat16,
    ) -> LayerWeights:
        router = torch.empty(shape.experts, shape.hidden, dtype=dtype, device=device)
        _draw(router, f"{seed}/router")
        return cls(shape, router, seed, quantise)

    def empty(self, *experts: int) -> tuple[Tensor, Tensor]:
        """Room for the gate and up, and for the down weights of so many experts, or of one."""
        shape = self.shape
        return (
            self.router.new_empty(*experts, 2 * shape.inter, shape.hidden),
            self.router.new_empty(*experts, shape.hidden, shape.inter),
        )

    def draw(self, expert: int, whole: ExpertWeights) -> ExpertWeights:
        """Draw an expert into `whole`; what flexpert computes with, which is that or its fp8."""
        _draw(whole.gate_up, f"{self.seed}/{expert}/up")
        _draw(whole.down, f"{self.seed}/{expert}/down")
        return quantised_with(whole) if self.quantise else whole

    def served(self, expert: int) -> ExpertWeights:
        """An expert as flexpert computes with it."""
        return self.draw(expert, ExpertWeights(*self.empty()))

    def restored(self, expert: int) -> ExpertWeights:
        """The same in the dtype of the rows; another rank's, say."""
        whole = ExpertWeights(*self.empty())
        self.draw(expert, whole)
        return whole

    def block(self, moe: LocalExperts | ExchangedExperts, tokens: int) -> Qwen3MoeSparseMoeBlock:
        """transformers' module, whose experts `moe` computes; tokens: of one pass."""
        registrations.register()
        block = self._block(registrations.IMPLEMENTATION)
        block.experts._parameters.clear()
        block.load_state_dict({"gate.weight": self.router}, assign=True)
        routed = RoutedExperts(0, block.experts, moe, self.shape.topk)
        registrations.bind(block.experts, routed)
        routed.rows = tokens
        return block.eval()

    def baseline(self, implementation: str, up: Tensor, down: Tensor) -> Qwen3MoeSparseMoeBlock:
        """transformers' module with its own experts, by the name of their implementation."""
        block = self._block(implementation)
        parameters = {
            "gate.weight": self.router,
            "experts.gate_up_proj": up,
            "experts.down_proj": down,
        }
        block.load_state_dict(parameters, assign=True)
        return block.eval()

    def _block(self, implementation: str) -> Qwen3MoeSparseMoeBlock:
        shape = self.shape
        config = Qwen3MoeConfig(
            hidden_size=shape.hidden,
            moe_intermediate_size=shape.inter,
            num_experts=shape.experts,
            num_experts_per_tok=shape.topk,
            norm_topk_prob=True,
        )
        config._experts_implementation = implementation
        with torch.device("meta"):
            return Qwen3MoeSparseMoeBlock(config)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(expert ids, weights) [tokens, k], by the rule of the module and its rounding.

        x: [tokens, hidden].
        """
        logits = x @ self.router.t()
        weights, ids = logits.float().softmax(-1).topk(self.shape.topk)
        return ids, (weights / weights.sum(-1, keepdim=True)).to(logits.dtype)

    def chosen(self, x: Tensor) -> Tensor:
        """[experts] bool: which get a token of x, [tokens, hidden]."""
        ids, _ = self.route(x)
        return torch.bincount(ids.flatten(), minlength=self.shape.experts) > 0

    def error(self, y: Tensor, x: Tensor, expert: Callable[[int], ExpertWeights]) -> float:
        """Of the first tokens, relative to float64. x, y: [tokens, hidden]."""
        ids, weights = self.route(x)
        found, expected = [], []
        for token in range(min(CHECKED, x.shape[0])):
            total = torch.zeros(self.shape.hidden, dtype=torch.float64, device=x.device)
            for index, weight in zip(ids[token].tolist(), weights[token].double(), strict=True):
                whole = expert(index)
                a, b = (whole.gate_up.double() @ x[token].double()).chunk(2)
                total += weight * (whole.down.double() @ (torch.nn.functional.silu(a) * b))
            expected.append(total)
            found.append(y[token].double())
        difference = torch.stack(found) - torch.stack(expected)
        return float(difference.norm() / torch.stack(expected).norm())


def _draw(tensor: Tensor, name: str) -> None:
    generator = torch.Generator(tensor.device).manual_seed(zlib.crc32(name.encode()))
    tensor.normal_(std=tensor.shape[-1] ** -0.5, generator=generator)
