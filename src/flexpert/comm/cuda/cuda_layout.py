"""Where everything lies inside a window on a GPU, and inside the table its kernels read (pure).

A window is one allocation, written by the peers and read by its owner:

    flags      dispatch [32] int64, combine, meeting, release and weights likewise: one for each
               source id
    formats    of the last dispatch [32] int64 and combine; see `dispatch_format`
    slots      [capacity, max_tokens, topk] int32    slot of each (token, choice) here; -1 none
    weights    [capacity, max_tokens, topk] float32; of the dispatch, or those of the combine
    scales     [capacity, max_tokens, hidden / 128]  float32; or one byte each
    rows       [capacity, max_tokens, row bytes]     packed by the row size of the exchange
    results    [capacity, max_tokens, hidden]        what a source returns, a partial sum a token
               [capacity, max_tokens, topk, hidden]  or a row for each choice ("home"), where there
                                                     is room for so many

A token's place is its index at home: sending allocates nothing, and receiving moves nothing.

A *mirror* stands for the window of a peer on another machine: memory of this one, with the same
layout but room for one source, whose lane is 0 (see host_lane.py).

The table is int64 and lives on the owner's GPU. The host rewrites its first part between two
exchanges; captured CUDA graphs read what is there when they are replayed. See `Word`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch

from flexpert.comm.buffer import BufferSpec, Scales
from flexpert.comm.quant import BLOCK
from flexpert.comm.window_layout import align, check_spec

LANES = 32  # ids that fit into one vector of the kernels
SECTION = 256  # bytes; where each part begins, for wide loads
MAX_TOKENS = 2**16 - 1
MAX_EPOCH = 2**22 - 1
MAX_LINK = 2**12 - 1

# A flag: epoch (22 bits), link (12), sequence (12), tokens (16). Where links begin without a vote,
# epoch and link are one number (34 bits) with UNVOTED; see link_tags.py.
EPOCH_SHIFT, LINK_SHIFT, SEQUENCE_SHIFT = 40, 28, 16
UNVOTED = 1 << 62

DISPATCH, COMBINE, MEETING, RELEASE = 1, 2, 3, 4  # phases, as a report names them
PHASES = {DISPATCH: "dispatch", COMBINE: "combine", MEETING: "vote", RELEASE: "unmask"}
DISPATCH_FLAGS_AT, COMBINE_FLAGS_AT, MEETING_FLAGS_AT = 0, LANES * 8, 2 * LANES * 8
RELEASE_FLAGS_AT, WEIGHTS_FLAGS_AT = 3 * LANES * 8, 4 * LANES * 8
DISPATCH_FORMATS_AT, COMBINE_FORMATS_AT = 5 * LANES * 8, 6 * LANES * 8
SLOTS_AT = 7 * LANES * 8


class Word(IntEnum):
    """The table: vectors of `LANES` words, one word for each id. Begin of each, in words.

    Written by the host: PEER (address of the window, 0 not connected), ACTIVE (1 takes part), TAG
    (epoch and link of the flags), LIMIT (word 0: nanoseconds; 1: address of the page), ENDED (tag
    of the link that the peer must have given up before this one begins; 0: none), LANE (where this
    rank's parts lie in that window: its id; 0 in a mirror), INBOX (where what the peer sends comes:
    the own window; a lane of the host's memory for one on another machine; 0 not connected).
    Advanced by the kernels: SEQUENCE, ARRIVED (tokens of the last dispatch; -1 nothing came),
    RETURNED (1: its results are here, as asked; 2: partial sums where each could choose),
    MEETINGS; WAITED_DISPATCH, WAITED_COMBINE: nanoseconds from the begins of all waits until that
    peer's flag was seen.
    """

    PEER = 0
    ACTIVE = 1 * LANES
    TAG = 2 * LANES
    LIMIT = 3 * LANES
    ENDED = 4 * LANES
    LANE = 5 * LANES
    INBOX = 6 * LANES
    SEQUENCE = 7 * LANES
    ARRIVED = 8 * LANES
    RETURNED = 9 * LANES
    MEETINGS = 10 * LANES
    WAITED_DISPATCH = 11 * LANES
    WAITED_COMBINE = 12 * LANES


HOST_WORDS = int(Word.SEQUENCE)
TABLE_WORDS = 13 * LANES
SIM_NS = 250_000  # of one look in Triton's interpreter, roughly


class Page(IntEnum):
    """The page: int64 in pinned host memory, seen from both sides while kernels run.

    REPORT: written by kernels: tag and phase of the exchange in which nothing came from an id.
    GONE: written by the host: waiting for this id is in vain. STOP (word 0): every wait is.
    """

    REPORT = 0
    GONE = LANES
    STOP = 2 * LANES


PAGE_WORDS = 3 * LANES

_FP8_KIND: dict[Scales | None, int] = {None: 0, "float32": 1, "power2": 2, "ue8m0": 3}


def fp8_kind(fp8: Scales | None) -> int:
    """The number that kernels know a kind of scales by; 0: rows as they are."""
    return _FP8_KIND[fp8]


def scale_bytes(hidden: int, fp8: Scales | None) -> int:
    """Of one row."""
    return 0 if fp8 is None else hidden // BLOCK * (1 if fp8 == "ue8m0" else 4)


def dispatch_format(choices: int, row: int, fp8: Scales | None) -> int:
    """How a dispatch is packed: choices between two tokens, bytes of a row, kind of scales."""
    return choices << 40 | row << 8 | fp8_kind(fp8)


def read_dispatch_format(word: int) -> tuple[int, int, Scales | None]:
    """(choices, bytes of a row, scales). Raises: ValueError: no such kind of scales."""
    kinds = {number: kind for kind, number in _FP8_KIND.items()}
    if word & 0xFF not in kinds:
        raise ValueError(f"scales of kind {word & 0xFF}")
    return word >> 40, (word >> 8) & 0xFFFFFFFF, kinds[word & 0xFF]


def combine_format(choices: int, *, home: bool) -> int:
    """How a combine is packed: choices between two tokens; whether it has a row for each."""
    return choices << 8 | home


def read_combine_format(word: int) -> tuple[int, bool]:
    """(choices, whether there is a row for each)."""
    return word >> 8, bool(word & 1)


@dataclass(frozen=True, slots=True)
class CudaLayout:
    """Offsets in bytes from the start of a window, and its size."""

    weights_at: int
    scales_at: int
    rows_at: int
    results_at: int
    size: int


def check(spec: BufferSpec) -> None:
    """Raises: ValueError: a value is out of its range."""
    check_spec(spec)
    if spec.capacity > LANES:
        raise ValueError(
            f"capacity is {spec.capacity}; backend 'cuda' takes at most {LANES} ranks of one host"
        )
    if spec.max_tokens > MAX_TOKENS:
        raise ValueError(f"max_tokens is {spec.max_tokens}, must be at most {MAX_TOKENS}")
    if spec.hidden * spec.dtype.itemsize % 4:
        raise ValueError(f"backend 'cuda' needs rows of whole 4 bytes; hidden is {spec.hidden}")


def layout(spec: BufferSpec, *, choices: int | None = None) -> CudaLayout:
    """choices: result rows of a token that one rank has room to send; default: all, `spec.topk`."""
    check(spec)
    tokens = spec.capacity * spec.max_tokens
    row = spec.hidden * spec.dtype.itemsize
    weights_at = align(SLOTS_AT + tokens * spec.topk * 4, SECTION)
    scales_at = align(weights_at + tokens * spec.topk * 4, SECTION)
    rows_at = align(scales_at + tokens * (spec.hidden // BLOCK) * 4, SECTION)
    results_at = align(rows_at + tokens * row, SECTION)
    size = align(results_at + tokens * row * min(choices or spec.topk, spec.topk), SECTION)
    return CudaLayout(weights_at, scales_at, rows_at, results_at, size)


def tag(epoch: int, link: int) -> int:
    """The part of a flag that the host knows.

    Raises: ValueError: an epoch or link that does not fit.
    """
    if not 0 <= epoch <= MAX_EPOCH or not 0 <= link <= MAX_LINK:
        raise ValueError(f"epoch {epoch} (most {MAX_EPOCH}) or link {link} does not fit a flag")
    return epoch << EPOCH_SHIFT | link << LINK_SHIFT


def tag_of_number(number: int) -> int:
    """One number instead of epoch and link. number: below 2**34."""
    return number << LINK_SHIFT


@dataclass(frozen=True, slots=True)
class Missing:
    """What a kernel reported: nothing came from `rank` in `phase`."""

    rank: int
    phase: str


def read_report(page: torch.Tensor) -> list[Missing]:
    """What the kernels have reported in this epoch. page: [PAGE_WORDS] int64."""
    words = page[Page.REPORT : Page.REPORT + LANES].tolist()
    return [Missing(rank, PHASES[word & 0xF]) for rank, word in enumerate(words) if word]
