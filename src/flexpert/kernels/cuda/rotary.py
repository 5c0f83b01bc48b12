"""Norm, rotary embedding and cache write of a step's queries, keys and values in one kernel.

Rounds where a model that works in bf16 does: after the norm, after each product and after their
sum, so that the result has the bits of transformers' dozen of kernels.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_HEADS = 8  # of a program


@triton.jit
def _rounded(x, like):
    return x.to(like.dtype.element_ty).to(tl.float32)


@triton.jit
def _rotate_and_store(
    qkv,
    cos,
    sin,
    query_weight,
    key_weight,
    slot_mapping,
    query,
    key_cache,
    value_cache,
    eps,
    QUERY: tl.constexpr,
    KEY: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    HEADS: tl.constexpr,
    ANGLES: tl.constexpr,
    NORMED: tl.constexpr,
    EARLY: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    d = tl.arange(0, DIM_PAD)[None, :]
    other = (d + DIM // 2) % DIM
    ok = (head < QUERY + 2 * KEY) & (d < DIM)
    is_query = head < QUERY
    is_value = head >= QUERY + KEY
    row = qkv + (token * (QUERY + 2 * KEY) + head) * DIM
    given = tl.load(row + d, mask=ok, other=0.0)
    x = given.to(tl.float32)
    y = tl.load(row + other, mask=ok, other=0.0).to(tl.float32)
    if NORMED:
        scale = tl.rsqrt(tl.sum(x * x, 1) / DIM + eps)[:, None]
        x = x * scale
        y = y * scale
        if EARLY:
            x = _rounded(x, qkv)
            y = _rounded(y, qkv)
        wide = d < DIM
        wx = tl.where(
            is_query,
            tl.load(query_weight + d, mask=wide, other=0.0).to(tl.float32),
            tl.load(key_weight + d, mask=wide, other=0.0).to(tl.float32),
        )
        wy = tl.where(
            is_query,
            tl.load(query_weight + other, mask=wide, other=0.0).to(tl.float32),
            tl.load(key_weight + other, mask=wide, other=0.0).to(tl.float32),
        )
        x = _rounded(x * wx, qkv)
        y = _rounded(y * wy, qkv)
    angle = token * ANGLES + d % ANGLES
    c = tl.load(cos + angle, mask=d < DIM, other=0.0).to(tl.float32)
    s = tl.load(sin + angle, mask=d < DIM, other=0.0).to(tl.float32)
    turned = tl.where(d < DIM // 2, -y, y)
    result = _rounded(x * c, qkv) + _rounded(turned * s, qkv)
    result = tl.where(is_value, given.to(tl.float32), result).to(qkv.dtype.element_ty)

    tl.store(query + (token * QUERY + head) * DIM + d, result, mask=ok & is_query)
    slot = tl.load(slot_mapping + token)
    if slot >= 0:
        key = key_cache + (slot * KEY + head - QUERY) * DIM + d
        tl.store(key, result, mask=ok & (head >= QUERY) & (head < QUERY + KEY))
        value = value_cache + (slot * KEY + head - QUERY - KEY) * DIM + d
        tl.store(value, result, mask=ok & is_value)


def rotate_and_store(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    slot_mapping: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    *,
    norms: tuple[Tensor, Tensor] | None,
    eps: float,
    early: bool,
) -> Tensor:
    """Queries ready for attention; keys and values go to the cache.

    Args:
        qkv: [N, heads + 2 * kv_heads, dim], contiguous: queries, keys, values.
        cos, sin: [N, dim] contiguous, of rotations of (d, d + dim / 2) pairs; or [N, dim / 2], of
            which both of a pair take the same.
        slot_mapping: [N] int64, where each token's key and value go; -1 = nowhere.
        key_cache, value_cache: [blocks, block_size, kv_heads, dim], contiguous.
        norms: ([dim], [dim]) weights of the RMS norms of queries and keys, or None.
        eps, early: of the norms; see `norm.rms_norm`.

    Returns:
        [N, heads, dim] queries.
    """
    tokens, every, dim = qkv.shape
    kv_heads = key_cache.shape[2]
    heads = every - 2 * kv_heads
    query = qkv.new_empty((tokens, heads, dim))
    if tokens == 0:
        return query
    query_weight, key_weight = norms or (cos, cos)
    _rotate_and_store[(tokens, triton.cdiv(every, _HEADS))](
        qkv,
        cos,
        sin,
        query_weight,
        key_weight,
        slot_mapping,
        query,
        key_cache,
        value_cache,
        eps,
        QUERY=heads,
        KEY=kv_heads,
        DIM=dim,
        DIM_PAD=triton.next_power_of_2(dim),
        HEADS=_HEADS,
        ANGLES=cos.shape[1],
        NORMED=norms is not None,
        EARLY=early,
        num_warps=4,
    )
    return query
