"""The experts of a rank, in memory that its peers may copy them from.

Every (layer, expert) of the model has a place of its own in exported memory; a place without an
expert takes no page. A directory in front says which are filled. What a peer is told to copy stays
until the epoch for which it copies has begun, so nothing is locked.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from flexpert.comm import CommError
from flexpert.comm.peer_memory import ImportedPages, export_pages
from flexpert.kernels.cpu.expert_products import LayerExperts
from flexpert.kernels.experts import ExpertShape, ExpertWeights

_PAGE = 4096

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


@dataclass(frozen=True, slots=True)
class ExpertLoad:
    """Experts that a rank is to have.

    keys: by layer. exporters: rank → address of what it exports; tried before the files.
    check: called between experts; raises what the load is to end with. progress: told the share
    that is done, 0 to 1.
    """

    keys: Sequence[Key]
    exporters: Mapping[int, bytes]
    files: ExpertFiles
    check: Callable[[], None]
    progress: Callable[[float], None]


class Store(Protocol):
    """What an epoch's experts lie in; see `ExpertStore`."""

    address: bytes

    @property
    def resident(self) -> int: ...
    def load(self, load: ExpertLoad) -> int: ...
    def layer(self, layer: int, experts: Sequence[int]) -> object: ...
    def drop(self, keys: Iterable[Key]) -> None: ...


class _Opens(Protocol[P_co]):
    def import_memory(self, address: bytes) -> P_co: ...


class ExportingPeers(Generic[P]):
    """The peers whose memory has experts; each is opened when it is first needed."""

    def __init__(self, rank: int, addresses: Mapping[int, bytes], store: _Opens[P]) -> None:
        self._store = store
        self._addresses: Sequence[bytes] = [addresses[r] for r in sorted(addresses) if r != rank]
        self._first = rank  # several newcomers begin with different peers
        self._open: dict[bytes, P | None] = {}

    def of(self, key: Key) -> Iterable[P]:
        """Those that can be read, beginning with another one for each expert."""
        count = len(self._addresses)
        for step in range(count):
            peer = self._peer(self._addresses[(self._first + key[1] + step) % count])
            if peer is not None:
                yield peer

    def _peer(self, address: bytes) -> P | None:
        if address not in self._open:
            try:
                self._open[address] = self._store.import_memory(address)
            except CommError:  # it ended, or it is on another machine: the checkpoint has it, too
                self._open[address] = None
        return self._open[address]


class ExpertPlaces:
    """Where everything lies: a byte for each place, then the places."""

    def __init__(self, shapes: Sequence[ExpertShape], experts: int) -> None:
        self.shapes = tuple(shapes)
        self.experts = experts
        self.begins: list[int] = []
        at = _pages(len(shapes) * experts)
        for shape in self.shapes:
            self.begins.append(at)
            at += experts * _pages(shape.nbytes)
        self.size = at

    def entry(self, key: Key) -> int:
        layer, expert = key
        return layer * self.experts + expert

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
        self, rank: int, shapes: Sequence[ExpertShape], experts: int, *, deterministic: bool = False
    ) -> None:
        """
        Args:
            shapes: of each MoE layer's experts.
            experts: of each layer.
            deterministic: see `LayerExperts`.
        """
        self._rank = rank
        self._deterministic = deterministic
        self._places = ExpertPlaces(shapes, experts)
        self._exported = export_pages(self._places.size)
        self._weights: dict[Key, ExpertWeights] = {}
        self.address = self._exported.address

    def __contains__(self, key: Key) -> bool:
        return bool(self._exported.bytes[self._places.entry(key)])

    @property
    def resident(self) -> int:
        """Bytes of memory it takes now."""
        return self._exported.resident

    def load(self, load: ExpertLoad) -> int:
        """Fill the places of experts that are not here, from peers' memory or the files.

        Returns how many came from peers. What ends early is for the caller to `drop`.

        Raises:
            FlexpertError, OSError: the files cannot be read; or what `load.check` raises.
        """
        peers = ExportingPeers(self._rank, load.exporters, self)
        done = copied = 0
        for layer, keys in groupby(load.keys, key=lambda key: key[0]):
            load.check()
            of_layer = list(keys)
            rest = [k for k in of_layer if not any(self.copy(k, peer) for peer in peers.of(k))]
            place = functools.partial(self._place, layer)
            load.files.load_experts(layer, [expert for _, expert in rest], place)
            for key in rest:
                self.filled(key)
            done += len(of_layer)
            copied += len(of_layer) - len(rest)
            load.progress(done / len(load.keys))
        return copied

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

    def copy(self, key: Key, peer: ExportedExperts) -> bool:
        """Fill a place from a peer's memory; False if the peer does not have it."""
        there = peer.memory(key)
        if there is None:
            return False
        begin, size = self._places.place(key)
        self._exported.bytes[begin : begin + size] = there
        self.filled(key)
        return True

    def drop(self, keys: Iterable[Key]) -> None:
        """Give memory back. Nobody may use `weights` of these any more."""
        for key in keys:
            self._weights.pop(key, None)
            self._exported.bytes[self._places.entry(key)] = 0
            begin, size = self._places.place(key)
            self._exported.release(begin, _pages(size))

    def import_memory(self, address: bytes) -> ExportedExperts:
        """A peer's store of the same model. Raises: PeerUnreachable"""
        return ExportedExperts(address, self)


class ExportedExperts:
    """The experts in a peer's memory."""

    def __init__(self, address: bytes, own: ExpertStore) -> None:
        """
        Args:
            own: the store of this rank, of the same model.

        Raises:
            PeerUnreachable: the peer is gone or on another machine.
        """
        self._places = own._places
        self._imported = ImportedPages(address)

    def memory(self, key: Key) -> Tensor | None:
        """[bytes] uint8; must not be written to. None: the peer does not have it."""
        if not self._imported.read(self._places.entry(key), (1,), torch.uint8):
            return None
        begin, size = self._places.place(key)
        return self._imported.read(begin, (size,), torch.uint8)


def _pages(size: int) -> int:
    return -(-size // _PAGE) * _PAGE
