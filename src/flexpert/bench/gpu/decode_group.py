"""Several ranks of a measured decode step, each in a process of its own, on one GPU."""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from flexpert.bench.gpu.decode_rank import (
    CHECK_PROMPTS,
    CHECK_TOKENS,
    WARM_UP,
    DecodeRank,
    check_prompts,
)
from flexpert.bench.gpu.model import RandomModel
from flexpert.comm import Buffer, BufferSpec, make_buffer
from flexpert.comm.interpreter import INTERPRETED
from flexpert.errors import FlexpertError
from flexpert.models.source import ModelInfo
from flexpert.moe.cuda.exchanged import ExchangedExperts
from flexpert.moe.placement import Placement, replan

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
        addresses = dict(enumerate(_answers(ranks)))
        _ask(ranks, addresses)
        note(f"{plan.ranks} ranks capture graphs")
        captured = _answers(ranks)
        note(f"{plan.ranks} ranks are checked")
        logits = torch.from_numpy(_answers(ranks)[0])
        active, times = [], []
        for batch in plan.batches:
            note(f"{plan.ranks} ranks, batch {batch}")
            found = _answers(ranks)
            used = torch.stack([torch.from_numpy(which) for which, _ in found]).any(0)
            active.append(float(used.sum(1).float().mean()))
            times.append([max(step) for step in zip(*(t for _, t in found), strict=True)])
        return GroupResult(
            logits, active, times, captured[0][0], max(seconds for _, seconds in captured)
        )


Rank = tuple[BaseProcess, Connection]


@contextlib.contextmanager
def _processes(plan: GroupPlan) -> Iterator[list[Rank]]:
    context = multiprocessing.get_context("spawn")
    ranks: list[Rank] = []
    try:
        for rank in range(plan.ranks):
            ours, theirs = context.Pipe()
            process: BaseProcess = context.Process(
                target=_serve, args=(rank, plan, theirs), daemon=True
            )
            process.start()
            theirs.close()
            ranks.append((process, ours))
        yield ranks
        for done, _ in ranks:
            done.join(LIMIT_S)
    finally:
        for ended, pipe in ranks:
            ended.kill()
            ended.join()
            pipe.close()


def _ask(ranks: Sequence[Rank], what: object) -> None:
    for _, pipe in ranks:
        pipe.send(what)


def _answers(ranks: Sequence[Rank]) -> list[Any]:
    found = []
    for rank, (process, pipe) in enumerate(ranks):
        try:
            if not pipe.poll(LIMIT_S):
                raise FlexpertError(f"rank {rank} of the bench did not answer in {LIMIT_S:g} s")
            answer = pipe.recv()
        except (EOFError, ConnectionError):
            process.join(1.0)
            raise FlexpertError(
                f"rank {rank} of the bench ended (exit status {process.exitcode})"
            ) from None
        if isinstance(answer, _Failure):
            raise FlexpertError(f"rank {rank} of the bench: {answer.why}")
        found.append(answer)
    return found


@dataclass(frozen=True, slots=True)
class _Failure:
    why: str


def _serve(rank: int, plan: GroupPlan, pipe: Connection) -> None:
    """A rank's process."""
    with torch.inference_mode():
        try:
            _measure(rank, plan, pipe)
        except Exception as error:  # noqa: BLE001 - whatever it is, the parent says it
            first = (str(error).splitlines() or [""])[0]
            pipe.send(_Failure(f"{type(error).__name__}: {first}"))


def _measure(rank: int, plan: GroupPlan, pipe: Connection) -> None:
    device = torch.device("cpu") if INTERPRETED else torch.device("cuda", 0)
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
        pipe.send(buffer.address)
        buffer.connect(pipe.recv())
        moe = ExchangedExperts(buffer, info.moe_layers, info.experts, model.expert_shape, device)
        longest = plan.context + plan.steps + WARM_UP + 1
        ours = DecodeRank(model, moe, shares, longest, settle=buffer.check)
        buffer.set_active(range(plan.ranks), 1)
        _meet(buffer)
        pipe.send((ours.graphs.captures, ours.capture_s))
        prompts = check_prompts(info.vocab, plan.seed, plan.check_tokens)
        if rank == 0:
            # arrays: a tensor would be shared, and its memory go with this process
            pipe.send(ours.logits(prompts).float().cpu().numpy())
        else:
            ours.idle(steps=2)
            pipe.send(None)
        for share in shares:
            _meet(buffer)
            which = ours.active(share, plan.context).numpy()
            pipe.send((which, ours.times_us(share, plan.context, plan.steps)))
        _meet(buffer)
    finally:
        buffer.close()


def _meet(buffer: Buffer) -> None:
    """All ranks have come here."""
    buffer.post_vote(b"")
    buffer.collect_votes(LIMIT_S)
