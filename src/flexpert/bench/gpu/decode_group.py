"""Several ranks of a measured decode step, each in a process of its own.

They are dealt out to the GPUs of the machine in turn; with fewer GPUs than ranks they share.
"""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

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
from flexpert.bench.gpu.gpu_device import set_rank_device
from flexpert.bench.gpu.model import RandomModel
from flexpert.bench.processes import forks
from flexpert.bench.processes.connection import Closed, StreamConnection
from flexpert.comm import Buffer, BufferSpec, make_buffer
from flexpert.comm.interpreter import INTERPRETED
from flexpert.errors import FlexpertError
from flexpert.models.source import ModelInfo
from flexpert.moe.cuda.exchanged_experts import ExchangedExperts
from flexpert.moe.placement import Placement, replan

T = TypeVar("T")

LIMIT_S = 600.0  # until a rank has built, captured or measured
EXCHANGE_S = 60.0


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
    with _processes(plan) as ranks:
        note(f"{plan.ranks} ranks build the model")
        addresses = dict(enumerate(_answers(ranks, bytes)))
        _tell(ranks, addresses)
        note(f"{plan.ranks} ranks capture graphs")
        captured = _answers(ranks, Captured)
        note(f"{plan.ranks} ranks are checked")
        checked = _answers(ranks, Checked)[0]
        logits = torch.frombuffer(bytearray(checked.logits), dtype=torch.float32)
        active, times = [], []
        for batch in plan.batches:
            note(f"{plan.ranks} ranks, batch {batch}")
            found = _answers(ranks, Timed)
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


class GroupAnswer(msgspec.Struct, frozen=True):
    """value: msgpack of the next thing that a rank has to say; why: that it failed instead."""

    value: bytes = b""
    why: str = ""


_encode = msgspec.msgpack.encode


@contextlib.contextmanager
def _processes(plan: GroupPlan) -> Iterator[list[forks.Process]]:
    ranks: list[forks.Process] = []
    try:
        for rank in range(plan.ranks):
            process = forks.start(f"{__name__}:serve")
            ranks.append(process)
            with contextlib.suppress(Closed):  # the answer says why
                process.connection.send(_encode(BeginGroup.of(rank, plan)))
        yield ranks
        deadline = time.monotonic() + LIMIT_S
        for process in ranks:
            process.join(max(0.0, deadline - time.monotonic()))
    finally:
        for process in ranks:
            process.end()


def _tell(ranks: Sequence[forks.Process], what: object) -> None:
    for process in ranks:
        with contextlib.suppress(Closed):  # the answer says why
            process.connection.send(_encode(what))


def _answers(ranks: Sequence[forks.Process], kind: type[T]) -> list[T]:
    found = []
    for rank, process in enumerate(ranks):
        try:
            packet = process.connection.receive(LIMIT_S)
        except TimeoutError:
            raise FlexpertError(
                f"rank {rank} of the bench did not answer in {LIMIT_S:g} s"
            ) from None
        except Closed:
            process.join(1.0)
            raise FlexpertError(
                f"rank {rank} of the bench ended (exit status {process.exitcode})"
            ) from None
        answer = msgspec.msgpack.decode(packet, type=GroupAnswer)
        if answer.why:
            raise FlexpertError(f"rank {rank} of the bench: {answer.why}")
        found.append(msgspec.msgpack.decode(answer.value, type=kind))
    return found


def serve(end: socket.socket) -> None:
    """A rank's process."""
    connection = StreamConnection(end)
    with contextlib.suppress(Closed), torch.inference_mode():
        begin = msgspec.msgpack.decode(connection.receive(), type=BeginGroup)
        try:
            _measure(begin.rank, begin.plan(), connection)
        except Closed:
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is, the parent says it
            first = (str(error).splitlines() or [""])[0]
            connection.send(_encode(GroupAnswer(why=f"{type(error).__name__}: {first}")))


def _say(connection: StreamConnection, what: object) -> None:
    connection.send(_encode(GroupAnswer(_encode(what))))


def _measure(rank: int, plan: GroupPlan, connection: StreamConnection) -> None:
    device = torch.device("cpu") if INTERPRETED else set_rank_device(rank)
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
    buffer = make_buffer(rank, spec, backend="cuda", timeout_s=EXCHANGE_S)
    try:
        _say(connection, buffer.address)
        buffer.connect(msgspec.msgpack.decode(connection.receive(), type=dict[int, bytes]))
        moe = ExchangedExperts(buffer, info.moe_layers, info.experts, model.expert_shape, device)
        longest = plan.context + plan.steps + WARM_UP + 1
        ours = DecodeRank(model, moe, shares, longest, settle=buffer.check)
        buffer.set_active(range(plan.ranks), 1)
        _meet(buffer)
        _say(connection, Captured(ours.graphs.captures, ours.capture_s))
        prompts = check_prompts(info.vocab, plan.seed, plan.check_tokens)
        if rank == 0:
            logits = ours.logits(prompts).float().cpu()
            _say(connection, Checked(len(logits), logits.numpy().tobytes()))
        else:
            ours.idle(steps=2)
            _say(connection, Checked())
        for share in shares:
            _meet(buffer)
            which: list[list[bool]] = ours.active(share, plan.context).tolist()
            _say(connection, Timed(which, ours.times_us(share, plan.context, plan.steps)))
        _meet(buffer)
    finally:
        buffer.close()


def _meet(buffer: Buffer) -> None:
    """All ranks have come here."""
    buffer.post_vote(b"")
    buffer.collect_votes(LIMIT_S)
