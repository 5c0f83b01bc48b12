"""Where everything lies inside a window. Pure: numbers in, numbers out.

A window is one sparse file:

    control                       one page and up; mapped by every connected peer
      header                        magic, spec hash, nonce, rank; written once by the owner
      doorbell, waiters             the futex word peers ring, and whether the owner sleeps on it
      votes           [source, 4]   one cache line each: tag, length, payload
      dispatch flags  [source]      one cache line each: tag, rows
      combine flags   [source]      one cache line each: tag, reduce mode, rows
    regions           [source]    page-aligned; each mapped by the owner and by that source only
      metas           [max_tokens]  per row: slots [topk] int32 (-1 = none), weights [topk] float32
      rows            [max_tokens]  hidden states, packed, each aligned to 64 bytes
      results         [max_tokens * topk]  what the source returns in combine, packed

The file is sparse, so a byte costs memory only once it was written: capacity is free, and the
packed results take `tokens` rows with reduce="rank" and one row per (token, expert) with
reduce="home".

Why results lie in the region of their source, and not in one table [max_tokens, topk] of the home:
a rank that was evicted while it stalled may wake in the middle of a copy. What it still writes then
falls into its own region, which nobody reads any more, and never between the rows of the survivors.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch

from flexpert.comm.buffer import BufferSpec

MAGIC = b"flexpert"
VERSION = 1
PAGE = 4096
LINE = 64

# Header, bytes from the start of the window.
MAGIC_AT = 0
SPEC_HASH_AT = 8
NONCE_AT = 16
RANK_AT = 32
HEADER_BYTES = 36
DOORBELL_AT = 64
WAITERS_AT = 128
VOTES_AT = 256

HASH_BYTES = 8
NONCE_BYTES = 16
VOTE_SLOTS = 4
VOTE_BYTES = 48

MAX_CAPACITY = 256
MAX_TOPK = 64
MAX_ROWS = 2**31 - 1  # pairs of (token, expert) a rank may receive: int32 offsets

DTYPES: dict[torch.dtype, int] = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}


def align(size: int, unit: int) -> int:
    return -(-size // unit) * unit


def check_spec(spec: BufferSpec) -> None:
    """Raises: ValueError: a value is out of its range."""
    if not 1 <= spec.capacity <= MAX_CAPACITY:
        raise ValueError(f"capacity is {spec.capacity}, must be 1 to {MAX_CAPACITY}")
    if not 1 <= spec.topk <= MAX_TOPK:
        raise ValueError(f"topk is {spec.topk}, must be 1 to {MAX_TOPK}")
    if spec.max_tokens < 1 or spec.hidden < 1:
        raise ValueError(
            f"max_tokens ({spec.max_tokens}) and hidden ({spec.hidden}) must be at least 1"
        )
    if spec.dtype not in DTYPES:
        raise ValueError(f"dtype is {spec.dtype}, must be bfloat16, float16 or float32")
    if spec.capacity * spec.max_tokens * spec.topk > MAX_ROWS:
        raise ValueError("capacity * max_tokens * topk must stay below 2**31")


def spec_hash(spec: BufferSpec) -> bytes:
    """Equal on two ranks exactly if their windows have the same layout."""
    sizes = (spec.capacity, spec.max_tokens, spec.hidden, spec.topk, DTYPES[spec.dtype])
    text = "/".join(map(str, (VERSION, *sizes)))
    return hashlib.sha256(text.encode()).digest()[:HASH_BYTES]


@dataclass(frozen=True, slots=True)
class Layout:
    """Offsets and sizes in bytes. `*_at` of flags count from the window, others from the region."""

    row_bytes: int
    row_stride: int
    meta_stride: int
    dispatch_flags_at: int
    combine_flags_at: int
    control_bytes: int
    rows_at: int
    results_at: int
    region_bytes: int
    size_bytes: int

    def region_at(self, source: int) -> int:
        return self.control_bytes + source * self.region_bytes


def layout(spec: BufferSpec) -> Layout:
    check_spec(spec)
    row_bytes = spec.hidden * spec.dtype.itemsize
    row_stride = align(row_bytes, LINE)
    meta_stride = spec.topk * 8
    dispatch_flags_at = VOTES_AT + spec.capacity * VOTE_SLOTS * LINE
    combine_flags_at = dispatch_flags_at + spec.capacity * LINE
    control_bytes = align(combine_flags_at + spec.capacity * LINE, PAGE)
    rows_at = align(spec.max_tokens * meta_stride, LINE)
    results_at = align(rows_at + spec.max_tokens * row_stride, PAGE)
    region_bytes = align(results_at + spec.max_tokens * spec.topk * row_stride, PAGE)
    return Layout(
        row_bytes=row_bytes,
        row_stride=row_stride,
        meta_stride=meta_stride,
        dispatch_flags_at=dispatch_flags_at,
        combine_flags_at=combine_flags_at,
        control_bytes=control_bytes,
        rows_at=rows_at,
        results_at=results_at,
        region_bytes=region_bytes,
        size_bytes=control_bytes + spec.capacity * region_bytes,
    )


def size_bytes(spec: BufferSpec) -> int:
    """Address space of a window: the most it could ever hold, not what it takes."""
    return layout(spec).size_bytes
