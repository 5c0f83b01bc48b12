"""Several ranks of a measured decode step, each in a process of its own."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec
import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from flexpert.bench.gpu.decode_rank import (
    CHECK_PROMPTS,
    CHECK_TOKENS,
    WARM_UP,
    DecodeRank,
    check_prompts,
)
from flexpert.bench.gpu.model import RandomModel
from flexpert.bench.gpu.rank_group import (
    ParentOfRank,
    RankGroup,
    meet,
    open_rank_device,
    serve_rank,
)
from flexpert.comm import BufferSpec
from flexpert.models.source import ModelInfo
from flexpert.moe.cuda.exchanged_experts import ExchangedExperts
from flexpert.moe.placement import Placement, replan


@dataclass(frozen=True, slots=True)
class GroupPlan:
    """What the ranks do. batches: sequences of all ranks together. check_tokens: of a prompt of the
    check. quantise: experts are fp8."""

    config: PreTrainedConfig
    ranks: int
    batches: Sequence[int]
    context: int
    steps: int
    seed: int
    dtype: torch.dtype = torch.bfloat16
    check_tokens: int = CHECK_TOKENS
    quantise: bool = False

    def share(self, batch: int, rank: int) -> int:
        """Sequences of a rank."""
        return batch // self.ranks + (rank < batch % self.ranks)


@dataclass(frozen=True, slots=True)
class GroupResult:
    """logits: [prompts, vocab] of `check_prompts`. active: by batch, experts a layer that get a
    token, mean over the layers. times_us: by batch, of the slowest rank in each step."""

    logits: Tensor
    active: list[float]
    times_us: list[list[float]]
    captures: int
    capture_s: float


def place_on(ranks: int) -> Callable[[ModelInfo], Placement]:
    """Each expert once, dealt out evenly."""
    return lambda info: replan(None, range(ranks), experts=info.experts, layers=info.moe_layers)


def run_group(plan: GroupPlan, note: Callable[[str], None]) -> GroupResult:
    """Start the ranks, measure, end them.

    Raises: FlexpertError: one of them failed, or took too long.
    """
    begins = [BeginGroup.of(rank, plan) for rank in range(plan.ranks)]
    with RankGroup.started(f"{__name__}:serve", begins) as ranks:
        note(f"{plan.ranks} ranks build the model")
        ranks.connect()
        note(f"{plan.ranks} ranks capture graphs")
        captured = ranks.answers(Captured)
        note(f"{plan.ranks} ranks are checked")
        checked = ranks.answers(Checked)[0]
        logits = torch.frombuffer(bytearray(checked.logits), dtype=torch.float32)
        active, times = [], []
        for batch in plan.batches:
            note(f"{plan.ranks} ranks, batch {batch}")
            found = ranks.answers(Timed)
            used = torch.tensor([answer.active for answer in found]).any(0)
            active.append(float(used.sum(1).float().mean()))
            times.append([max(step) for step in zip(*(t.times_us for t in found), strict=True)])
        return GroupResult(
            logits.view(checked.prompts, -1),
            active,
            times,
            captured[0].captures,
            max(answer.seconds for answer in captured),
        )


class BeginGroup(msgspec.Struct, frozen=True):
    """What a rank is told first: itself and the plan, whose config is JSON and dtype a name."""

    rank: int
    config: str
    ranks: int
    batches: list[int]
    context: int
    steps: int
    seed: int
    dtype: str
    check_tokens: int
    quantise: bool

    @classmethod
    def of(cls, rank: int, plan: GroupPlan) -> BeginGroup:
        return cls(
            rank=rank,
            config=json.dumps({**plan.config.to_dict(), "model_type": plan.config.model_type}),
            ranks=plan.ranks,
            batches=list(plan.batches),
            context=plan.context,
            steps=plan.steps,
            seed=plan.seed,
            dtype=str(plan.dtype).removeprefix("torch."),
            check_tokens=plan.check_tokens,
            quantise=plan.quantise,
        )

    def plan(self) -> GroupPlan:
        """Raises: ValueError"""
        dtype = getattr(torch, self.dtype, None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"there is no dtype {self.dtype}")
        return GroupPlan(
            config=AutoConfig.for_model(**json.loads(self.config)),
            ranks=self.ranks,
            batches=self.batches,
            context=self.context,
            steps=self.steps,
            seed=self.seed,
            dtype=dtype,
            check_tokens=self.check_tokens,
            quantise=self.quantise,
        )


class Captured(msgspec.Struct, frozen=True):
    captures: int
    seconds: float


class Checked(msgspec.Struct, frozen=True):
    """logits: float32 of `check_prompts`, of rank 0; nothing of others."""

    prompts: int = 0
    logits: bytes = b""


class Timed(msgspec.Struct, frozen=True):
    """active: [layers, experts], which got a token of this rank's."""

    active: list[list[bool]]
    times_us: list[float]


def serve(end: socket.socket) -> None:
    """A rank's process."""
    serve_rank(end, BeginGroup, lambda begin, parent: _measure(begin.rank, begin.plan(), parent))


def _measure(rank: int, plan: GroupPlan, parent: ParentOfRank) -> None:
    device = open_rank_device(rank)
    torch.manual_seed(plan.seed + rank)
    model = RandomModel.build(
        plan.config,
        device,
        seed=plan.seed,
        dtype=plan.dtype,
        place=place_on(plan.ranks),
        rank=rank,
        quantise=plan.quantise,
        whole=False,
    )
    info = model.info
    shares = [plan.share(batch, rank) for batch in plan.batches]
    most = max(*shares, CHECK_PROMPTS * (plan.check_tokens - 1))
    spec = BufferSpec(plan.ranks, most, info.hidden, info.topk, info.dtype)
    with parent.connected(rank, spec) as buffer:
        moe = ExchangedExperts(buffer, info.moe_layers, info.experts, model.expert_shape, device)
        longest = plan.context + plan.steps + WARM_UP + 1
        ours = DecodeRank(model, moe, shares, longest, settle=buffer.check)
        buffer.set_active(range(plan.ranks), 1)
        meet(buffer)
        parent.say(Captured(ours.graphs.captures, ours.capture_s))
        prompts = check_prompts(info.vocab, plan.seed, plan.check_tokens)
        if rank == 0:
            logits = ours.logits(prompts).float().cpu()
            parent.say(Checked(len(logits), logits.numpy().tobytes()))
        else:
            ours.idle(steps=2)
            parent.say(Checked())
        for share in shares:
            meet(buffer)
            which: list[list[bool]] = ours.active(share, plan.context).tolist()
            parent.say(Timed(which, ours.times_us(share, plan.context, plan.steps)))
        meet(buffer)
