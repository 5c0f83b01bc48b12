"""The experts of a GPU rank, in device memory that its peers may copy them from.

As `flexpert.moe.expert_store`, but a place takes memory only while it is used: places lie on
shelves, each an allocation that is shared as a whole. A directory in this machine's memory says
which expert lies where; an entry is one word, so that a peer reads all of it or nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flexpert.comm import CommError
from flexpert.comm.peer_memory import (
    ExportedMemory,
    ImportedPages,
    export_memory,
    export_pages,
    import_memory,
)
from flexpert.kernels.device_stream import stream_of
from flexpert.kernels.experts import ExpertShape, ExpertWeights
from flexpert.moe.expert_store import Key, PeerExperts

SHELF_BYTES = 64 << 20
MOST_SHELVES = 1 << 14

_ALIGN = 256
_SHELF_SHIFT = 40  # an entry: 1 + (shelf << 40 | offset); 0: not here
_ADDRESS_BYTES = 1024  # two of them say how many count


@dataclass(slots=True)
class _Shelf:
    memory: ExportedMemory
    size: int  # of a place
    free: list[int] = field(default_factory=list)  # offsets

    @property
    def empty(self) -> bool:
        return len(self.free) == len(self.memory.bytes) // self.size


class _Directory:
    """Views of the directory's memory."""

    def __init__(self, memory: Tensor, layers: int, experts: int) -> None:
        self.experts = experts
        count = layers * experts
        self.entries = memory[: count * 8].view(torch.int64)
        self.addresses = memory[count * 8 :].view(MOST_SHELVES, _ADDRESS_BYTES)

    @staticmethod
    def size(layers: int, experts: int) -> int:
        return layers * experts * 8 + MOST_SHELVES * _ADDRESS_BYTES

    def index(self, key: Key) -> int:
        return key[0] * self.experts + key[1]

    def place(self, key: Key) -> tuple[int, int] | None:
        """(shelf, offset)"""
        entry = int(self.entries[self.index(key)]) - 1
        return None if entry < 0 else (entry >> _SHELF_SHIFT, entry & ((1 << _SHELF_SHIFT) - 1))

    def write_address(self, shelf: int, address: bytes) -> None:
        packed = bytearray(len(address).to_bytes(2, "little") + address)
        self.addresses[shelf, : len(packed)] = torch.frombuffer(packed, dtype=torch.uint8)

    def address(self, shelf: int) -> bytes:
        row = bytes(self.addresses[shelf].tolist())
        return row[2 : 2 + int.from_bytes(row[:2], "little")]


class DeviceStore:
    """One rank's own; used like `ExpertStore`, by one thread at a time.

    address: for `import_memory` in peers that serve the same model.
    """

    def __init__(
        self,
        shapes: Sequence[ExpertShape],
        experts: int,
        device: torch.device,
        *,
        shelf_bytes: int = SHELF_BYTES,
    ) -> None:
        """
        Args:
            shapes: of each MoE layer's experts.
            experts: of each layer.
        """
        self.device = device
        self._stream = stream_of(device)
        self.shapes = tuple(shapes)
        self.experts = experts
        self._shelf_bytes = shelf_bytes
        self._exported = export_pages(_Directory.size(len(shapes), experts))
        self._directory = _Directory(self._exported.bytes, len(shapes), experts)
        self._shelves: dict[int, _Shelf] = {}
        self._places: dict[Key, tuple[int, int]] = {}  # of experts that are here or come
        self._last = -1  # shelf that was made
        self.address = self._exported.address

    def __contains__(self, key: Key) -> bool:
        return self._directory.place(key) is not None

    @property
    def resident(self) -> int:
        """Bytes of this machine's memory it takes now."""
        return self._exported.resident + sum(s.memory.resident for s in self._shelves.values())

    def weights(self, key: Key) -> ExpertWeights:
        """The place of an expert, to be filled or used; one is taken if it has none.

        Raises: CudaError: there is no memory.
        """
        return self.shapes[key[0]].over(self._memory(key))

    def filled(self, key: Key) -> None:
        """Peers may copy it from now on."""
        self._stream.synchronize()
        shelf, offset = self._places[key]
        self._directory.entries[self._directory.index(key)] = 1 + (shelf << _SHELF_SHIFT | offset)

    def copy(self, key: Key, peer: PeerExperts) -> bool:
        """Fill a place from a peer's memory; False if the peer does not have it."""
        there = peer.memory(key)
        if there is None:
            return False
        self._memory(key).copy_(there)
        self.filled(key)
        return True

    def drop(self, keys: Iterable[Key]) -> None:
        """Give memory back. Nobody may use `weights` of these any more."""
        for key in keys:
            if key not in self._places:
                continue
            self._directory.entries[self._directory.index(key)] = 0
            number, offset = self._places.pop(key)
            shelf = self._shelves[number]
            shelf.free.append(offset)
            if shelf.empty:
                del self._shelves[number]
                shelf.memory.close()

    def import_memory(self, address: bytes) -> ExportedDeviceExperts:
        """A peer's store of the same model. Raises: PeerUnreachable"""
        return ExportedDeviceExperts(address, self)

    def _memory(self, key: Key) -> Tensor:
        shape = self.shapes[key[0]]
        if key not in self._places:
            self._places[key] = self._take(-(-shape.nbytes // _ALIGN) * _ALIGN)
        number, offset = self._places[key]
        return self._shelves[number].memory.bytes[offset : offset + shape.nbytes]

    def _take(self, size: int) -> tuple[int, int]:
        """A free place of such a size."""
        for number, shelf in self._shelves.items():
            if shelf.size == size and shelf.free:
                return number, shelf.free.pop()
        count = max(1, self._shelf_bytes // size)
        memory = export_memory(count * size, self.device)
        shelf = _Shelf(memory, size, [size * place for place in reversed(range(count))])
        number = self._number()
        self._directory.write_address(number, memory.address)
        self._shelves[number] = shelf
        return number, shelf.free.pop()

    def _number(self) -> int:
        """One that has not been used for long: a peer may have an old one open."""
        while True:
            self._last = (self._last + 1) % MOST_SHELVES
            if self._last not in self._shelves:
                return self._last


class ExportedDeviceExperts:
    """The experts in a peer's device memory; a shelf is opened when it is first needed."""

    def __init__(self, address: bytes, own: DeviceStore) -> None:
        """
        Args:
            own: the store of this rank, of the same model.

        Raises:
            PeerUnreachable: the peer is gone or on another machine.
        """
        self._own = own
        self._directory = _Directory(ImportedPages(address).bytes, len(own.shapes), own.experts)
        self._shelves: dict[bytes, Tensor | None] = {}

    def memory(self, key: Key) -> Tensor | None:
        place = self._directory.place(key)
        if place is None:
            return None
        number, offset = place
        address = self._directory.address(number)
        if address not in self._shelves:
            self._shelves[address] = self._open(address)
        shelf = self._shelves[address]
        return None if shelf is None else shelf[offset : offset + self._own.shapes[key[0]].nbytes]

    def _open(self, address: bytes) -> Tensor | None:
        try:
            return import_memory(address, self._own.device).bytes
        except CommError:  # it has ended
            return None
