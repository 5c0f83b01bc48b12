"""What a dispatch brought, on the host: rows stay where they arrived until somebody wants them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch

from flexpert.comm import quant
from flexpert.comm.buffer import BufferSpec, Received, Scales
from flexpert.comm.errors import StaleEpoch
from flexpert.comm.host._kernels import lib
from flexpert.comm.host.core import Core


class Workspaces:
    """Memory that every exchange uses again."""

    def __init__(self) -> None:
        self._rooms: dict[str, torch.Tensor] = {}

    def room(self, rows: int, row_bytes: int, name: str) -> torch.Tensor:
        """uint8 [rows, row_bytes], the same memory each time that `name` is asked for."""
        size = rows * row_bytes
        if name not in self._rooms or self._rooms[name].shape[0] < size:
            self._rooms[name] = torch.empty(size + size // 2, dtype=torch.uint8, device="cpu")
        return self._rooms[name][:size].view(rows, row_bytes)


class RowKind(IntEnum):
    """How a payload is to be read; both sides must mean the same."""

    ROWS = 0  # spec.dtype
    FP8_FLOAT32 = 1
    FP8_POWER2 = 2
    FP8_UE8M0 = 3
    BYTES = 4


_FP8: dict[Scales, RowKind] = {
    "float32": RowKind.FP8_FLOAT32,
    "power2": RowKind.FP8_POWER2,
    "ue8m0": RowKind.FP8_UE8M0,
}


@dataclass(frozen=True, slots=True)
class Payload:
    """One token's bytes on the wire: `bytes` of values, then `scale_bytes`."""

    kind: RowKind
    value_bytes: int
    scale_bytes: int = 0

    @property
    def bytes(self) -> int:
        return self.value_bytes + self.scale_bytes


def payload_of(spec: BufferSpec, x: torch.Tensor, fp8: Scales | None) -> Payload:
    """Raises: ValueError: fp8 of bytes, or of a hidden size that has no whole blocks."""
    if x.dtype is torch.uint8:
        if fp8 is not None:
            raise ValueError(f"x is bytes already; fp8={fp8!r} takes {spec.dtype}")
        return Payload(RowKind.BYTES, x.shape[1])
    if fp8 is None:
        return Payload(RowKind.ROWS, spec.hidden * spec.dtype.itemsize)
    quant.check(spec.hidden, fp8)
    return Payload(_FP8[fp8], spec.hidden, quant.row_bytes(spec.hidden, fp8) - spec.hidden)


class HostReceived(Received):
    """See `Received`. Rows are copied together on first use of `x`, before combine begins."""

    def __init__(
        self,
        core: Core,  # after fx_receive
        workspaces: Workspaces,
        payload: Payload,
        offsets: torch.Tensor,
        pairs: int,
        wire: torch.Tensor,
        choices: int,
        masked: tuple[int, ...],
    ) -> None:
        self.offsets = offsets
        self.weights = torch.empty(pairs, dtype=torch.float32, device="cpu")
        self.source = torch.empty(pairs, dtype=torch.int32, device="cpu")
        self.token = torch.empty(pairs, dtype=torch.int32, device="cpu")
        self.tokens_sent = wire.shape[0]
        self.choices = choices  # k of expert_ids
        self.masked = masked
        self.epoch = core.epoch
        self.sequence = core.sequence
        self._rows = torch.empty(pairs, dtype=torch.int64, device="cpu")
        self._core = core
        self._rooms = workspaces
        self._payload = payload
        self._wire = wire  # own rows are read where they are
        self._x: torch.Tensor | None = None
        self._scales: torch.Tensor | None = None
        lib.fx_index(
            core.b,
            self.weights.data_ptr(),
            self.source.data_ptr(),
            self.token.data_ptr(),
            self._rows.data_ptr(),
        )

    @property
    def rows(self) -> torch.Tensor:
        self._check()
        return self._rows

    @property
    def x(self) -> torch.Tensor:
        if self._x is None:
            self._check()
            raw = self._rooms.room(self._rows.shape[0], self._payload.value_bytes, "x")
            self._gather(0, raw)
            kind = self._payload.kind
            if kind is RowKind.ROWS:
                self._x = raw.view(self._core.spec.dtype)
            else:
                self._x = raw if kind is RowKind.BYTES else raw.view(torch.float8_e4m3fn)
        return self._x

    @property
    def scales(self) -> torch.Tensor | None:
        if self._scales is None and self._payload.scale_bytes:
            self._check()
            raw = torch.empty(
                (self._rows.shape[0], self._payload.scale_bytes), dtype=torch.uint8, device="cpu"
            )
            self._gather(self._payload.value_bytes, raw)
            packed = self._payload.kind is RowKind.FP8_UE8M0
            self._scales = raw.view(torch.int32 if packed else torch.float32)
        return self._scales

    def _gather(self, offset: int, out: torch.Tensor) -> None:
        count, size = out.shape
        lib.fx_gather(self._rows.data_ptr(), count, offset, size, out.data_ptr())

    def _check(self) -> None:
        """Rows lie where peers write the next dispatch once they have this rank's combine."""
        if not self._core.holds(self):
            raise StaleEpoch(
                f"the rows of dispatch {self.sequence} (epoch {self.epoch}) were not copied "
                "before combine began: use x before"
            )
