"""The experts of a rank: where files are mapped, or in memory that its peers may copy them from.

Every (layer, expert) of the model has a place of its own in exported memory; a place without an
expert takes no page. A directory in front says which are filled. What a peer is told to copy stays
until the epoch for which it copies has begun, so nothing is locked.

An expert that is used where its file is mapped takes no place: whoever wants it maps it, too.
"""

from __future__ import annotations

import bisect
import functools
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from flexpert.comm import CommError
from flexpert.comm.peer_memory import ImportedPages, ReadableMemory, export_pages
from flexpert.comm.remote_memory import HostRegion, ServedMemory
from flexpert.kernels.cpu.expert_products import LayerExperts
from flexpert.kernels.experts import ExpertShape, ExpertWeights

_PAGE = 4096
_PIECE = 1 << 20  # of an expert, where it is not copied as fast as it can be

Key = tuple[int, int]
"""(layer among the MoE layers, expert)."""

P_co = TypeVar("P_co", covariant=True)
P = TypeVar("P")


class ExpertFiles(Protocol):
    """A checkpoint."""

    def load_experts(
        self, layer: int, experts: Sequence[int], place: Callable[[int], ExpertWeights]
    ) -> object:
        """Fill the places of experts of one layer. Raises: FlexpertError"""
        ...

    def read_expert(self, layer: int, expert: int, into: Tensor) -> None:
        """One expert's bytes, as `ExpertShape.over` has them; several threads may read at once.

        into: [`ExpertShape.nbytes`] uint8 of the host.

        Raises: FlexpertError
        """
        ...


MapExperts = Callable[[int, Sequence[int]], Mapping[int, ExpertWeights]]
"""(layer, experts) → those of them that can be used where their file is mapped; raises
FlexpertError."""


class Pacer:
    """Keeps what several threads load to a number of bytes a second.

    held_s: for how long it has held them back.
    """

    def __init__(self, bytes_per_s: float, cancelled: threading.Event) -> None:
        """cancelled: nobody waits any more."""
        self._bytes_per_s = bytes_per_s
        self._cancelled = cancelled
        self._lock = threading.Lock()
        self._due = 0.0
        self.held_s = 0.0

    def __call__(self, size: int) -> None:
        """So many bytes were loaded: wait as long as they may take."""
        with self._lock:
            now = time.monotonic()
            self._due = max(now, self._due) + size / self._bytes_per_s
            wait_s = self._due - now
            self.held_s += wait_s
        self._cancelled.wait(wait_s)


@dataclass(frozen=True, slots=True)
class ExpertLoad:
    """Experts that a rank is to have.

    keys: by layer. exporters: rank → address of what it exports; tried before the files. far: rank
    on another machine → what it exports; tried after those. check: called between experts; raises
    what the load is to end with. progress: told the share that is done, 0 to 1. pace: told of bytes
    that were loaded, may take its time; None: as fast as it can be done.
    """

    keys: Sequence[Key]
    exporters: Mapping[int, bytes]
    files: ExpertFiles
    check: Callable[[], None]
    progress: Callable[[float], None]
    far: Mapping[int, ReadableMemory] = field(default_factory=dict)
    pace: Pacer | None = None


class Store(Protocol):
    """What an epoch's experts lie in; see `ExpertStore`."""

    address: bytes

    @property
    def resident(self) -> int: ...
    @property
    def mapped(self) -> int: ...
    @property
    def served(self) -> ServedMemory: ...
    def load(self, load: ExpertLoad) -> int: ...
    def layer(self, layer: int, experts: Sequence[int]) -> object: ...
    def drop(self, keys: Iterable[Key]) -> None: ...


class _Opens(Protocol[P_co]):
    def import_memory(self, address: bytes) -> P_co: ...


class ExportingPeers(Generic[P]):
    """The peers whose memory has experts; each is opened when it is first needed. Any thread."""

    def __init__(
        self,
        rank: int,
        addresses: Mapping[int, bytes],
        store: _Opens[P],
        far: Mapping[int, Callable[[], P]] | None = None,
    ) -> None:
        """
        Args:
            addresses: of peers on this machine.
            far: what opens others.
        """
        near = {r: functools.partial(store.import_memory, a) for r, a in addresses.items()}
        self._openers: dict[int, Callable[[], P]] = {**near, **(far or {})}
        self._rings = [[r for r in sorted(ranks) if r != rank] for ranks in (near, far or {})]
        self._first = rank  # several newcomers begin with different peers
        self._open: dict[int, P | None] = {}
        self._opening = threading.Lock()  # several threads may ask

    def of(self, key: Key) -> Iterable[P]:
        """Those that can be read, those of this machine first, beginning with another one for each
        expert."""
        for ring in self._rings:
            for step in range(len(ring)):
                with self._opening:
                    peer = self._peer(ring[(self._first + key[1] + step) % len(ring)])
                if peer is not None:
                    yield peer

    def lost(self, peer: P) -> None:
        """It cannot be read any more."""
        self._open.update({rank: None for rank, open in self._open.items() if open is peer})

    def _peer(self, rank: int) -> P | None:
        if rank not in self._open:
            try:
                self._open[rank] = self._openers[rank]()
            except CommError:  # it ended, or cannot be reached: the checkpoint has it, too
                self._open[rank] = None
        return self._open[rank]


class ExpertPlaces:
    """Where everything lies: a byte for each place, then the places."""

    def __init__(self, shapes: Sequence[ExpertShape], experts: int) -> None:
        self.shapes = tuple(shapes)
        self.experts = experts
        self.begins: list[int] = []
        self.entries = len(shapes) * experts
        at = _pages(self.entries)
        for shape in self.shapes:
            self.begins.append(at)
            at += experts * _pages(shape.nbytes)
        self.size = at

    def entry(self, key: Key) -> int:
        layer, expert = key
        return layer * self.experts + expert

    def key(self, offset: int) -> tuple[Key, int]:
        """Whose place a byte behind the entries is in, and which byte of it."""
        layer = bisect.bisect_right(self.begins, offset) - 1
        expert, within = divmod(offset - self.begins[layer], _pages(self.shapes[layer].nbytes))
        return (layer, expert), within

    def place(self, key: Key) -> tuple[int, int]:
        """(begin, bytes)"""
        layer, expert = key
        size = self.shapes[layer].nbytes
        return self.begins[layer] + expert * _pages(size), size


class ExpertStore:
    """The store of one rank, in memory of the host.

    address: for the `ExportedExperts` of peers that serve the same model.
    """

    def __init__(
        self,
        rank: int,
        shapes: Sequence[ExpertShape],
        experts: int,
        *,
        deterministic: bool = False,
        maps: MapExperts | None = None,
    ) -> None:
        """
        Args:
            shapes: of each MoE layer's experts.
            experts: of each layer.
            deterministic: see `LayerExperts`.
            maps: what is asked first for experts; None: all have places of their own.
        """
        self._rank = rank
        self._deterministic = deterministic
        self._maps = maps
        self._mapped: set[Key] = set()
        self._places = ExpertPlaces(shapes, experts)
        self._exported = export_pages(self._places.size)
        self._weights: dict[Key, ExpertWeights] = {}
        self.address = self._exported.address

    def __contains__(self, key: Key) -> bool:
        return key in self._mapped or bool(self._exported.bytes[self._places.entry(key)])

    @property
    def resident(self) -> int:
        """Bytes of memory it takes now, beside the page cache."""
        return self._exported.resident

    @property
    def mapped(self) -> int:
        """Bytes of experts that lie in the page cache."""
        return sum(self._places.shapes[layer].nbytes for layer, _ in list(self._mapped))

    def load(self, load: ExpertLoad) -> int:
        """Map experts that are not here, or fill their places from peers' memory or the files.

        Returns how many came from peers. What ends early is for the caller to `drop`.

        Raises:
            FlexpertError, OSError: the files cannot be read; or what `load.check` raises.
        """
        far = {r: functools.partial(ExportedExperts, m, self._places) for r, m in load.far.items()}
        peers = ExportingPeers(self._rank, load.exporters, self, far)
        done = copied = 0
        for layer, keys in groupby(load.keys, key=lambda key: key[0]):
            load.check()
            of_layer = list(keys)
            missing = self._map(self._maps, of_layer, load) if self._maps else of_layer
            rest = [key for key in missing if not self._copied(key, peers, load)]
            load.check()
            place = functools.partial(self._place, layer)
            experts = [expert for _, expert in rest]
            for part in [[expert] for expert in experts] if load.pace else [experts]:
                load.files.load_experts(layer, part, place)
                if load.pace:
                    load.pace(self._places.shapes[layer].nbytes)
                    load.check()
            for key in rest:
                self.filled(key)
            done += len(of_layer)
            copied += len(missing) - len(rest)
            load.progress(done / len(load.keys))
        return copied

    def _map(self, maps: MapExperts, keys: Sequence[Key], load: ExpertLoad) -> list[Key]:
        """Of one layer. Returns those that cannot be mapped."""
        for part in [[key] for key in keys] if load.pace else [keys]:
            layer = part[0][0]
            found = maps(layer, [expert for _, expert in part])
            for expert, weights in found.items():
                self._weights[layer, expert] = weights
                self._mapped.add((layer, expert))
            if load.pace:
                load.pace(len(found) * self._places.shapes[layer].nbytes)
            load.check()
        return [key for key in keys if key not in self._mapped]

    def _copied(self, key: Key, peers: ExportingPeers[ExportedExperts], load: ExpertLoad) -> bool:
        for peer in peers.of(key):
            try:
                if self.copy(key, peer, load.pace):
                    load.check()
                    return True
            except CommError:
                peers.lost(peer)
        return False

    def layer(self, layer: int, experts: Sequence[int]) -> LayerExperts:
        """To compute with experts that are here, in this order of slots."""
        held = [self.weights((layer, expert)) for expert in experts]
        return LayerExperts(held, deterministic=self._deterministic)

    def _place(self, layer: int, expert: int) -> ExpertWeights:
        return self.weights((layer, expert))

    def weights(self, key: Key) -> ExpertWeights:
        """The place of an expert, to be filled or used."""
        if key not in self._weights:
            begin, size = self._places.place(key)
            memory = self._exported.bytes[begin : begin + size]
            self._weights[key] = self._places.shapes[key[0]].over(memory)
        return self._weights[key]

    def filled(self, key: Key) -> None:
        """Peers may copy it from now on."""
        self._exported.bytes[self._places.entry(key)] = 1

    def copy(self, key: Key, peer: ExportedExperts, pace: Pacer | None = None) -> bool:
        """Fill a place from a peer's memory; False if the peer does not have it.

        Raises: CommError: the peer cannot be read any more.
        """
        begin, size = self._places.place(key)
        if not peer.copy(key, self._exported.bytes[begin : begin + size], pace):
            return False
        self.filled(key)
        return True

    def drop(self, keys: Iterable[Key]) -> None:
        """Give memory back. Nobody may use `weights` of these any more."""
        for key in keys:
            self._weights.pop(key, None)
            if key in self._mapped:
                self._mapped.discard(key)
                continue
            self._exported.bytes[self._places.entry(key)] = 0
            begin, size = self._places.place(key)
            self._exported.release(begin, _pages(size))

    def import_memory(self, address: bytes) -> ExportedExperts:
        """A peer's store of the same model. Raises: PeerUnreachable"""
        return ExportedExperts(ImportedPages(address), self._places)

    @property
    def served(self) -> HostRegion:
        """All that `address` leads to, for ranks of other machines."""
        return HostRegion(self._exported.bytes)


class ExportedExperts:
    """The experts that a peer has when this is made, in its memory."""

    def __init__(self, memory: ReadableMemory, places: ExpertPlaces) -> None:
        """
        Args:
            memory: of the peer's store.
            places: the same there and here, where the same model is served.

        Raises:
            CommError: the peer cannot be read.
        """
        self._places = places
        self._memory = memory
        self._filled = torch.empty(self._places.entries, dtype=torch.uint8, device="cpu")
        memory.copy([(0, self._filled)])

    def copy(self, key: Key, into: Tensor, pace: Pacer | None = None) -> bool:
        """One expert's bytes; False, and perhaps anything in `into`: the peer does not have it.

        Raises: CommError: the peer cannot be read any more.
        """
        entry = self._places.entry(key)
        if not self._filled[entry]:
            return False
        after = torch.empty(1, dtype=torch.uint8, device="cpu")
        begin = self._places.place(key)[0]
        if pace:
            for at in range(0, len(into), _PIECE):
                piece = into[at : at + _PIECE]
                self._memory.copy([(begin + at, piece)])
                pace(len(piece))
            into = into[:0]
        self._memory.copy([(begin, into), (entry, after)])
        return bool(after)  # what is dropped meanwhile says so before its memory is given back


def _pages(size: int) -> int:
    return -(-size // _PAGE) * _PAGE
