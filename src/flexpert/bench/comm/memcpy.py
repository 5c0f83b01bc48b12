"""The lower bound: the bytes that must move, copied into the receivers' memory, nothing else."""

from __future__ import annotations

import ctypes
import mmap
import os

import torch

from flexpert.bench.comm.baseline import Site
from flexpert.bench.comm.workload import deduplicated_rows


class Memcpy:
    """Every rank copies from private memory to shared memory of each other rank, one piece each."""

    def __init__(self, site: Site) -> None:
        work = site.work
        self._site = site
        self._piece = work.tokens * work.row_bytes
        size = 2 * work.ranks * self._piece  # a place for each sender, there and back
        descriptor = os.memfd_create("flexpert-bench-comm")
        opened = [descriptor]
        try:
            os.ftruncate(descriptor, size)
            self._maps: list[mmap.mmap] = []
            for pid, theirs in site.gather((os.getpid(), descriptor)):
                if pid != os.getpid():
                    theirs = os.open(f"/proc/{pid}/fd/{theirs}", os.O_RDWR)
                    opened.append(theirs)
                self._maps.append(mmap.mmap(theirs, size))
            site.gather(None)  # until then the others may still have to open ours
        finally:
            for number in opened:
                os.close(number)
        self._views = [ctypes.c_char.from_buffer(area) for area in self._maps]
        self._at = [ctypes.addressof(view) for view in self._views]
        rows = [deduplicated_rows(work, site.rank, turn).tolist() for turn in range(work.pool)]
        everyone = site.gather(rows)
        self._there = [[n * work.row_bytes for n in row] for row in rows]
        self._back = [
            [theirs[turn][site.rank] * work.row_bytes for theirs in everyone]
            for turn in range(work.pool)
        ]
        self._results = torch.ones(work.ranks * self._piece, dtype=torch.uint8)
        self._turn = 0

    def dispatch(self, turn: int) -> None:
        self._turn = turn % self._site.work.pool
        source = self._site.input(turn).x.data_ptr()
        place = self._site.rank * self._piece
        for at, size in zip(self._at, self._there[self._turn], strict=True):
            ctypes.memmove(at + place, source, size)

    def combine(self) -> torch.Tensor:
        source = self._results.data_ptr()
        place = (self._site.work.ranks + self._site.rank) * self._piece
        for at, size in zip(self._at, self._back[self._turn], strict=True):
            ctypes.memmove(at + place, source, size)
            source += self._piece
        return self._results

    def rows(self) -> torch.Tensor:
        return self._results[:0]

    def y_room(self) -> torch.Tensor:
        return self._results[:0]

    def close(self) -> None:
        self._views.clear()
        for area in self._maps:
            area.close()
