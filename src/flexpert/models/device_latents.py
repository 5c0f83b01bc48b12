"""Attention to latents (see `latent_attention`) on a GPU.

A decode step is one piece, whose queries are absorbed: a captured graph has nothing else. Any other
step is cut on the host: a sequence with so many tokens in it that expanded keys and values take
less arithmetic, all in all, is a piece by itself, and what lies between such ones is absorbed.
Nothing here waits for the device.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from flexpert.kernels.kernel_set import Kernels, LatentKernels
from flexpert.kernels.step_shapes import FEW
from flexpert.models.batch import ForwardBatch
from flexpert.models.latent_attention import LatentShape
from flexpert.models.paged_attention import AttentionTerms, PagedAttention

WORKSPACE_NUMBERS: Final = 2**27
"""What one piece makes of its sequences: expanded keys and values of as many heads at a time, or
absorbed queries and their results of as many rows."""

_MOST_HEADS: Final = 64  # at a time; `attend` takes them for sequences, of which these are few


@dataclass(frozen=True, slots=True)
class LatentPiece:
    """Rows of a step, and the sequences that they belong to. context: tokens in the cache of the
    one sequence whose keys and values are expanded; 0: queries are absorbed."""

    rows: slice
    sequences: slice
    context: int = 0


def fewest_expanded(shape: LatentShape) -> float:
    """Tokens of a sequence in a step from which on expanding the keys and values of all before them
    takes less arithmetic. For each of them, head and token before,

        2 · rank + rope

    multiplications if queries are absorbed, else

        nope + rope + value_dim,  and once for all of them  rank · (nope + value_dim).
    """
    each = shape.nope + shape.value_dim
    gain = 2 * shape.rank - each
    return shape.rank * each / gain if gain > 0 else float("inf")


def cut_pieces(
    starts: Sequence[int], contexts: Sequence[int], fewest: float, most_rows: int
) -> list[LatentPiece]:
    """The pieces of a step, in the order of its rows (pure).

    Args:
        starts: [S + 1] first row of each sequence.
        contexts: [S] tokens in the cache behind the step.
        fewest: see `fewest_expanded`.
        most_rows: of a piece with absorbed queries.
    """
    pieces: list[LatentPiece] = []

    def kind(sequence: int) -> str:
        count = starts[sequence + 1] - starts[sequence]
        return "one" if count == 1 else "few" if count < fewest else "many"

    for many, group in itertools.groupby(range(len(contexts)), kind):
        members = list(group)
        if many == "many":
            pieces += [
                LatentPiece(slice(starts[s], starts[s + 1]), slice(s, s + 1), contexts[s])
                for s in members
            ]
            continue
        for some in range(0, len(members), most_rows if many == "one" else FEW):
            its = members[some : some + (most_rows if many == "one" else FEW)]
            begin, end = starts[its[0]], starts[its[-1] + 1]
            pieces += [
                LatentPiece(slice(row, min(row + most_rows, end)), slice(its[0], its[-1] + 1))
                for row in range(begin, end, most_rows)
            ]
    return pieces


class DeviceLatentAttention(PagedAttention):
    """One attention layer that `keep_latents` has found.

    key_cache: [blocks, block_size, 1, rank + rope]; value_cache: its first `rank` numbers.
    """

    cuts_prompts = True

    __slots__ = ("_fewest", "_kernels", "_keys", "_most_rows", "_shape", "_values")

    def __init__(
        self,
        module: Any,
        shape: LatentShape,
        key_cache: Tensor,
        value_cache: Tensor,
        kernels: Kernels,
        *,
        isolated: bool,
    ) -> None:
        """module: with its weights, of which those of `kv_b_proj` are used where they are."""
        super().__init__(key_cache, value_cache, kernels.paged_attention, isolated=isolated)
        if kernels.latents is None:
            raise ValueError("there are no kernels for latents")
        self._kernels: LatentKernels = kernels.latents
        self._shape = shape
        each = module.kv_b_proj.weight.detach().unflatten(0, (shape.heads, -1))
        self._keys = each[:, : shape.nope]  # [heads, nope, rank]
        self._values = each[:, shape.nope :]  # [heads, value_dim, rank]
        self._fewest = fewest_expanded(shape)
        self._most_rows = max(1, WORKSPACE_NUMBERS // (2 * shape.heads * shape.rank))

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
        batch, shape = self.forward_batch, self._shape
        how = AttentionTerms(
            query.shape[3] ** -0.5 if scaling is None else scaling,
            sliding_window or 0,
            softcap or 0.0,
            None if s_aux is None else s_aux.to(query.dtype).contiguous(),
        )
        self._kernels.store(key[0, 0], self.key_cache, batch.slot_mapping)
        out = query.new_empty((query.shape[2], shape.heads, shape.value_dim))
        for piece in self._pieces(batch, how):
            if piece.context:
                self._expanded(query[0, :, piece.rows], piece, batch, how, out[piece.rows])
            else:
                self._absorbed(query[0, :, piece.rows], piece, batch, how, out[piece.rows])
        return out.unsqueeze(0)

    def _pieces(self, batch: ForwardBatch, how: AttentionTerms) -> list[LatentPiece]:
        tokens = batch.slot_mapping.shape[0]
        if tokens == batch.context_len.shape[0]:
            firsts = range(0, tokens, self._most_rows)
            rows = [slice(first, min(first + self._most_rows, tokens)) for first in firsts]
            return [LatentPiece(some, some) for some in rows]
        host = batch.host or batch
        starts, contexts = host.query_start.tolist(), host.context_len.tolist()
        fewest = self._fewest if how.sinks is None else float("inf")
        return cut_pieces(starts, contexts, fewest, self._most_rows)

    def _absorbed(
        self,
        query: Tensor,
        piece: LatentPiece,
        batch: ForwardBatch,
        how: AttentionTerms,
        out: Tensor,
    ) -> None:
        """query: [heads, n, nope + rope] of the piece → out: [n, heads, value_dim]."""
        shape, its = self._shape, piece.sequences
        latents = self._kernels.attend_latents(
            torch.bmm(query[..., : shape.nope], self._keys),
            query[..., shape.nope :],
            self.key_cache,
            batch.query_start[its.start : its.stop + 1],
            batch.context_len[its],
            batch.block_tables[its],
            first=piece.rows.start,
            scaling=how.scaling,
            window=how.window,
            softcap=how.softcap,
            sinks=how.sinks,
            decode=out.shape[0] == its.stop - its.start,
        )
        out.copy_(torch.bmm(latents, self._values.transpose(1, 2)).transpose(0, 1))

    def _expanded(
        self,
        query: Tensor,
        piece: LatentPiece,
        batch: ForwardBatch,
        how: AttentionTerms,
        out: Tensor,
    ) -> None:
        """Keys and values of the piece's sequence are expanded, of some heads at a time, which
        attention takes for sequences. query: [heads, n, nope + rope] → out: [n, heads, value_dim].
        """
        shape, rows = self._shape, query.shape[1]
        size = self.key_cache.shape[1]
        blocks = -(-piece.context // size)
        table = batch.block_tables[piece.sequences.start, :blocks]
        kept = self.key_cache.index_select(0, table).flatten(0, 2)
        latents, rotary = kept[:, : shape.rank], kept[:, shape.rank :]
        each = kept.shape[0] * (shape.nope + shape.rope + shape.value_dim)
        at_once = max(1, min(_MOST_HEADS, WORKSPACE_NUMBERS // each))
        number = torch.arange(at_once + 1, dtype=torch.int32, device=kept.device)
        tables = torch.arange(at_once * blocks, dtype=torch.int32, device=kept.device)
        contexts = torch.full_like(number, piece.context)
        for first in range(0, shape.heads, at_once):
            heads = slice(first, min(first + at_once, shape.heads))
            count = heads.stop - first
            keys = kept.new_empty((count, kept.shape[0], shape.nope + shape.rope))
            wide = latents.expand(count, -1, -1)
            torch.bmm(wide, self._keys[heads].transpose(1, 2), out=keys[..., : shape.nope])
            keys[..., shape.nope :] = rotary
            values = torch.bmm(wide, self._values[heads].transpose(1, 2))
            result = self._kernels.attend(
                query[heads].reshape(count * rows, 1, -1),
                keys.view(count * blocks, size, 1, -1),
                values.view(count * blocks, size, 1, -1),
                number[: count + 1] * rows,
                contexts[:count],
                tables[: count * blocks].view(count, blocks),
                scaling=how.scaling,
                window=how.window,
                softcap=how.softcap,
            )
            out[:, heads] = result.view(count, rows, -1).transpose(0, 1)
