"""The experts of a rank, in memory that its peers may copy them from.

Every (layer, expert) of the model has a place of its own in exported memory; a place without an
expert takes no page. A directory in front says which are filled. What a peer is told to copy stays
until the epoch for which it copies has begun, so nothing is locked.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from flexpert.comm.peer_memory import ImportedPages, export_pages
from flexpert.kernels.experts import ExpertShape, ExpertWeights

_PAGE = 4096

Key = tuple[int, int]
"""(layer among the MoE layers, expert)."""


class PeerExperts(Protocol):
    """The experts in a peer's memory."""

    def memory(self, key: Key) -> Tensor | None:
        """[bytes] uint8; must not be written to. None: the peer does not have it."""
        ...


class Store(Protocol):
    """What an epoch's experts lie in; see `ExpertStore`."""

    address: bytes

    @property
    def resident(self) -> int: ...
    def weights(self, key: Key) -> ExpertWeights: ...
    def filled(self, key: Key) -> None: ...
    def copy(self, key: Key, peer: PeerExperts) -> bool: ...
    def drop(self, keys: Iterable[Key]) -> None: ...
    def import_memory(self, address: bytes) -> PeerExperts: ...


class _Places:
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
    """One rank's own.

    address: for the `ExportedExperts` of peers that serve the same model.
    """

    def __init__(self, shapes: Sequence[ExpertShape], experts: int) -> None:
        """
        Args:
            shapes: of each MoE layer's experts.
            experts: of each layer.
        """
        self._places = _Places(shapes, experts)
        self._exported = export_pages(self._places.size)
        self.address = self._exported.address

    def __contains__(self, key: Key) -> bool:
        return bool(self._exported.bytes[self._places.entry(key)])

    @property
    def resident(self) -> int:
        """Bytes of memory it takes now."""
        return self._exported.resident

    def weights(self, key: Key) -> ExpertWeights:
        """The place of an expert, to be filled or used."""
        begin, size = self._places.place(key)
        memory = self._exported.bytes[begin : begin + size]
        return self._places.shapes[key[0]].over(memory)

    def filled(self, key: Key) -> None:
        """Peers may copy it from now on."""
        self._exported.bytes[self._places.entry(key)] = 1

    def copy(self, key: Key, peer: PeerExperts) -> bool:
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
        if not self._imported.read(self._places.entry(key), (1,), torch.uint8):
            return None
        begin, size = self._places.place(key)
        return self._imported.read(begin, (size,), torch.uint8)


def _pages(size: int) -> int:
    return -(-size // _PAGE) * _PAGE
