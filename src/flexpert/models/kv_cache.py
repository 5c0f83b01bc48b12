"""The KV cache of a rank: the keys and values of all attention layers in one piece of memory, and
behind them the states of layers that keep one of each sequence."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flexpert.comm.peer_memory import ReadableMemory
from flexpert.kernels.device_stream import stream_of
from flexpert.models.source import ModelInfo
from flexpert.models.state_view import StateKey

_ALIGN = 64  # bytes; of each tensor's begin


class KVCache:
    """layers: per attention layer (keys [blocks, block_size, kv_heads, key_dim], values [...,
    value_dim]) in the model's dtype, all of them views of one memory; where values are part of the
    keys, views of these. index_keys: per attention layer [blocks, block_size, 1, index_dim], of its
    indexer, or None. parts: all that are no views of others, each contiguous.

    states: per layer that keeps a state, its states by key, each [slots, *shape].

    Equal models and sizes give equal layouts, so a rank can read a peer's cache by laying this over
    the peer's memory.
    """

    def __init__(
        self, info: ModelInfo, blocks: int, block_size: int, memory: Tensor, slots: int = 0
    ) -> None:
        """
        Args:
            memory: [at least `nbytes`] uint8.
            slots: for states; each holds those of one sequence at all layers.
        """
        self.blocks = blocks
        self.slots = slots
        self.layers: list[tuple[Tensor, Tensor]] = []
        self.index_keys: list[Tensor | None] = []
        self.parts: list[Tensor] = []
        self._begins: list[int] = []  # of these in the memory
        at = 0
        for shape in info.attention:
            pieces = []
            for heads, dim in shape.pieces:
                size = blocks * block_size * heads * dim * info.dtype.itemsize
                part = memory[at : at + size].view(info.dtype)
                pieces.append(part.view(blocks, block_size, heads, dim))
                self._begins.append(at)
                at += _aligned(size)
            self.parts += pieces
            self.index_keys.append(pieces.pop() if shape.index_dim else None)
            keys = pieces[0]
            values = keys[..., : shape.value_dim] if shape.value_in_key else pieces[1]
            self.layers.append((keys, values))
        self.states: list[dict[StateKey, Tensor]] = []
        self._slots: list[tuple[int, Tensor]] = []  # begin in the memory, [slots, bytes] of it
        for layer in info.states:
            by_key = {}
            for state in layer:
                size = slots * state.nbytes
                part = memory[at : at + size]
                by_key[state.key] = part.view(state.dtype).view(slots, *state.shape)
                self._slots.append((at, part.view(slots, state.nbytes)))
                at += _aligned(size)
            self.states.append(by_key)

    def slots_of(self, layer: int) -> list[Tensor]:
        """What an attention layer keeps, with a row for each token: [blocks * block_size, width],
        views."""
        keys, values = self.layers[layer]
        parts: list[Tensor | None] = [keys, self.index_keys[layer]]
        if values.data_ptr() != keys.data_ptr():
            parts.append(values)
        return [part.flatten(2).flatten(0, 1) for part in parts if part is not None]

    @staticmethod
    def nbytes(info: ModelInfo, blocks: int, block_size: int, slots: int = 0) -> int:
        """Bytes of memory it needs."""
        return KVCache.state_nbytes(info, slots) + sum(
            _aligned(blocks * block_size * heads * dim * info.dtype.itemsize)
            for shape in info.attention
            for heads, dim in shape.pieces
        )

    @staticmethod
    def state_nbytes(info: ModelInfo, slots: int) -> int:
        """Bytes of that for states."""
        return sum(_aligned(slots * state.nbytes) for layer in info.states for state in layer)

    def copy_state(self, other: KVCache | ReadableMemory, there: int, here: int) -> int:
        """Copies a slot of another rank's cache; returns the bytes, when they are there.

        other: that cache, as large as this one, or its memory.

        Raises: CommError: the peer cannot be read any more.
        """
        if isinstance(other, KVCache):
            for (_, mine), (_, theirs) in zip(self._slots, other._slots, strict=True):
                mine[here].copy_(theirs[there])
            stream_of(self.layers[0][0].device).synchronize()
        else:
            other.copy(
                [(begin + there * slots.shape[1], slots[here]) for begin, slots in self._slots]
            )
        return sum(slots.shape[1] for _, slots in self._slots)

    def copy_from(self, other: KVCache, pairs: Sequence[tuple[int, int]]) -> int:
        """Copies blocks, given as (block of `other`, block of this one); returns the bytes, when
        they are there."""
        if not pairs:
            return 0
        device = self.layers[0][0].device
        source = torch.tensor([pair[0] for pair in pairs], device=device)
        target = torch.tensor([pair[1] for pair in pairs], device=device)
        copied = 0
        with torch.inference_mode():
            for to, of in zip(self.parts, other.parts, strict=True):
                to.index_copy_(0, target, of.index_select(0, source))
                copied += len(pairs) * to[0].nbytes
        stream_of(device).synchronize()
        return copied

    def read_from(self, memory: ReadableMemory, pairs: Sequence[tuple[int, int]]) -> int:
        """As `copy_from`, out of memory that can only be read piece by piece.

        Raises: CommError: the peer cannot be read any more.
        """
        parts: list[tuple[int, Tensor]] = []
        for tensor, begin in zip(self.parts, self._begins, strict=True):
            blocks = tensor.view(torch.uint8).view(self.blocks, -1)
            size = blocks.shape[1]
            parts += [(begin + there * size, blocks[here]) for there, here in pairs]
        memory.copy(parts)
        return sum(into.numel() for _, into in parts)


def _aligned(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN
