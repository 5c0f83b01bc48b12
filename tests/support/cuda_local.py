"""Several ranks' GPU exchanges in one process: phase by phase.

In Triton's interpreter, or on a GPU in one stream, which compute-sanitizer can look at. Either runs
one kernel after another, and the interpreter also one program after another, so that each phase of
all ranks must be over before any of them waits: first all send, then all wait.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before any kernel is defined
pytest.importorskip("triton", reason="Triton is not installed: pip install flexpert[cuda]")

from flexpert.comm import BufferSpec, ExpertTable
from flexpert.comm.buffer import Reduce, Scales
from flexpert.comm.cuda.cuda_exchange import FEW, CudaDispatched, CudaExchange, CudaIndexed, Tuning
from flexpert.comm.cuda.cuda_layout import PAGE_WORDS, layout, tag
from flexpert.comm.interpreter import INTERPRETED as INTERPRETED
from flexpert.comm.routing import Sent

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LIMIT_NS = 200_000_000  # the interpreter counts looks instead


class CudaLocal:
    """Exchanges by id; the windows of all lie in this process."""

    def __init__(
        self,
        spec: BufferSpec,
        ids: Iterable[int],
        *,
        same_k: bool = False,
        choices: int | None = None,
        tuning: Tuning = FEW,
    ) -> None:
        self.spec, self.same_k = spec, same_k
        self.ranks: dict[int, CudaExchange] = {}
        for rank in ids:
            size = layout(spec, choices=choices).size
            window = torch.zeros(size, dtype=torch.uint8, device=DEVICE)
            page = torch.zeros(PAGE_WORDS, dtype=torch.int64, pin_memory=DEVICE == "cuda")
            self.ranks[rank] = CudaExchange(
                rank, spec, window, page, choices=choices, same_k=same_k, tuning=tuning
            )
        self.epoch = 0

    @property
    def addresses(self) -> dict[int, int]:
        return {rank: e.window.data_ptr() for rank, e in self.ranks.items()}

    def activate(self, ids: Iterable[int]) -> None:
        """A new epoch for these ids."""
        self.epoch += 1
        chosen = tuple(ids)
        for rank in chosen:
            self.ranks[rank].configure(
                self.addresses, dict.fromkeys(chosen, tag(self.epoch, 0)), limit_ns=LIMIT_NS
            )

    def dispatch(
        self, sent: dict[int, Sent], fp8: Scales | None = None
    ) -> dict[int, CudaDispatched]:
        done = {
            rank: self.ranks[rank].send_dispatch(*parts(s), fp8=fp8, wait=False)
            for rank, s in sent.items()
        }
        for rank, handle in done.items():
            self.ranks[rank].wait_dispatch(handle)
            self.ranks[rank].index(handle)
        return done

    def combine(
        self, y: dict[int, torch.Tensor], done: dict[int, CudaDispatched], reduce: Reduce
    ) -> dict[int, torch.Tensor]:
        y = {rank: rows.to(DEVICE) for rank, rows in y.items()}
        out = {
            rank: torch.full(
                (handle.tokens, self.spec.hidden), float("nan"), dtype=self.spec.dtype
            ).to(DEVICE)
            for rank, handle in done.items()
        }
        for rank, handle in done.items():
            self.ranks[rank].send_combine(out[rank], y[rank], handle, reduce=reduce, wait=False)
        for rank, handle in done.items():
            self.ranks[rank].wait_combine()
            self.ranks[rank].reduce(out[rank], y[rank], handle, reduce=reduce)
        return {rank: sums.cpu() for rank, sums in out.items()}


def parts(s: Sent) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, ExpertTable]:
    """The arguments of a dispatch."""
    table = ExpertTable(s.table.rank.to(DEVICE), s.table.slot.to(DEVICE), s.table.slots)
    return s.x.to(DEVICE), s.expert_ids.contiguous().to(DEVICE), s.weights.to(DEVICE), table


def gathered(indexed: CudaIndexed) -> torch.Tensor:
    """[rows, n]: the rows of a dispatch, copied together, in the host's memory."""
    return indexed.payload[indexed.rows[: int(indexed.offsets[-1])].long()].cpu()
