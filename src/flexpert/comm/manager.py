"""One buffer for all of a process, whoever asks for it."""

from __future__ import annotations

import threading
from typing import Unpack

from flexpert.comm.buffer import Buffer, BufferSpec
from flexpert.comm.factory import BufferOptions, make_buffer


class BufferManager:
    """Hands out the one buffer of a process, and grows or shrinks it.

    The layers of a model ask for a buffer one by one, often from several threads, and with the same
    sizes. The first that asks makes it; each `get` is matched by a `release`, and the last one
    closes it. Windows hold a copy of every peer's rows: one buffer instead of one a layer is what
    keeps memory independent of the depth of the model.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._buffer: Buffer | None = None
        self._holders = 0

    def get(self, rank: int, spec: BufferSpec, **options: Unpack[BufferOptions]) -> Buffer:
        """The buffer, with room for `spec`.

        A larger capacity is added in place, during exchanges. More tokens or more experts
        a token would need other windows on all peers, so the first caller names the largest sizes.

        Args:
            rank: the own id; always the same.
            spec: what this caller needs at least.
            options: for `make_buffer`, used by the first call.

        Raises:
            ValueError: another rank, another hidden size or dtype, or more tokens or experts a
                token than the buffer was made for.
        """
        with self._lock:
            if self._buffer is None:
                self._buffer = make_buffer(rank, spec, **options)
            else:
                self._fit(self._buffer, rank, spec)
            self._holders += 1
            return self._buffer

    def _fit(self, buffer: Buffer, rank: int, spec: BufferSpec) -> None:
        own = buffer.spec
        if rank != buffer.rank:
            raise ValueError(f"this process is rank {buffer.rank}, and not rank {rank}")
        if (spec.hidden, spec.dtype) != (own.hidden, own.dtype):
            raise ValueError(
                f"the buffer of this process has rows of {own.hidden} {own.dtype}, "
                f"and not of {spec.hidden} {spec.dtype}"
            )
        if spec.max_tokens > own.max_tokens or spec.topk > own.topk:
            raise ValueError(
                f"the buffer of this process holds {own.max_tokens} tokens of {own.topk} experts, "
                f"and not {spec.max_tokens} of {spec.topk}: ask for the largest sizes first"
            )
        if spec.capacity > own.capacity:
            buffer.grow(spec.capacity)

    def resize(self, capacity: int) -> None:
        """Grow or shrink the capacity; ids that have no room any more are disconnected.

        Raises: ValueError: there is no buffer, or no room for the own id.
        """
        with self._lock:
            if self._buffer is None:
                raise ValueError("there is no buffer to resize: nobody has asked for one")
            if capacity >= self._buffer.spec.capacity:
                self._buffer.grow(capacity)
            else:
                self._buffer.shrink(capacity)

    def release(self) -> None:
        """Give back what one `get` gave; the last one closes the buffer."""
        with self._lock:
            if self._holders == 0:
                raise ValueError("release without get")
            self._holders -= 1
            if self._holders == 0 and self._buffer is not None:
                self._buffer.close()
                self._buffer = None


manager = BufferManager()
