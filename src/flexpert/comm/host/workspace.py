"""Memory that every exchange uses again."""

from __future__ import annotations

import torch


class Workspaces:
    def __init__(self) -> None:
        self._rooms: dict[str, torch.Tensor] = {}

    def room(self, rows: int, row_bytes: int, name: str) -> torch.Tensor:
        """uint8 [rows, row_bytes], the same memory each time that `name` is asked for."""
        size = rows * row_bytes
        if name not in self._rooms or self._rooms[name].shape[0] < size:
            self._rooms[name] = torch.empty(size + size // 2, dtype=torch.uint8)
        return self._rooms[name][:size].view(rows, row_bytes)
