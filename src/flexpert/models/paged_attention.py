"""One attention layer over the KV cache of a rank."""

from __future__ import annotations

import contextlib
from typing import ClassVar, NamedTuple

from torch import Tensor, nn

from flexpert.kernels.kernel_set import PagedAttentionKernel
from flexpert.models import recording
from flexpert.models.batch import ForwardBatch
from flexpert.models.deterministic import outside_modes
from flexpert.models.padding import pad_rows


class AttentionTerms(NamedTuple):
    """As a kernel takes them, see `ops.paged_attention`. window: of chunks it is negative."""

    scaling: float
    window: int
    softcap: float
    sinks: Tensor | None


class PagedAttention:
    """One attention layer's cache, and the batch that all layers share.

    key_cache: [blocks, block_size, kv_heads, key_dim]; value_cache: […, value_dim].
    chunk: a token sees those before it in its own chunk of so many; 0: all, or those of a window.
    cuts_prompts: what it launches for prompts depends on how long they are, which it asks the host;
    then no graph can have them.
    """

    cuts_prompts: ClassVar = False

    __slots__ = ("batch", "chunk", "isolated", "kernel", "key_cache", "value_cache")

    def __init__(
        self,
        key_cache: Tensor,
        value_cache: Tensor,
        kernel: PagedAttentionKernel,
        *,
        isolated: bool,
    ) -> None:
        self.key_cache = key_cache
        self.value_cache = value_cache
        self.kernel = kernel
        self.isolated = isolated
        self.batch: ForwardBatch | None = None
        self.chunk = 0

    def attention(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: object,
        *,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        **_: object,  # `probe` has refused what would matter
    ) -> Tensor:
        with self.own_arithmetic():
            batch = self.forward_batch
            rows = batch.slot_mapping.shape[0]
            out = self.attend(
                batch,
                token_rows(query)[:rows],
                token_rows(key)[:rows],
                token_rows(value)[:rows],
                AttentionTerms(
                    query.shape[3] ** -0.5 if scaling is None else scaling,
                    sliding_window or -self.chunk,
                    softcap or 0.0,
                    None if s_aux is None else s_aux.to(query.dtype).contiguous(),
                ),
            )
            return pad_rows(out, query.shape[2]).unsqueeze(0)

    def result_shape(self, query: Tensor, value: Tensor) -> tuple[int, ...]:
        """Of what `attention` gives."""
        return (1, query.shape[2], query.shape[1], value.shape[3])

    def own_arithmetic(self) -> contextlib.AbstractContextManager[object]:
        """Within it no mode intercepts our kernels."""
        return outside_modes() if self.isolated else contextlib.nullcontext()

    @property
    def forward_batch(self) -> ForwardBatch:
        """What is computed; rows behind its tokens are padding."""
        if self.batch is None:
            raise RuntimeError("attention outside of ModelRunner.forward")
        return self.batch

    def attend(
        self, batch: ForwardBatch, query: Tensor, key: Tensor, value: Tensor, how: AttentionTerms
    ) -> Tensor:
        """query: [N, heads, key_dim], key: [N, kv_heads, key_dim], value: [N, kv_heads, value_dim],
        last dimensions contiguous → [N, heads, value_dim]."""
        if (noting := recording.current()) is not None:
            return noting.attention(
                query,
                key,
                value,
                (self.key_cache, self.value_cache),
                scaling=how.scaling,
                window=how.window,
                softcap=how.softcap,
                sinks=how.sinks,
            )
        return self.kernel(
            query,
            key,
            value,
            self.key_cache,
            self.value_cache,
            batch.query_start,
            batch.context_len,
            batch.block_tables,
            batch.slot_mapping,
            scaling=how.scaling,
            window=how.window,
            softcap=how.softcap,
            sinks=how.sinks,
        )


def token_rows(x: Tensor) -> Tensor:
    """[1, heads, N, dim] → [N, heads, dim], last dimension contiguous."""
    x = x[0].transpose(0, 1)
    return x if x.stride(2) == 1 else x.contiguous()
