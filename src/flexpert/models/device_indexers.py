"""Attention to the keys that an indexer picks, on a GPU: all sequences of a step at once, without
waiting for the device.

The indexer's module computes its queries, keys and weights of all rows of the step. What it would
do with the keys of all tokens before them, which lie in pages, it does to a `NotedScores`, which
keeps note; where it asks for the best, our kernels have computed that. So a model whose indexer
does something else is refused, and not computed as if it did not.

The picked tokens of a row are a sequence of its own, of blocks of one token: attention needs no
kernel for them that it does not have. No step asks how many tokens its sequences have; where all
that its block tables can hold are no more than are picked, nothing is scored, and attention is as
in any model. A captured graph holds the longest sequence, so it scores and picks also while its
sequences are short.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn

from flexpert.errors import UnsupportedModel
from flexpert.kernels.kernel_set import IndexKernels
from flexpert.models.batch import ForwardBatch
from flexpert.models.indexed_attention import of_one_token
from flexpert.models.paged_attention import PagedAttention
from flexpert.models.state_view import CACHE, MASK

SCORES: Final = 2**26
"""Of a query and a key, that are kept at one time: 256 MiB."""

_ORDER: Final = (
    *("transpose", "float", "unsqueeze", "product", "scale", "relu"),
    *("weigh", "squeeze", "mask", "topk"),
)
_OPTIONAL: Final = {"scale"}
_PRODUCTS: Final = {torch.matmul, Tensor.matmul, Tensor.__matmul__}
_RELUS: Final = {torch.relu, nn.functional.relu}


class NotedMask:
    """The causal mask, in place of a tensor."""

    dtype = torch.bool

    def __invert__(self) -> NotedMask:
        return self


class Best(NamedTuple):
    """Of what `topk` gives, what an indexer passes on."""

    indices: Tensor


class NotedScores:
    """In place of the keys of all tokens, and of what an indexer makes of them until it picks.

    query: [1, N, heads, dim]. weights: [1, N, 1, heads].
    """

    def __init__(self, length: int, pick: Callable[[NotedScores, int], Tensor]) -> None:
        """length: tokens, at most. pick: called with how many are to be picked; what it gives is
        `indices` of `topk`."""
        self.shape = (1, 1, length)
        self.query: Tensor | None = None
        self.weights: Tensor | None = None
        self._pick = pick
        self._at = 0

    def _then(self, step: str, usual: bool) -> NotedScores:
        at = self._at
        while at < len(_ORDER) and _ORDER[at] != step and _ORDER[at] in _OPTIONAL:
            at += 1
        if at == len(_ORDER) or _ORDER[at] != step or not usual:
            raise TypeError(f"{step} is not what flexpert's kernels do there")
        self._at = at + 1
        return self

    def transpose(self, one: int, other: int) -> NotedScores:
        return self._then("transpose", {one, other} == {-1, -2})

    def float(self) -> NotedScores:
        return self._then("float", usual=True)

    def unsqueeze(self, dim: int) -> NotedScores:
        return self._then("unsqueeze", dim == 1)

    def __mul__(self, factor: object) -> NotedScores:
        # which are picked does not depend on it
        return self._then("scale", isinstance(factor, float | int) and factor > 0)

    def squeeze(self, dim: int) -> NotedScores:
        return self._then("squeeze", dim == -2)

    def masked_fill(self, mask: object, value: object) -> NotedScores:
        return self._then("mask", isinstance(mask, NotedMask) and value == -torch.inf)

    def topk(self, k: int, dim: int = -1) -> Best:
        self._then("topk", dim == -1 and self.weights is not None)
        return Best(self._pick(self, k))

    @classmethod
    def __torch_function__(
        cls, call: Any, _: object, args: Sequence[Any] = (), kwargs: Any = None
    ) -> NotedScores:
        me: NotedScores = next(one for one in args if isinstance(one, cls))
        if call in _RELUS:
            return me._then("relu", usual=True)
        if call not in _PRODUCTS or not isinstance(args[0], Tensor):
            return me._then(getattr(call, "__name__", str(call)), usual=False)
        given = args[0]
        if me.query is None:
            me.query = given
            return me._then("product", given.ndim == 4)
        me.weights = given
        heads = me.query.shape[2]
        usual = given.shape == (1, given.shape[1], 1, heads) and given.dtype == torch.float32
        return me._then("weigh", usual)


class NewIndexKeys:
    """The cache of an indexer for one call; `update_indexer` is of `transformers.Cache`."""

    def __init__(self, store: Callable[[Tensor], None], scores: NotedScores) -> None:
        self._store = store
        self._scores = scores

    def update_indexer(self, indexer_key_states: Tensor, layer_idx: int) -> NotedScores:
        """indexer_key_states: [1, N, dim] of the step's tokens."""
        self._store(indexer_key_states[0])
        return self._scores


class DeviceIndexer:
    """One indexer, in place of its module's forward.

    batch: that all layers compute. picked: the same with each row a sequence of its own, of blocks
    of one token; None: no row sees more tokens than are picked.
    """

    def __init__(self, module: nn.Module, number: int, keys: Tensor, kernels: IndexKernels) -> None:
        """keys: [blocks, block_size, 1, dim]."""
        self.batch: ForwardBatch | None = None
        self.picked: ForwardBatch | None = None
        self._number = number
        self._kind = type(module).__name__
        self._call = module.forward
        self._names = list(inspect.signature(module.forward).parameters)
        self._keys = keys
        self._kernels = kernels

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Of hidden states of [1, N, hidden] → [1, N, 1] int32 on the host, the number of the
        indexer.

        Raises: UnsupportedModel: it does something else with the keys than our kernels.
        """
        batch = self.batch
        if batch is None:
            raise RuntimeError("an indexer outside of ModelRunner.forward")

        def store(keys: Tensor) -> None:
            self._kernels.store(keys, self._keys, batch.slot_mapping)

        scores = NotedScores(batch.block_tables.shape[1] * self._keys.shape[1], self._pick)
        given = dict(zip(self._names, args, strict=False)) | kwargs
        given |= {MASK: NotedMask(), CACHE: NewIndexKeys(store, scores)}
        try:
            number: Tensor = self._call(**given)
        except (AttributeError, TypeError) as error:
            raise UnsupportedModel(
                f"{self._kind} picks keys in a way that flexpert's kernels do not know ({error}); "
                "serve it with --device cpu"
            ) from error
        return number

    def _pick(self, scores: NotedScores, most: int) -> Tensor:
        """The `most` best keys of each row."""
        batch, query, weights = self.batch, scores.query, scores.weights
        assert batch is not None
        assert query is not None
        assert weights is not None
        query, weights = query[0].contiguous(), weights[0, :, 0].contiguous()
        rows, length, device = query.shape[0], scores.shape[2], query.device
        answer = torch.full((1, rows, 1), self._number, dtype=torch.int32)
        if most >= length:
            self.picked = None
            return answer
        tables = batch.query_start, batch.context_len, batch.block_tables
        decode = rows == batch.context_len.shape[0]
        places = torch.empty((rows, most), dtype=torch.int32, device=device)
        counts = torch.empty(rows, dtype=torch.int32, device=device)
        at_once = max(1, SCORES // length)
        for first in range(0, rows, at_once):
            some = slice(first, min(first + at_once, rows))
            found = self._kernels.score(
                query[some],
                weights[some],
                self._keys,
                *tables,
                first=first,
                decode=decode,
            )
            self._kernels.place(
                found.topk(most, dim=-1).indices,  # sorted: those that are not seen are the last
                *tables,
                places[some],
                counts[some],
                first=first,
                block_size=self._keys.shape[1],
                decode=decode,
            )
        self.picked = replace(
            batch,
            query_start=torch.arange(rows + 1, dtype=torch.int32, device=device),
            context_len=counts,
            block_tables=places,
            host=None,
        )
        return answer


class DeviceIndexedAttention(PagedAttention):
    """One attention layer over what an indexer picks.

    inner: attends to all keys. indexers: of the model, by their number.
    """

    cuts_prompts = True

    __slots__ = ("_indexers", "_inner", "_single")

    def __init__(self, inner: PagedAttention, indexers: Sequence[DeviceIndexer]) -> None:
        super().__init__(inner.key_cache, inner.value_cache, inner.kernel, isolated=inner.isolated)
        self._inner = inner
        self._single = copy.copy(inner)
        self._single.key_cache = of_one_token(inner.key_cache)
        self._single.value_cache = of_one_token(inner.value_cache)
        self._indexers = indexers

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
        """indices: [1, N, 1], what a `DeviceIndexer` gave; all else as of `inner`."""
        if not isinstance(indices, Tensor):
            raise RuntimeError("attention to picked keys, and none are picked")
        picked = self._indexers[int(indices[0, 0, 0])].picked
        layer = self._inner if picked is None else self._single
        layer.batch = picked or self.forward_batch
        return layer.attention(module, query, key, value, None, **options)
