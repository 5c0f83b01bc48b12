"""The C kernels of ops.c, taking tensors: linear layers, RMS norm and paged attention on a CPU.

The bits of each result row depend on that row's operands only, never on what shares the call.
Callers check shapes once, when weights are loaded; these are the hot path.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor

from flexpert.errors import FlexpertError
from flexpert.kernels.weight_formats import WeightFormat, format_of


class _Absent:
    """Stands for the C extension where it cannot be loaded; a GPU needs none of it."""

    def __init__(self, reason: ImportError) -> None:
        self._reason = reason

    def __getattr__(self, name: str) -> Any:
        raise FlexpertError(
            f"the kernels for CPUs cannot be loaded ({self._reason}): install flexpert with pip, "
            "or build them with `python setup.py build_ext --inplace`"
        )


try:
    from flexpert.kernels.cpu._ops import ffi as ffi
    from flexpert.kernels.cpu._ops import lib as lib
except ImportError as error:
    ffi = lib = _Absent(error)

DTYPES: Final = {torch.float32: 0, torch.bfloat16: 1}
"""What the kernels compute; products and sums are float32 in either case."""

_NO_SCRATCH: Final = "no memory for the scratch of a CPU kernel"


@functools.cache
def instruction_set() -> str:
    """Which copy of the kernels this process uses: portable, avx2, avx512 or amx."""
    return str(ffi.string(lib.fx_instruction_set()).decode())


def set_threads(threads: int) -> None:
    """How many threads a large product or attention may have in this process, the caller's among
    them; they are made when they are first needed, and sleep in between. The bits of a result do
    not depend on it."""
    lib.fx_set_threads(threads)


_FORMATS: Final = {"mxfp4": 1, "int8": 2, "int4": 3}
"""Formats of weights that the kernels unpack, as packed.c numbers them."""


def unpacks(weights: WeightFormat) -> bool:
    """Whether there are products with weights of a format."""
    return weights.name in _FORMATS


class WeightTable:
    """Addresses of equally shaped weights; moving an expert changes a pointer, nothing else.

    Args:
        weights: of [out, in] each, contiguous, bf16 or f32; or in a format that `unpacks`. Kept
            alive by the table, as are scales and biases.
        biases: of [out] each, of x's dtype, or None.
        scales: of weights in a format, else None.
        fixed: a row's product has the same bits whatever shares the call; else a few rows may be
            computed otherwise, and sooner, than many.

    table: the `weight_table *` of tables.h.
    """

    __slots__ = (
        "_addresses",
        "biases",
        "format",
        "in_features",
        "out_features",
        "scales",
        "slots",
        "table",
        "weights",
    )

    def __init__(
        self,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor] | None,
        scales: Sequence[Tensor] | None = None,
        *,
        fixed: bool = True,
    ) -> None:
        self.slots = len(weights)
        self.format = format_of(weights[0], scales[0] if scales else None) if weights else None
        self.out_features, self.in_features = weights[0].shape if weights else (0, 0)
        if self.format is not None:
            self.in_features *= self.format.elements
        for weight in weights:
            if weight.shape != weights[0].shape or weight.dtype != weights[0].dtype:
                raise ValueError("the experts of a layer must have equal shapes and dtypes")
            if not weight.is_contiguous():
                raise ValueError("expert weights must be contiguous")
        self._check_scales(scales)
        for bias in biases or ():
            if bias.dtype not in DTYPES or bias.shape != (self.out_features,):
                raise ValueError(f"a bias must be [{self.out_features}] in bf16 or f32")
            if self.format is None and bias.dtype != weights[0].dtype:
                raise ValueError(f"a bias must be {weights[0].dtype}, as the weights are")
        self.weights = tuple(weights)
        self.scales = tuple(scales) if scales else None
        self.biases = tuple(b.contiguous() for b in biases) if biases else None
        self._addresses = [_addresses(of) for of in (self.weights, self.scales, self.biases)]
        self.table = ffi.new("weight_table *")
        table = self.table
        table.weights, table.scales, table.biases = map(_pointer, self._addresses)
        table.groups, table.fixed = self.slots, fixed
        table.in_features, table.out_features = self.in_features, self.out_features
        if self.format is not None:
            table.format, table.shared = _FORMATS[self.format.name], self.format.group

    def _check_scales(self, scales: Sequence[Tensor] | None) -> None:
        if self.format is None:
            if scales:
                raise ValueError("weights of this dtype have no scales")
            return
        if not unpacks(self.format):
            raise ValueError(f"a CPU does not compute with weights in {self.format.name}")
        shape = self.format.scales_of(self.out_features, self.in_features)
        given: list[Tensor | None] = [*scales] if scales else [None]
        for scale in given:
            if (
                scale is None
                or scale.shape != shape
                or scale.dtype != self.format.scale_dtype
                or not scale.is_contiguous()
            ):
                raise ValueError(
                    f"weights in {self.format.name} must have scales of {list(shape)} "
                    f"{self.format.scale_dtype}, contiguous"
                )

    def whole(self, slot: int, dtype: torch.dtype) -> Tensor:
        """[out, in] of a slot's weights as they are computed with; made anew where they are
        packed."""
        if self.format is None or self.scales is None:
            return self.weights[slot]
        return self.format.restore(self.weights[slot], self.scales[slot]).to(dtype)

    def linear(self, x: Tensor, offsets: Tensor) -> Tensor:
        """y[r] = x[r] · weight[slot of r]ᵀ + bias[slot of r].

        Args:
            x: [rows, in] of the weights' dtype (bf16 or f32 where they are in a format),
                contiguous, sorted by slot.
            offsets: [slots + 1] int32; rows of slot s are offsets[s] … offsets[s+1]-1.

        Returns:
            [rows, out] of x's dtype.
        """
        y = x.new_empty((x.shape[0], self.out_features))
        begins = offsets.data_ptr()
        self._call(x, begins, begins + offsets.element_size(), y)
        return y

    def linear_ranges(self, x: Tensor, begins: Tensor, ends: Tensor, y: Tensor) -> None:
        """As `linear`, for rows begins[s] … ends[s]-1 of each slot s only.

        Args:
            begins, ends: [slots] int32, contiguous.
            y: [rows, out], to fill.
        """
        self._call(x, begins.data_ptr(), ends.data_ptr(), y)

    def _call(self, x: Tensor, begins: int, ends: int, y: Tensor) -> None:
        if lib.fx_grouped(self.table, x.data_ptr(), begins, ends, y.data_ptr(), DTYPES[x.dtype]):
            raise MemoryError(_NO_SCRATCH)


def _addresses(tensors: Sequence[Tensor] | None) -> Tensor | None:
    if tensors is None:
        return None
    return torch.tensor([t.data_ptr() for t in tensors], dtype=torch.int64, device="cpu")


def _pointer(table: Tensor | None) -> int:
    return 0 if table is None else table.data_ptr()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x · weightᵀ + bias, each row's bits independent of the others.

    Args:
        x: [..., in]; weight: [out, in]; bias: [out] or None; all bf16 or all f32.

    Returns:
        [..., out] of x's dtype.
    """
    x = x.contiguous()
    weight = weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    out_features, in_features = weight.shape
    y = x.new_empty((*x.shape[:-1], out_features))
    failed = lib.fx_linear(
        x.data_ptr(),
        weight.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        y.data_ptr(),
        y.numel() // out_features if out_features else 0,
        in_features,
        out_features,
        DTYPES[x.dtype],
    )
    if failed:
        raise MemoryError(_NO_SCRATCH)
    return y


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, early: bool) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight over the last dimension, in float32.

    Args:
        x: [..., n]; weight: [n], contiguous; both bf16 or both f32.
        early: round to x's dtype before the multiplication by weight as well as after.

    Returns:
        [..., n] of x's dtype.
    """
    x = x.contiguous()
    y = torch.empty_like(x)
    n = weight.shape[0]
    lib.fx_rms_norm(
        x.data_ptr(),
        weight.data_ptr(),
        y.data_ptr(),
        x.numel() // n,
        n,
        eps,
        early,
        DTYPES[x.dtype],
    )
    return y


def paged_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    query_start: Tensor,
    context_len: Tensor,
    block_tables: Tensor,
    slot_mapping: Tensor,
    *,
    scaling: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """Append this step's keys and values to the cache, then attend causally over it.

    All floating tensors have one dtype, bf16 or f32. N tokens of S sequences, packed.

    Args:
        query: [N, heads, key_dim]; last dimension contiguous, as for key and value.
        key: [N, kv_heads, key_dim].
        value: [N, kv_heads, value_dim].
        key_cache: [blocks, block_size, kv_heads, key_dim], contiguous.
        value_cache: [blocks, block_size, kv_heads, value_dim], contiguous; or the first part of
            `key_cache`, where value is that of key.
        query_start: [S + 1] int32. Tokens from query_start[S] on are padding: not touched.
        context_len: [S] int32, tokens in the cache after this step; a sequence's rows are its last.
        block_tables: [S, max_blocks] int32.
        slot_mapping: [N] int64, where each token's key and value go; -1 = nowhere.
        window: keys each row sees, itself included; 0 = all; negative: those of its own chunk,
            which begins at a multiple of -window.
        softcap: scores become softcap · tanh(score / softcap); 0 = off.
        sinks: [heads] scores of a key whose value is zero, or None.

    Returns:
        [N, heads, value_dim].
    """
    tokens, heads, key_dim = query.shape
    _, kv_heads, value_dim = value.shape
    out = query.new_empty((tokens, heads, value_dim))
    query_strides, key_strides, value_strides = query.stride(), key.stride(), value.stride()
    failed = lib.fx_paged_attention(
        query.data_ptr(),
        key.data_ptr(),
        value.data_ptr(),
        key_cache.data_ptr(),
        value_cache.data_ptr(),
        query_start.data_ptr(),
        context_len.data_ptr(),
        block_tables.data_ptr(),
        slot_mapping.data_ptr(),
        0 if sinks is None else sinks.data_ptr(),
        out.data_ptr(),
        query_strides[0],
        query_strides[1],
        key_strides[0],
        key_strides[1],
        value_strides[0],
        value_strides[1],
        context_len.shape[0],
        block_tables.shape[1],
        key_cache.shape[1],
        heads,
        kv_heads,
        key_dim,
        value_dim,
        value_dim if value_cache.is_contiguous() else value_cache.stride(2),
        window,
        scaling,
        softcap,
        DTYPES[query.dtype],
    )
    if failed:
        raise MemoryError(_NO_SCRATCH)
    return out
