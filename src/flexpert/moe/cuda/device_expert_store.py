"""The experts of a GPU rank, in device memory that its peers may copy them from.

As `flexpert.moe.expert_store`, but a place takes memory only while it is used: places lie in
slabs, each one allocation, exported as a whole. A directory in this machine's memory says
which expert lies where; an entry is one word, so that a peer reads all of it or nothing.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from flexpert.comm import CommError
from flexpert.comm.capture_guard import CAPTURE_GUARD
from flexpert.comm.errors import PeerUnreachable
from flexpert.comm.peer_memory import (
    ExportedMemory,
    ImportedPages,
    export_memory,
    export_pages,
    import_memory,
)
from flexpert.kernels.cuda.device_experts import SlotAddresses
from flexpert.kernels.device_stream import stream_of
from flexpert.kernels.experts import ExpertShape, ExpertWeights
from flexpert.moe.cuda.expert_upload import ExpertUploader
from flexpert.moe.expert_store import (
    ExpertLoad,
    ExpertPlaces,
    ExportedExperts,
    ExportingPeers,
    Key,
)

SLAB_BYTES = 256 << 20
MOST_SLABS = 1 << 14

_ALIGN = 256
_SLAB_SHIFT = 40  # an entry: 1 + (slab << 40 | offset); 0: not here
_ADDRESS_BYTES = 1024  # two of them say how many count
_STEPS = 20  # of the progress of an upload


@dataclass(slots=True)
class _Slab:
    memory: ExportedMemory
    begin: int  # address on the device
    size: int  # of a place
    free: list[int] = field(default_factory=list)  # offsets

    @property
    def empty(self) -> bool:
        return len(self.free) == len(self.memory.bytes) // self.size


class _Directory:
    """Views of the directory's memory. entries: [layers * experts] int64."""

    def __init__(self, memory: Tensor, layers: int, experts: int) -> None:
        self.experts = experts
        count = layers * experts
        self.entries = memory[: count * 8].view(torch.int64).numpy()
        self.addresses = memory[count * 8 :].view(MOST_SLABS, _ADDRESS_BYTES).numpy()

    @staticmethod
    def size(layers: int, experts: int) -> int:
        return layers * experts * 8 + MOST_SLABS * _ADDRESS_BYTES

    def index(self, key: Key) -> int:
        return key[0] * self.experts + key[1]

    def entry(self, key: Key) -> int:
        return int(self.entries[self.index(key)])

    def write_address(self, slab: int, address: bytes) -> None:
        packed = len(address).to_bytes(2, "little") + address
        self.addresses[slab, : len(packed)] = np.frombuffer(packed, dtype=np.uint8)

    def address(self, slab: int) -> bytes:
        row: bytes = self.addresses[slab].tobytes()
        return row[2 : 2 + int.from_bytes(row[:2], "little")]


class DeviceExpertStore:
    """The store of one rank; used like `ExpertStore`, by one thread at a time.

    address: for `import_memory` in peers that serve the same model.
    """

    def __init__(
        self,
        rank: int,
        shapes: Sequence[ExpertShape],
        experts: int,
        device: torch.device,
        *,
        slab_bytes: int = SLAB_BYTES,
    ) -> None:
        """
        Args:
            shapes: of each MoE layer's experts.
            experts: of each layer.
            slab_bytes: of the largest slabs.
        """
        self.device = device
        self._rank = rank
        self._stream = stream_of(device)
        self.shapes = tuple(shapes)
        self.experts = experts
        self._slab_bytes = slab_bytes
        self._exported = export_pages(_Directory.size(len(shapes), experts))
        self._directory = _Directory(self._exported.bytes, len(shapes), experts)
        largest = max(shape.nbytes for shape in shapes)
        self._uploader = ExpertUploader(self._stream, largest)
        self._slabs: dict[int, _Slab] = {}
        self._places: dict[Key, tuple[int, int]] = {}  # of experts that are here or come
        self._layout = ExpertPlaces(shapes, experts)
        self._serving = threading.Lock()  # what is read is not freed meanwhile
        self._last = -1  # slab that was made
        self.address = self._exported.address

    def __contains__(self, key: Key) -> bool:
        return self._directory.entry(key) != 0

    @property
    def resident(self) -> int:
        """Bytes of this machine's memory it takes now."""
        return self._exported.resident + sum(s.memory.resident for s in self._slabs.values())

    @property
    def mapped(self) -> int:
        """Bytes of experts that lie in the page cache: none."""
        return 0

    @property
    def allocated(self) -> int:
        """Bytes of the device's memory that its slabs take now; from any thread."""
        return sum(len(slab.memory.bytes) for slab in list(self._slabs.values()))

    @property
    def spare(self) -> int:
        """Of these, bytes of places that no expert has."""
        return sum(len(slab.free) * slab.size for slab in list(self._slabs.values()))

    def load(self, load: ExpertLoad) -> int:
        """As `ExpertStore.load`. Launches on the calling thread's stream, and waits for it.

        Raises:
            CudaError: there is no memory on the device.
            FlexpertError, OSError: the files cannot be read; or what `load.check` raises.
        """
        self.reserve(load.keys)
        copied = self._copy(load)
        rest = [key for key in load.keys if key not in copied]
        step = max(1, len(rest) // _STEPS)
        far = FarExperts(self._rank, load, self._layout)

        def count(done: int) -> None:
            if done % step == 0:
                load.progress((len(copied) + done) / len(load.keys))

        def read(key: Key, into: Tensor) -> None:
            far.read(key, into)
            if load.pace:
                load.pace(self.shapes[key[0]].nbytes)

        self._uploader.upload(
            [(key, self.memory(key)) for key in rest],
            read,
            check=load.check,
            progress=count,
        )
        self.filled(rest)
        if not rest:
            # what a loss will need: page-locking would hold up steps, and this rank serves none yet
            self._uploader.prepare(len(load.keys))
        return len(copied) + far.count

    def _copy(self, load: ExpertLoad) -> set[Key]:
        """What peers have is copied from them; which ones."""
        peers = ExportingPeers(self._rank, load.exporters, self)
        launched: list[tuple[Key, ExportedDeviceExperts, int]] = []
        try:
            for number, key in enumerate(load.keys):
                if load.pace or number % 64 == 0:
                    load.check()
                for peer in peers.of(key):
                    entry = peer.entry(key)
                    there = peer.memory(key, entry)
                    if there is not None:
                        self.memory(key).copy_(there, non_blocking=True)
                        launched.append((key, peer, entry))
                        if load.pace:
                            load.pace(self.shapes[key[0]].nbytes)
                        break
        finally:
            self._stream.synchronize()
        # a place that was given to another expert meanwhile was not copied
        copied = [key for key, peer, entry in launched if peer.entry(key) == entry]
        self.filled(copied)
        return set(copied)

    def layer(self, layer: int, experts: Sequence[int]) -> SlotAddresses:
        """To compute with experts that are here, in this order of slots."""
        places = (self._places[layer, expert] for expert in experts)
        begins = [self._slabs[number].begin + offset for number, offset in places]
        return SlotAddresses.at(begins, self.shapes[layer])

    def weights(self, key: Key) -> ExpertWeights:
        """Views of the place of an expert."""
        return self.shapes[key[0]].over(self.memory(key))

    def memory(self, key: Key) -> Tensor:
        """[bytes of the expert] uint8: its place, which it has (`reserve`)."""
        number, offset = self._places[key]
        return self._slabs[number].memory.bytes[offset : offset + self.shapes[key[0]].nbytes]

    def filled(self, keys: Iterable[Key]) -> None:
        """Peers may copy these from now on; what was launched to fill them is computed."""
        for key in keys:
            number, offset = self._places[key]
            self._directory.entries[self._directory.index(key)] = (
                1 + (number << _SLAB_SHIFT) + offset
            )

    def drop(self, keys: Iterable[Key]) -> None:
        """Give memory back. Nobody may use these any more; slabs are freed in the background."""
        for key in keys:
            if key not in self._places:
                continue
            with self._serving:
                self._directory.entries[self._directory.index(key)] = 0
                number, offset = self._places.pop(key)
            slab = self._slabs[number]
            slab.free.append(offset)
            if slab.empty:
                del self._slabs[number]
                CAPTURE_GUARD.later(slab.memory.close)

    def import_memory(self, address: bytes) -> ExportedDeviceExperts:
        """A peer's store of the same model. Raises: PeerUnreachable"""
        return ExportedDeviceExperts(address, self)

    @property
    def served(self) -> ServedDeviceExperts:
        """For ranks of other machines."""
        return ServedDeviceExperts(self)

    def read(self, key: Key, begin: int, into: Tensor) -> bool:
        """Bytes of an expert into memory of the host, from any thread; whether it is here."""
        with self._serving:
            if key not in self:
                return False
            with self._stream.aside():
                into.copy_(self.memory(key)[begin : begin + len(into)])
        return True

    def reserve(self, keys: Iterable[Key]) -> None:
        """Give each of these a place that has none. Raises: CudaError: there is no memory."""
        without: dict[int, list[Key]] = {}
        for key in keys:
            if key not in self._places:
                size = -(-self.shapes[key[0]].nbytes // _ALIGN) * _ALIGN
                without.setdefault(size, []).append(key)
        for size, waiting in without.items():
            free = [
                (number, offset)
                for number, slab in self._slabs.items()
                if slab.size == size
                for offset in slab.free
            ]
            for key, (number, offset) in zip(waiting, free, strict=False):
                self._slabs[number].free.remove(offset)
                self._places[key] = number, offset
            self._reserve_new(waiting[len(free) :], size)

    def _reserve_new(self, keys: Sequence[Key], size: int) -> None:
        most = max(1, self._slab_bytes // size)
        for begin in range(0, len(keys), most):
            of_slab = keys[begin : begin + most]
            memory = export_memory(len(of_slab) * size, self.device, zeroed=False)
            number = self._number()
            self._directory.write_address(number, memory.address)
            self._slabs[number] = _Slab(memory, memory.bytes.data_ptr(), size)
            for place, key in enumerate(of_slab):
                self._places[key] = number, place * size

    def _number(self) -> int:
        """One that has not been used for long: a peer may have an old one open."""
        while True:
            self._last = (self._last + 1) % MOST_SLABS
            if self._last not in self._slabs:
                return self._last


class ServedDeviceExperts:
    """The experts of a store as `ExportedExperts` of other machines read them: laid out as in an
    `ExpertStore`, whatever lies where on the device. What is not here reads as anything."""

    def __init__(self, store: DeviceExpertStore) -> None:
        self._store = store
        self._layout = store._layout

    @property
    def size(self) -> int:
        return self._layout.size

    def read(self, offset: int, into: Tensor) -> None:
        """See `ServedMemory`; what is read lies among the entries or in one place."""
        store, layout = self._store, self._layout
        if offset < layout.entries:
            there = store._directory.entries[offset : offset + len(into)] != 0
            into[: len(there)] = torch.from_numpy(there)
            return
        if offset >= layout.begins[0]:
            key, begin = layout.key(offset)
            store.read(key, begin, into)


class FarExperts:
    """Experts out of the memory of ranks on other machines, else from the files.

    count: how many came from those ranks.
    """

    def __init__(self, rank: int, load: ExpertLoad, layout: ExpertPlaces) -> None:
        far = {r: functools.partial(ExportedExperts, m, layout) for r, m in load.far.items()}
        self._peers = ExportingPeers[ExportedExperts](rank, {}, _NoneNear(), far)
        self._files = load.files
        self._lock = threading.Lock()
        self.count = 0

    def read(self, key: Key, into: Tensor) -> None:
        """As `ExpertFiles.read_expert`; several threads at once."""
        for peer in self._peers.of(key):
            try:
                if peer.copy(key, into):
                    with self._lock:
                        self.count += 1
                    return
            except CommError:
                self._peers.lost(peer)
        self._files.read_expert(*key, into)


class _NoneNear:
    def import_memory(self, address: bytes) -> ExportedExperts:
        raise PeerUnreachable("of this machine, device memory is mapped")


class ExportedDeviceExperts:
    """The experts in a peer's device memory; a slab is opened when it is first needed."""

    def __init__(self, address: bytes, own: DeviceExpertStore) -> None:
        """
        Args:
            own: the store of this rank, of the same model.

        Raises:
            PeerUnreachable: the peer is gone or on another machine.
        """
        self._own = own
        self._directory = _Directory(ImportedPages(address).bytes, len(own.shapes), own.experts)
        self._slabs: dict[bytes, Tensor | None] = {}

    def entry(self, key: Key) -> int:
        """Changes when the peer drops the expert or has it elsewhere; 0: it is not there."""
        return self._directory.entry(key)

    def memory(self, key: Key, entry: int) -> Tensor | None:
        """[bytes] uint8 where an `entry` says; must not be written to. None: it is not there."""
        if entry == 0:
            return None
        number, offset = divmod(entry - 1, 1 << _SLAB_SHIFT)
        address = self._directory.address(number)
        if address not in self._slabs:
            self._slabs[address] = self._open(address)
        slab = self._slabs[address]
        return None if slab is None else slab[offset : offset + self._own.shapes[key[0]].nbytes]

    def _open(self, address: bytes) -> Tensor | None:
        try:
            return import_memory(address, self._own.device).bytes
        except CommError:  # it has ended
            return None
