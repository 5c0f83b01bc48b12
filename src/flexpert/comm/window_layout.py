"""Where everything lies inside a window. Pure: numbers in, numbers out.

A window is one sparse file that only grows:

    control                       mapped by every connected peer
      header                        magic, spec hash, nonce, rank; written once by the owner
      doorbell, waiters             the futex word peers ring, and whether the owner sleeps on it
      leases          [256]         for each source: the place exported to it, and to which process
      link memory     [256]         for each peer on another machine: where the memory of the link
                                    to it lies, for siblings (see host/relays.py)
      version                       of the shared results, see kernels.c
    shared rows                   what peers read where the owner wrote it; only the owner writes
      tokens        [max_tokens]    payloads of a dispatch, by token
      results       [4 * max_tokens * topk]  of the owner's experts
    places                        page-aligned; each mapped by the owner and by one source
      lines                         one cache line each, written by the source:
        hello                         the state of the link, see kernels.c
        votes         [4]             tag, length, payload
        dispatch, combine flag        tag, rows, mode, bytes of a row
        relayed flags [256]           dispatch flags of other ranks that the source hands on
      rows            [max_tokens]  meta and payload of one token, together, so that what a source
                                    sends is one piece; without the payload where that is shared
        meta                          token index, router weights [topk] float32, slots [topk]
                                      int16, owners [topk] uint8
        payload                       hidden state, quantised or not, or any bytes
      results         [max_tokens * topk]  what the source returns in combine, packed, or where
                                    among its shared results each lies (int32); in the
                                    memory of a link, behind max_tokens of them, also what a gateway
                                    adds up: partial sums [max_tokens] in float32

The file is sparse, so a byte costs memory only once it was written, and nothing in it depends on
the capacity: ids may grow without a word to the peers.

Why a place belongs to one connection and is never exported again: a rank that was evicted while it
stalled may wake in the middle of a copy, even after its id was given to another process. What it
still writes then falls into its own old place, which nobody reads any more.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch

from flexpert.comm.buffer import BufferSpec

MAGIC = b"flexpert"
VERSION = 4
PAGE = 4096
LINE = 64

MAX_CAPACITY = 256
MAX_TOPK = 64
MAX_ROWS = 2**31 - 1  # pairs of (token, expert) a rank may receive: int32 offsets

# Control, bytes from the start of the window.
MAGIC_AT = 0
SPEC_HASH_AT = 8
NONCE_AT = 16
RANK_AT = 32
HEADER_BYTES = 36
DOORBELL_AT = 64
WAITERS_AT = 128
LEASES_AT = 256
LEASE_BYTES = 32
LINK_MEMORY_AT = LEASES_AT + MAX_CAPACITY * LEASE_BYTES
SHARED_VERSION_AT = LINK_MEMORY_AT + MAX_CAPACITY * LINE
CONTROL_BYTES = -(-(SHARED_VERSION_AT + LINE) // PAGE) * PAGE

RESULTS_SHARE = 4  # shared results, in times max_tokens * topk: for a rank with so large a part

# A place, bytes from its start.
VOTE_LINES = 4
HELLO_AT = 0
VOTES_AT = LINE
DISPATCH_FLAG_AT = VOTES_AT + VOTE_LINES * LINE
COMBINE_FLAG_AT = DISPATCH_FLAG_AT + LINE
RELAYED_FLAGS_AT = COMBINE_FLAG_AT + LINE
ROWS_AT = RELAYED_FLAGS_AT + MAX_CAPACITY * LINE

HASH_BYTES = 8
NONCE_BYTES = 16
VOTE_BYTES = 48

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
    sizes = (spec.max_tokens, spec.hidden, spec.topk, DTYPES[spec.dtype])
    text = "/".join(map(str, (VERSION, *sizes)))
    return hashlib.sha256(text.encode()).digest()[:HASH_BYTES]


@dataclass(frozen=True, slots=True)
class WindowLayout:
    """Offsets and sizes in bytes."""

    row_bytes: int  # of a hidden state in spec.dtype
    meta_bytes: int
    result_stride: int
    results_at: int
    partials_at: int
    partial_stride: int  # of a sum in float32
    place_bytes: int
    shared_results: int  # rows
    shared_results_at: int  # from the start of the shared rows, which begin behind the control part
    shared_bytes: int

    def place_at(self, place: int) -> int:
        """From the start of the window."""
        return CONTROL_BYTES + self.shared_bytes + place * self.place_bytes


def layout(spec: BufferSpec) -> WindowLayout:
    check_spec(spec)
    row_bytes = spec.hidden * spec.dtype.itemsize
    result_stride = align(row_bytes, LINE)
    partial_stride = align(spec.hidden * 4, LINE)
    results = spec.topk * result_stride  # of a token; or, for a gateway, one and its partial sum
    if spec.topk > 1:
        results = max(results, result_stride + partial_stride)
    meta_bytes = align(8 + 7 * spec.topk, LINE)
    results_at = align(ROWS_AT + spec.max_tokens * (meta_bytes + result_stride), PAGE)
    shared_results = RESULTS_SHARE * spec.max_tokens * spec.topk
    shared_results_at = align(spec.max_tokens * result_stride, PAGE)
    return WindowLayout(
        row_bytes=row_bytes,
        meta_bytes=meta_bytes,
        result_stride=result_stride,
        results_at=results_at,
        partials_at=results_at + spec.max_tokens * result_stride,
        partial_stride=partial_stride,
        place_bytes=align(results_at + spec.max_tokens * results, PAGE),
        shared_results=shared_results,
        shared_results_at=shared_results_at,
        shared_bytes=align(shared_results_at + shared_results * row_bytes, PAGE),
    )


def size_bytes(spec: BufferSpec) -> int:
    """Address space of a window with all ids connected: what it could take, not what it takes."""
    return layout(spec).place_at(spec.capacity)
