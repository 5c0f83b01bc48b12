"""Attention whose cache has one compressed latent of each token (MLA), not the keys of each head.

Transformers' modules expand the latent c of a token into keys and values of all heads by a product
with `kv_b_proj`, in a method of its own (`expand_kv`). Those products can be done on the other side
of the attention instead, for the tokens of a step rather than for all before them:

    q · (W_k c)   =  (W_kᵀ q) · c         scores, besides those of the rotary part
    Σ p (W_v c)   =  W_v (Σ p c)          results

So c and the rotary key are cached, kv_lora_rank + qk_rope_head_dim numbers a token and layer, as
one key that all heads share, whose first part is the value as well. That is longer than a head's
own key and value together, and attention to it takes as much longer. So where many rows of a
sequence are computed, as of a prompt, its keys and values are expanded for the time of the step.
Which of the two it is depends on the step, and with it the rounding; --deterministic keeps keys and
values expanded. This is for a CPU; `device_latents` does the same on a GPU.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, Final

import torch
from torch import Tensor, nn

from flexpert.kernels.cpu.ops import WeightTable
from flexpert.kernels.kernel_set import PagedAttentionKernel
from flexpert.models import recording
from flexpert.models.batch import ForwardBatch
from flexpert.models.padding import pad_rows
from flexpert.models.paged_attention import AttentionTerms, PagedAttention

_LATENT: Final = "_flexpert_latent"
_MANY: Final = 32  # rows of a sequence in a step from which on its keys and values are expanded
_EXPANDED: Final = 2**24  # numbers at a time
_FIRST_BLOCK: Final = torch.zeros((1, 1), dtype=torch.int32)


@dataclass(frozen=True, slots=True)
class LatentShape:
    """Of an attention module: heads with keys of nope + rope and values of value_dim numbers; all
    but the rotary part comes of a latent of `rank`."""

    heads: int
    nope: int
    rope: int
    rank: int
    value_dim: int


def keep_latents(model: nn.Module) -> bool:
    """Let the modules of a model that expand latents hand them to attention as they are; False:
    there is none."""
    found = False
    for module in model.modules():
        shape = _latent_shape(module)
        if shape is not None:
            vars(module)["expand_kv"] = _unexpanded
            vars(module)[_LATENT] = shape
            found = True
    return found


def kept_latent(module: nn.Module) -> LatentShape | None:
    """What `keep_latents` found of a module; None: it is another."""
    shape: LatentShape | None = vars(module).get(_LATENT)
    return shape


def _unexpanded(latent: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor]:
    """latent: [1, 1, N, rank], rotary: [1, 1, N, rope] → the key and the value of all heads."""
    return torch.cat([latent, rotary], dim=-1), latent


def _latent_shape(module: Any) -> LatentShape | None:
    product = getattr(module, "kv_b_proj", None)
    if type(product) is not nn.Linear or product.bias is not None:
        return None
    try:
        nope, value_dim = int(module.qk_nope_head_dim), int(module.v_head_dim)
        rope, rank = int(module.qk_rope_head_dim), product.in_features
        heads = product.out_features // (nope + value_dim)
    except (AttributeError, TypeError, ValueError, ZeroDivisionError):
        return None
    if product.out_features != heads * (nope + value_dim) or not _expands(type(module)):
        return None
    return LatentShape(heads, nope, rope, rank, value_dim)


@functools.cache
def _expands(kind: type[nn.Module]) -> bool:
    """Whether `expand_kv` of a class does what is done here on the other side; it is tried."""
    expand = getattr(kind, "expand_kv", None)
    if expand is None:
        return False
    heads, nope, rope, rank, value_dim, rows = 2, 3, 4, 5, 6, 7
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(heads * (nope + value_dim), rank, generator=generator)
    latent = torch.randn(1, 1, rows, rank, generator=generator)
    rotary = torch.randn(1, 1, rows, rope, generator=generator)
    tried = SimpleNamespace(
        kv_b_proj=lambda x: x @ weight.t(),
        qk_nope_head_dim=nope,
        qk_rope_head_dim=rope,
        v_head_dim=value_dim,
    )
    try:
        key, value = expand(tried, latent, rotary)
    except Exception:  # noqa: BLE001 - it needs more than that, and is another
        return False
    each = (latent[0, 0] @ weight.t()).view(rows, heads, -1).transpose(0, 1)[None]
    keys = torch.cat([each[..., :nope], rotary.expand(-1, heads, -1, -1)], dim=-1)
    return all(
        mine.shape == theirs.shape and torch.allclose(mine, theirs, atol=1e-5)
        for mine, theirs in ((keys, key), (each[..., nope:], value))
    )


class LatentAttention(PagedAttention):
    """One attention layer that `keep_latents` has found, on a CPU.

    key_cache: [blocks, block_size, 1, rank + rope]; value_cache: its first `rank` numbers.
    """

    __slots__ = ("_key_table", "_keys", "_shape", "_value_table", "_values")

    def __init__(
        self,
        module: Any,
        shape: LatentShape,
        key_cache: Tensor,
        value_cache: Tensor,
        kernel: PagedAttentionKernel,
        *,
        isolated: bool,
    ) -> None:
        """module: with its weights; those of `kv_b_proj` move into tables here."""
        super().__init__(key_cache, value_cache, kernel, isolated=isolated)
        self._shape = shape
        each = module.kv_b_proj.weight.detach().unflatten(0, (shape.heads, -1))
        self._keys = each[:, : shape.nope].transpose(1, 2).contiguous()  # [heads, rank, nope]
        self._values = each[:, shape.nope :].contiguous()  # [heads, value_dim, rank]
        self._key_table = WeightTable(self._keys.unbind(), None)
        self._value_table = WeightTable(self._values.unbind(), None)
        module.kv_b_proj = None

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
        **_: object,
    ) -> Tensor:
        """query: [1, heads, N, nope + rope], key: [1, 1, N, rank + rope], value: [1, 1, N, rank] →
        [1, N, heads, value_dim]."""
        if (noting := recording.current()) is not None:
            terms = {"scaling": scaling, "sliding_window": sliding_window, "softcap": softcap}
            given = (module, query, key, value, None), {**terms, "s_aux": s_aux}
            shape = self.result_shape(query, value)
            result: Tensor = noting.module(self.attention, given, lambda: query.new_zeros(shape))
            return result
        with self.own_arithmetic():
            batch = self.forward_batch
            rows = batch.slot_mapping.shape[0]
            how = AttentionTerms(
                query.shape[3] ** -0.5 if scaling is None else scaling,
                sliding_window or 0,
                softcap or 0.0,
                None if s_aux is None else s_aux.to(query.dtype).contiguous(),
            )
            asked, kept = query[0, :, :rows], key[0, 0, :rows]
            long = _long_pieces(batch)
            if not long:
                out = self._absorbed(asked, kept, batch, how)
            else:
                out = self._in_pieces(asked, kept, batch, long, how)
            return pad_rows(out, query.shape[2]).unsqueeze(0)

    def result_shape(self, query: Tensor, value: Tensor) -> tuple[int, ...]:
        return (1, query.shape[2], self._shape.heads, self._shape.value_dim)

    def _in_pieces(
        self,
        query: Tensor,
        key: Tensor,
        batch: ForwardBatch,
        long: list[int],
        how: AttentionTerms,
    ) -> Tensor:
        """Sequences with many rows each by itself, the others together. long: which."""
        shape = self._shape
        self.key_cache.view(-1, key.shape[1]).index_copy_(0, batch.slot_mapping, key)
        out = query.new_empty((key.shape[0], shape.heads, shape.value_dim))
        begins = batch.query_start.tolist()
        for one in long:
            piece = slice(begins[one], begins[one + 1])
            out[piece] = self._expanded(
                query[:, piece],
                int(batch.context_len[one]),
                batch.block_tables[one],
                how,
            )
        short = sorted(set(range(len(begins) - 1)) - set(long))
        if short:
            some = [row for one in short for row in range(begins[one], begins[one + 1])]
            rows, which = torch.tensor(some), torch.tensor(short)
            counts = batch.query_start.diff()[which]
            starts = torch.cat([counts.new_zeros(1), counts.cumsum(0, dtype=torch.int32)])
            beside = replace(
                batch,
                query_start=starts,
                context_len=batch.context_len[which],
                block_tables=batch.block_tables[which],
                slot_mapping=batch.slot_mapping[rows],
            )
            out[rows] = self._absorbed(query[:, rows], key[rows], beside, how)
        return out

    def _absorbed(
        self, query: Tensor, key: Tensor, batch: ForwardBatch, how: AttentionTerms
    ) -> Tensor:
        """query: [heads, N, nope + rope], key: [N, rank + rope] → [N, heads, value_dim]."""
        shape, rows = self._shape, query.shape[1]
        by_head = _offsets(shape.heads, rows)
        plain = query[..., : shape.nope].contiguous().view(-1, shape.nope)
        absorbed = self._key_table.linear(plain, by_head).view(shape.heads, rows, shape.rank)
        latents = self.attend(
            batch,
            torch.cat([absorbed, query[..., shape.nope :]], dim=-1).transpose(0, 1),
            key[:, None],
            key[:, None, : shape.rank],
            how,
        )
        of_heads = latents.transpose(0, 1).contiguous().view(-1, shape.rank)
        out = self._value_table.linear(of_heads, by_head)
        return out.view(shape.heads, rows, shape.value_dim).transpose(0, 1)

    def _expanded(self, query: Tensor, context: int, table: Tensor, how: AttentionTerms) -> Tensor:
        """Keys and values of one sequence are expanded for this step, some heads at a time.

        query: [heads, N, nope + rope] of its last rows. context: its tokens in the cache, theirs
        included. table: its blocks. Returns [N, heads, value_dim].
        """
        shape, rows = self._shape, query.shape[1]
        blocks = table[: -(-context // self.key_cache.shape[1])].long()
        kept = self.key_cache[blocks].flatten(0, 2)[:context]
        latents, rotary = kept[:, : shape.rank], kept[:, None, shape.rank :]
        at_once = max(1, _EXPANDED // (context * (shape.nope + shape.rope + shape.value_dim)))
        starts, lengths = torch.tensor([[0, rows], [context, 0]], dtype=torch.int32)
        out = query.new_empty((rows, shape.heads, shape.value_dim))
        for first in range(0, shape.heads, at_once):
            heads = slice(first, min(first + at_once, shape.heads))
            keys = kept.new_empty((1, context, heads.stop - first, shape.nope + shape.rope))
            keys[0, ..., : shape.nope] = (latents @ self._keys[heads]).transpose(0, 1)
            keys[0, ..., shape.nope :] = rotary
            values = (latents @ self._values[heads].transpose(1, 2)).transpose(0, 1).contiguous()
            mine = query[heads].transpose(0, 1)
            out[:, heads] = self.kernel(
                mine if mine.stride(2) == 1 else mine.contiguous(),
                keys[0, :rows],
                values[:rows],
                keys,
                values[None],
                starts,
                lengths[:1],
                _FIRST_BLOCK,
                torch.full((rows,), -1),  # all is there already
                scaling=how.scaling,
                window=how.window,
                softcap=how.softcap,
                sinks=None if how.sinks is None else how.sinks[heads].contiguous(),
            )
        return out


def _long_pieces(batch: ForwardBatch) -> list[int]:
    """Sequences of whose tokens so many are computed that expanding all before them pays."""
    if batch.slot_mapping.shape[0] < _MANY:
        return []
    counts = batch.query_start.diff().tolist()
    return [index for index, count in enumerate(counts) if count >= _MANY]


@functools.lru_cache(maxsize=64)
def _offsets(heads: int, rows: int) -> Tensor:
    """[heads + 1] int32, where the rows of each head begin."""
    return torch.arange(heads + 1, dtype=torch.int32) * rows
