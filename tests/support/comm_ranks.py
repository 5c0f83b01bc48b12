"""Real rank processes for the tests: each owns a buffer and does what the test asks it to.

Children come from a fork server that has imported torch once, so that a rank starts in
milliseconds, as after `spawn` without any state of the test's process.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from flexpert.comm import Buffer, BufferSpec, ExpertTable, make_buffer
from flexpert.comm.routing import Sent

LIMIT_S = 60.0  # of a test's own waits: far above what a busy machine needs

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["torch", "flexpert.comm.host.host_buffer", __name__])


def spec_of(
    capacity: int = 4,
    *,
    max_tokens: int = 16,
    hidden: int = 72,
    topk: int = 4,
    dtype: torch.dtype = torch.bfloat16,
) -> BufferSpec:
    return BufferSpec(capacity, max_tokens, hidden, topk, dtype)


class Rank:
    """One child process and the pipe to it."""

    def __init__(self, rank: int, spec: BufferSpec, port: int = 0, **options: Any) -> None:
        """port: of a TCPStore to meet through; options: of make_buffer."""
        self.rank = rank
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(
            target=serve_rank, args=(rank, spec, port, options, theirs), daemon=True
        )
        self.process.start()
        theirs.close()
        self.address: bytes = self.answer()

    def ask(self, task: Callable[..., Any], *args: Any) -> None:
        self.pipe.send((task, args))

    def answer(self) -> Any:
        if not self.pipe.poll(LIMIT_S):
            raise TimeoutError(f"rank {self.rank} gave no answer in {LIMIT_S} s")
        ok, value = self.pipe.recv()
        if not ok:
            raise value
        return value

    def kill(self) -> None:
        if self.process.pid is not None:
            os.kill(self.process.pid, signal.SIGKILL)
        self.process.join()


class Ranks:
    """A set of rank processes, connected to each other."""

    def __init__(self, spec: BufferSpec, ids: Iterable[int], on_timeout: str = "raise") -> None:
        self.spec = spec
        self.on_timeout = on_timeout
        self.ranks: dict[int, Rank] = {}
        self.join(ids)

    def __enter__(self) -> Ranks:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for rank in self.ranks.values():
            rank.kill()

    def join(self, ids: Iterable[int]) -> None:
        """Start ranks and connect everyone with everyone; nobody becomes active."""
        for rank in ids:
            self.ranks[rank] = Rank(rank, self.spec, on_timeout=self.on_timeout)
        self.all(connect, {rank: r.address for rank, r in self.ranks.items()})

    def leave(self, ids: Iterable[int]) -> None:
        """End ranks; the others disconnect from them."""
        for rank in ids:
            self.ranks.pop(rank).kill()
        self.all(disconnect, tuple(ids))

    def all(self, task: Callable[..., Any], *args: Any) -> dict[int, Any]:
        """Have all ranks do task(buffer, *args) at the same time; returns id → answer."""
        return self.some(self.ranks, task, *args)

    def some(self, ids: Iterable[int], task: Callable[..., Any], *args: Any) -> dict[int, Any]:
        chosen = [self.ranks[rank] for rank in ids]
        for rank in chosen:
            rank.ask(task, *args)
        return {rank.rank: rank.answer() for rank in chosen}

    def activate(self, ids: Iterable[int], epoch: int) -> None:
        self.some(tuple(ids), set_active, tuple(ids), epoch)


def serve_rank(
    rank: int, spec: BufferSpec, port: int, options: dict[str, Any], pipe: Connection
) -> None:
    torch.set_num_threads(1)
    if torch.cuda.is_available():
        torch.cuda.set_device(rank % torch.cuda.device_count())
    if port:
        options["store"] = dist.TCPStore("127.0.0.1", port, is_master=False)
    buffer = make_buffer(rank, spec, **{"timeout_s": LIMIT_S, **options})
    pipe.send((True, buffer.address))
    while True:
        task, args = pipe.recv()
        try:
            answer = (True, task(buffer, *args))
        except Exception as error:  # noqa: BLE001  # goes to the test
            answer = (False, _portable(error))
        pipe.send(answer)


def _portable(error: Exception) -> Exception:
    return AssertionError(f"{type(error).__name__}: {error}")


# ---- tasks ------------------------------------------------------------------------------------


def connect(buffer: Buffer, peers: dict[int, bytes]) -> None:
    buffer.connect(peers)


def disconnect(buffer: Buffer, ids: tuple[int, ...]) -> None:
    buffer.disconnect(ids)


def set_active(buffer: Buffer, ids: tuple[int, ...], epoch: int) -> None:
    buffer.set_active(ids, epoch)


def vote(buffer: Buffer, payload: bytes = b"") -> dict[int, bytes]:
    buffer.post_vote(payload)
    return buffer.collect_votes(LIMIT_S)


# ---- made-up routing --------------------------------------------------------------------------


def random_table(
    ids: tuple[int, ...], experts: int, seed: int, rank: int, *, spare: int = 1
) -> ExpertTable:
    """Experts dealt out at random, the same on all ranks; some slots stay empty."""
    generator = torch.Generator().manual_seed(seed)
    per_rank = -(-experts // len(ids)) + spare
    places = torch.randperm(len(ids) * per_rank, generator=generator)[:experts]
    owner = torch.tensor(ids, dtype=torch.int32)[places // per_rank]
    return ExpertTable(
        owner.contiguous(), (places % per_rank).to(torch.int32), per_rank if rank in ids else 0
    )


def random_sent(
    spec: BufferSpec,
    ids: tuple[int, ...],
    seed: int,
    *,
    experts: int = 10,
    idle: tuple[int, ...] = (),
    table_seed: int | None = None,
    wide: bool = True,
) -> dict[int, Sent]:
    """What every rank sends in one dispatch: random tokens, choices (some -1) and weights."""
    sent: dict[int, Sent] = {}
    for rank in ids:
        generator = torch.Generator().manual_seed(seed * 1000 + rank)
        tokens = int(torch.randint(0, spec.max_tokens + 1, (1,), generator=generator))
        tokens = 0 if rank in idle else tokens
        k = int(torch.randint(1, spec.topk + 1, (1,), generator=generator))
        chosen = torch.randint(-1, experts, (tokens, k), generator=generator)
        sent[rank] = Sent(
            x=torch.randn(tokens, spec.hidden, generator=generator).to(spec.dtype),
            expert_ids=chosen if wide else chosen.to(torch.int32),
            weights=torch.rand(tokens, k, generator=generator),
            table=random_table(ids, experts, seed if table_seed is None else table_seed, rank),
        )
    return sent


def apply_experts(x: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """y: [rows, hidden]: a different multiple for each slot, exact to compute anywhere."""
    slot = torch.repeat_interleave(
        torch.arange(offsets.shape[0] - 1), torch.diff(offsets.to(torch.int64))
    )
    return (x.float() * (1.0 + 0.25 * slot.float()[:, None])).to(x.dtype)
