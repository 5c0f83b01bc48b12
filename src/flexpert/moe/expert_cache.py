"""A copy of the experts in memory of the host, one for all ranks of a host.

A process of its own owns and fills it (`cluster/processes/expert_cache_process.py`). What only a
lost rank held comes from here: as fast as memory is read, already in the layout and precision it is
computed with, whatever has become of the checkpoint's pages since.

It is not page-locked. That would have to be done in each rank: a GPU's steps take twice as long
meanwhile, and the system needs 0.2 s for each GB to end a process that is killed (H200, driver
580). Ranks read it through pieces of page-locked memory that they have anyway (`ExpertUploader`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from flexpert.comm.peer_memory import ImportedPages, export_pages
from flexpert.kernels.experts import ExpertShape, ExpertWeights
from flexpert.moe.expert_store import ExpertFiles, ExpertPlaces, Key


class ExpertCache:
    """The owner's side.

    address: for `CachedExperts`. nbytes: of the experts it is to hold.
    """

    def __init__(self, shapes: Sequence[ExpertShape], experts: int, most_bytes: int) -> None:
        """
        Args:
            shapes: of each MoE layer's experts.
            experts: of each layer.
            most_bytes: of memory for experts.

        Raises: OSError: there is no memory.
        """
        self._places = ExpertPlaces(shapes, experts)
        self._exported = export_pages(self._places.size)
        self.address = self._exported.address
        self.keys: list[Key] = []
        self.nbytes = 0
        for key in _in_order(len(shapes), experts):
            size = self._places.place(key)[1]
            if self.nbytes + size > most_bytes:
                break
            self.keys.append(key)
            self.nbytes += size

    def fill(self, files: ExpertFiles, key: Key) -> None:
        """Read one of `keys`; several threads may. Raises: FlexpertError: it cannot be read."""
        begin, size = self._places.place(key)
        files.read_expert(*key, self._exported.bytes[begin : begin + size])
        self._exported.bytes[self._places.entry(key)] = 1

    def close(self) -> None:
        """Nobody can open it any more; who has it open goes on reading."""
        self._exported.close()


class CachedExperts:
    """A checkpoint whose experts are read from the cache where that has them."""

    def __init__(
        self, address: bytes, shapes: Sequence[ExpertShape], experts: int, files: ExpertFiles
    ) -> None:
        """
        Args:
            files: what is not in the cache.

        Raises:
            PeerUnreachable: its process is gone or on another machine.
            ValueError: not an address.
        """
        self._places = ExpertPlaces(shapes, experts)
        self._imported = ImportedPages(address, copied=True)
        self._files = files

    def load_experts(
        self, layer: int, experts: Sequence[int], place: Callable[[int], ExpertWeights]
    ) -> object:
        """As the files do it: not from the cache."""
        return self._files.load_experts(layer, experts, place)

    def read_expert(self, layer: int, expert: int, into: Tensor) -> None:
        """See `ExpertFiles.read_expert`."""
        key = layer, expert
        if self._imported.read(self._places.entry(key), (1,), torch.uint8).item():
            self._imported.copy_to(self._places.place(key)[0], into)
        else:
            self._files.read_expert(layer, expert, into)


def _in_order(layers: int, experts: int) -> Iterator[Key]:
    """Each layer in turn, so that a part is a part of every layer."""
    return ((layer, expert) for expert in range(experts) for layer in range(layers))
