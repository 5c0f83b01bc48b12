"""Attention to the keys that an indexer picks (DeepSeek-V3.2, GLM-MoE-DSA), on a CPU;
`device_indexers` does the same on a GPU.

transformers' own indexer picks them: a small module beside attention that keeps a key of its own
of each token, scores those of all tokens before a query and gives the numbers of the best. It is
called for each sequence of a step apart, with a cache that finds its keys in paged memory beside
the keys and values, so that they live, move and are found again with these. Its mask is the causal
one of its sequence.

What it gives passes through transformers' code untouched, and through several layers where these
share a choice; so what passes is only the number of the indexer, and attention asks that one. Rows
that see no more keys than are picked at most attend to all of them, as in any model. Any other row
is computed as if it were a sequence of its own: of blocks of one token, those that were picked.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Final, Protocol, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from flexpert.models import recording
from flexpert.models.batch import ForwardBatch
from flexpert.models.deterministic import SingleRowMode
from flexpert.models.paged_attention import PagedAttention
from flexpert.models.probe import AttentionShape
from flexpert.models.state_layers import LayerArguments
from flexpert.models.state_view import CACHE, MASK

_SCORED: Final = 2**19
"""Pairs of a query and a key that are scored in one call, for each head of the indexer: 2 MiB."""


class CausalMask:
    """In place of the mask that transformers makes, until an indexer gets its own."""

    def __getitem__(self, _: object) -> CausalMask:
        return self


_CAUSAL: Final = CausalMask()


class IndexKeys:
    """The cache of an indexer for a call of one sequence; `update_indexer` is of
    `transformers.Cache`.

    keys: [slots, dim]. slots: [T], where those of the sequence are, up to the last of the call.
    """

    def __init__(self, keys: Tensor, slots: Tensor) -> None:
        self._keys = keys
        self._slots = slots

    def update_indexer(self, indexer_key_states: Tensor, layer_idx: int) -> Tensor:
        """indexer_key_states: [1, n, dim] of the last tokens → [1, T, dim]."""
        new = indexer_key_states[0]
        self._keys.index_copy_(0, self._slots[-len(new) :], new)
        return self._keys.index_select(0, self._slots).unsqueeze(0)


class Indexer:
    """One indexer, in place of its module's forward.

    batch: that all layers compute. picked: of each sequence of the batch, [n, k] numbers of keys;
    those of later tokens do not count.
    """

    def __init__(
        self, module: nn.Module, number: int, keys: Tensor, *, deterministic: bool
    ) -> None:
        """keys: [blocks, block_size, 1, dim]."""
        self.batch: ForwardBatch | None = None
        self.picked: list[Tensor] = []
        self._number = number
        self._call = module.forward
        self._names = list(inspect.signature(module.forward).parameters)
        self._keys = keys.flatten(0, 2)
        self._block_size = keys.shape[1]
        self._deterministic = deterministic

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Of hidden states of [1, N, hidden] → [1, N, 1] int32, the number of the indexer."""
        given = dict(zip(self._names, args, strict=False)) | kwargs
        rows = given[self._names[0]].shape[1]
        if (noting := recording.current()) is not None:
            number: Tensor = noting.module(self.forward, ((), given), lambda: self._answer(rows))
            return number
        if self.batch is None:
            raise RuntimeError("an indexer outside of ModelRunner.forward")
        begins = self.batch.query_start.tolist()
        contexts = self.batch.context_len.tolist()
        cut = LayerArguments((given[self._names[0]],), given)
        self.picked = [
            self._of_sequence(cut, begins[s], begins[s + 1], contexts[s], table)
            for s, table in enumerate(self.batch.block_tables)
        ]
        return self._answer(rows)

    def _of_sequence(
        self, given: LayerArguments, begin: int, end: int, context: int, table: Tensor
    ) -> Tensor:
        """Of the rows begin … end - 1, the last ones of `context` tokens."""
        at = torch.arange(context)
        slots = table.long()[at // self._block_size] * self._block_size + at % self._block_size
        most = 1 if self._deterministic else max(1, _SCORED // context)
        parts = []
        for first in range(begin, end, most):
            last = min(first + most, end)
            seen = context - (end - last)
            queries = torch.arange(seen - (last - first), seen)
            _, arguments = given.cut(slice(first, last))
            arguments[MASK] = (at[:seen] <= queries[:, None]).unsqueeze(0)
            arguments[CACHE] = IndexKeys(self._keys, slots[:seen])
            with SingleRowMode() if self._deterministic else contextlib.nullcontext():
                parts.append(self._call(**arguments)[0])
        width = max(part.shape[1] for part in parts)
        return torch.cat([_wide(part, width) for part in parts]).long()

    def _answer(self, rows: int) -> Tensor:
        return torch.full((1, rows, 1), self._number, dtype=torch.int32)


def _wide(picked: Tensor, width: int) -> Tensor:
    """With numbers behind that no key has."""
    missing = width - picked.shape[1]
    return picked if not missing else nn.functional.pad(picked, (0, missing), value=2**31 - 1)


class IndexedAttention(PagedAttention):
    """One attention layer over what an indexer picks.

    inner: attends to all keys. indexers: of the model, by their number.
    """

    __slots__ = ("_indexers", "_inner", "_single")

    def __init__(self, inner: PagedAttention, indexers: Sequence[Indexer]) -> None:
        super().__init__(inner.key_cache, inner.value_cache, inner.kernel, isolated=inner.isolated)
        self._inner = inner
        self._single = copy.copy(inner)
        self._single.key_cache = of_one_token(inner.key_cache)
        self._single.value_cache = of_one_token(inner.value_cache)
        self._indexers = indexers

    def result_shape(self, query: Tensor, value: Tensor) -> tuple[int, ...]:
        return self._inner.result_shape(query, value)

    def attention(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: object,
        *,
        indices: object = None,
        **options: Any,
    ) -> Tensor:
        """indices: [1, N, 1], what an `Indexer` gave; all else as of `inner`."""
        whole = self.result_shape(query, value)
        if (noting := recording.current()) is not None:
            given = (module, query, key, value, None), {"indices": indices, **options}
            result: Tensor = noting.module(self.attention, given, lambda: query.new_zeros(whole))
            return result
        if not isinstance(indices, Tensor):
            raise RuntimeError("attention to picked keys, and none are picked")
        batch = self.forward_batch
        with self.own_arithmetic():
            picked = self._indexers[int(indices[0, 0, 0])].picked
            parts = split_rows(batch, picked, self.key_cache.shape[1])
            if parts is None:
                self._inner.batch = batch
                return self._inner.attention(module, query, key, value, None, **options)
            out = query.new_zeros(whole)
            for layer, (rows, part) in zip((self._inner, self._single), parts, strict=True):
                if len(rows):
                    layer.batch = part
                    q, k, v = (x.index_select(2, rows) for x in (query, key, value))
                    found = layer.attention(module, q, k, v, None, **options)
                    out.index_copy_(1, rows, found)
            return out


def of_one_token(cache: Tensor) -> Tensor:
    """[blocks, block_size, heads, dim] → [blocks · block_size, 1, heads, dim], the same memory."""
    blocks, size, heads, dim = cache.shape
    _, token, head, _ = cache.stride()  # of values that are part of their keys, those of the keys
    return cache.as_strided((blocks * size, 1, heads, dim), (token, token, head, 1))


Part: TypeAlias = tuple[Tensor, ForwardBatch]
"""Rows of a batch, and what they are for the layer that computes them."""


def split_rows(
    batch: ForwardBatch, picked: Sequence[Tensor], block_size: int
) -> tuple[Part, Part] | None:
    """Rows that see no more keys than are picked at most, as rows of their sequences; and all
    others, each a sequence of blocks of one token, those that were picked. None: there are no
    others.

    picked: see `Indexer`.
    """
    begins, contexts = batch.query_start.tolist(), batch.context_len.tolist()
    most = max(one.shape[1] for one in picked)
    if max(contexts) <= most:
        return None
    usual: list[int] = []
    starts, lengths, which = [0], [], []
    rows: list[int] = []
    counts, tables = [], []
    for s, context in enumerate(contexts):
        begin, end = begins[s], begins[s + 1]
        before = context - (end - begin)
        seeing_all = min(max(0, most - before), end - begin)
        if seeing_all:
            usual += range(begin, begin + seeing_all)
            starts.append(len(usual))
            lengths.append(before + seeing_all)
            which.append(s)
        if begin + seeing_all == end:
            continue
        rows += range(begin + seeing_all, end)
        positions = torch.arange(before + seeing_all, context)
        numbers = picked[s][seeing_all:].sort(dim=1).values
        seen = numbers <= positions[:, None]
        numbers = numbers.where(seen, 0)
        blocks = batch.block_tables[s].long()[numbers // block_size]
        counts.append(seen.sum(1))
        tables.append(blocks * block_size + numbers % block_size)
    all_seen, some_seen = torch.tensor(usual, dtype=torch.int64), torch.tensor(rows)
    chosen = torch.tensor(which, dtype=torch.int64)
    return (
        all_seen,
        replace(
            batch,
            query_start=torch.tensor(starts, dtype=torch.int32),
            context_len=torch.tensor(lengths, dtype=torch.int32),
            block_tables=batch.block_tables[chosen],
            slot_mapping=batch.slot_mapping[all_seen],
        ),
    ), (
        some_seen,
        replace(
            batch,
            query_start=torch.arange(len(rows) + 1, dtype=torch.int32),
            context_len=torch.cat(counts).int(),
            block_tables=torch.cat(tables).int(),
            slot_mapping=batch.slot_mapping[some_seen],
        ),
    )


class BoundIndexer(Protocol):
    """What takes the place of an indexer's forward. batch: that all layers compute."""

    batch: ForwardBatch | None

    def forward(self, *args: Any, **kwargs: Any) -> Tensor: ...


IndexerT = TypeVar("IndexerT", bound=BoundIndexer)


def bind_indexers(
    model: PreTrainedModel,
    names: Sequence[str],
    shapes: Sequence[AttentionShape],
    keys: Sequence[Tensor | None],
    make: Callable[[nn.Module, int, Tensor], IndexerT],
) -> list[IndexerT]:
    """Let the indexers of a model find their keys, and the layers of attention ask them.

    Args:
        names, shapes: of the layers of attention.
        keys: of their indexers, see `KVCache`.
        make: of an indexer's module, its number and its keys.
    """
    indexers: list[IndexerT] = []
    for name, shape, memory in zip(names, shapes, keys, strict=True):
        attention = model.get_submodule(name)
        if shape.indexed:
            vars(attention)["forward"] = _with_mask(attention.forward)
        if memory is not None:
            module = attention.get_submodule(shape.indexer)
            indexer = make(module, len(indexers), memory)
            vars(module)["forward"] = indexer.forward
            indexers.append(indexer)
    return indexers


def _with_mask(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Of an attention module, which takes the indexer's mask from its own."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **{**kwargs, MASK: _CAUSAL})

    return call
