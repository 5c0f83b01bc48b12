"""What all kernels of the exchange share, and how one program of a rank waits for its peers.

An exchange is four launches, and each phase may be split between its two:

    dispatch.py   send_dispatch   a program for each (token, piece of its row): the row, quantised
                                  on the way, and which slots it is for; the last raises the flags
                  index_rows      a program for each slot: which rows are for it, in a fixed order
    combine.py    send_combine    partial sums (or rows) of the tokens that came, written to their
                                  homes; flags
                  reduce          the sums of the own tokens

Who waits. Exactly one program of a rank waits for peers, ever: an extra one of the sending kernel
(or a kernel of its own, when a phase is split). It decides once for each peer whether something
came, notes that in the table, and what follows in the stream goes by the note. So all programs of
a rank agree on who was there; and ranks that share one GPU cannot starve each other, because
what waits takes one program's room and everything else runs to its end.

Waits end. They are bounded by the clock. After a short while the waiting program also looks at a
page in host memory, where the host says that a peer's process has exited, or that all is to stop.
Nothing traps: whoever did not come is reported on that page and left out from then on, so that the
rest of a captured graph does not wait for it again.

Order. A program writes its rows, meets at a barrier, and adds itself to a counter with release and
acquire in the GPU's scope; who completes the count raises the flags with release in the system's
scope. Causality in the memory model is transitive, so that the peer, which reads the flag with
acquire in the system's scope, sees what all programs wrote.

Why one window is enough: see comm/host/kernels.c; the order of flags is the same. Flags carry
(epoch, link, sequence) and must be equal to what is expected. The sequence lives in the table and
is advanced by `index_rows`, so that each replay of a captured graph is an exchange of its own.

SIM: in Triton's interpreter programs run one after another, and time is the number of looks.
"""

# Triton reads these functions: constants are in capitals, and nothing is annotated but constants.
# ruff: noqa: RET505
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, no-any-return"

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import globaltimer

from flexpert.comm.cuda import cuda_layout as at
from flexpert.comm.cuda.cuda_layout import Page, Word
from flexpert.comm.interpreter import mend

mend()

LANES = tl.constexpr(at.LANES)
PEER = tl.constexpr(int(Word.PEER))
ACTIVE = tl.constexpr(int(Word.ACTIVE))
_TAG = tl.constexpr(int(Word.TAG))
_LIMIT = tl.constexpr(int(Word.LIMIT))
_WAITED_DISPATCH = tl.constexpr(int(Word.WAITED_DISPATCH))
_WAITED_COMBINE = tl.constexpr(int(Word.WAITED_COMBINE))
_SIM_NS = tl.constexpr(at.SIM_NS)
_ENDED = tl.constexpr(int(Word.ENDED))
LANE = tl.constexpr(int(Word.LANE))
INBOX = tl.constexpr(int(Word.INBOX))
SEQUENCE = tl.constexpr(int(Word.SEQUENCE))
ARRIVED = tl.constexpr(int(Word.ARRIVED))
RETURNED = tl.constexpr(int(Word.RETURNED))
_MEETINGS = tl.constexpr(int(Word.MEETINGS))
_REPORT = tl.constexpr(int(Page.REPORT))
_GONE = tl.constexpr(int(Page.GONE))
_STOP = tl.constexpr(int(Page.STOP))
_SEQUENCE_SHIFT = tl.constexpr(at.SEQUENCE_SHIFT)
_DISPATCH = tl.constexpr(at.DISPATCH)
_COMBINE = tl.constexpr(at.COMBINE)
_MEETING = tl.constexpr(at.MEETING)
_RELEASE = tl.constexpr(at.RELEASE)
DISPATCH_FLAGS = tl.constexpr(at.DISPATCH_FLAGS_AT)
COMBINE_FLAGS = tl.constexpr(at.COMBINE_FLAGS_AT)
DISPATCH_FORMATS = tl.constexpr(at.DISPATCH_FORMATS_AT)
COMBINE_FORMATS = tl.constexpr(at.COMBINE_FORMATS_AT)
_MEETING_FLAGS = tl.constexpr(at.MEETING_FLAGS_AT)
_WEIGHTS_FLAGS = tl.constexpr(at.WEIGHTS_FLAGS_AT)
_RELEASE_FLAGS = tl.constexpr(at.RELEASE_FLAGS_AT)
SLOTS = tl.constexpr(at.SLOTS_AT)
COUNTERS = tl.constexpr(at.LANES)  # words between two counters: a cache line for each
_IMPATIENT_NS = tl.constexpr(50_000)


@triton.jit
def _address(table, word, kind: tl.constexpr):
    return tl.load(table + word).to(tl.pointer_type(kind))


@triton.jit
def part_of(window, AT: tl.constexpr, kind: tl.constexpr):
    """A part of a window: parts begin at whole sections, and the compiler must know, or it writes
    byte by byte."""
    return tl.multiple_of((window + AT).to(tl.pointer_type(kind)), 16)


@triton.jit
def tag_of(table, ids, ahead, CHECKS: tl.constexpr):
    """Of this exchange, for one id or a vector of them. ahead: 1 until index_rows has counted."""
    count = ((tl.load(table + SEQUENCE + ids) + ahead) & 0xFFF) << _SEQUENCE_SHIFT
    if CHECKS:
        count = count | tl.load(table + _TAG + ids)
    return count


@triton.jit
def active_of(table, ids, R: tl.constexpr, CHECKS: tl.constexpr):
    if CHECKS:
        return tl.load(table + ACTIVE + ids) != 0
    else:
        return ids < R


@triton.jit
def _now(polls, SIM: tl.constexpr):
    if SIM:
        return polls
    else:
        return globaltimer()


@triton.jit
def _look(flags, near, far):
    """The host writes those of the far: to read and write them back could undo that."""
    seen = tl.atomic_or(flags, 0, mask=near, sem="acquire", scope="sys")
    return tl.where(far, tl.load(flags, mask=far, other=0, volatile=True), seen)


@triton.jit
def _wait(table, window, FLAGS: tl.constexpr, desired, up, SIM: tl.constexpr):
    """Until the flags of all `up` are `desired` (without their tokens), or waiting is in vain.

    FLAGS: where they begin in a window. Returns the flags, who came, and after how long.
    """
    ids = tl.arange(0, LANES)
    inbox = tl.load(table + INBOX + ids)
    flags = (inbox + FLAGS).to(tl.pointer_type(tl.int64)) + ids
    far = up & (inbox != window)
    near = up & (inbox == window)
    seen = _look(flags, near, far)
    come = up & ((seen >> _SEQUENCE_SHIFT) == (desired >> _SEQUENCE_SHIFT))
    waiting = tl.sum((up & (come == 0)).to(tl.int32), 0)
    took = tl.zeros((LANES,), tl.int64)
    if waiting > 0:
        page = _address(table, _LIMIT + 1, tl.int64)
        limit = tl.load(table + _LIMIT)
        polls = waiting.to(tl.int64) * 0
        begun = _now(polls, SIM)
        while waiting > 0:
            polls += 1
            waited = _now(polls, SIM) - begun
            took = tl.where(come, took, waited)
            late = waited > limit
            gone = up & late
            if SIM or waited > _IMPATIENT_NS:
                stop = tl.load(page + _STOP, volatile=True) != 0
                gone = gone | (up & stop)
                gone = gone | (tl.load(page + _GONE + ids, mask=up, other=0, volatile=True) != 0)
            again = _look(flags, near, far)
            seen = tl.where(come, seen, again)
            come = come | (up & ((again >> _SEQUENCE_SHIFT) == (desired >> _SEQUENCE_SHIFT)))
            waiting = tl.sum((up & (come == 0) & (gone == 0)).to(tl.int32), 0)
    return seen, come, took


@triton.jit
def _add_waits(table, word, took, up, SIM: tl.constexpr):
    at_word = table + word + tl.arange(0, LANES)
    if SIM:
        took = took * _SIM_NS
    tl.store(at_word, tl.load(at_word) + tl.where(up, took, 0))


@triton.jit
def _report(table, desired, missing, phase):
    """Tell the host who did not come."""
    if tl.sum(missing.to(tl.int32), 0) > 0:
        page = _address(table, _LIMIT + 1, tl.int64)
        ids = tl.arange(0, LANES)
        tl.store(page + _REPORT + ids, desired | phase, mask=missing)


@triton.jit
def await_dispatch(
    table, window, tokens, me,
    R: tl.constexpr, CHECKS: tl.constexpr, SIM: tl.constexpr,
):  # fmt: skip
    ids = tl.arange(0, LANES)
    active = active_of(table, ids, R, CHECKS)
    desired = tag_of(table, ids, 1, CHECKS)
    up = active & (ids != me)
    seen, come, took = _wait(table, window, DISPATCH_FLAGS, desired, up, SIM)
    _add_waits(table, _WAITED_DISPATCH, took, up, SIM)
    missing = up & (come == 0)
    _report(table, desired, missing, _DISPATCH)
    arrived = tl.where(come, seen & 0xFFFF, 0)
    arrived = tl.where(missing, -1, arrived)
    arrived = tl.where(active & (ids == me), tokens, arrived)
    tl.store(table + ARRIVED + ids, arrived)


@triton.jit
def await_combine(table, window, me, R: tl.constexpr, CHECKS: tl.constexpr, SIM: tl.constexpr):
    ids = tl.arange(0, LANES)
    up = active_of(table, ids, R, CHECKS) & (ids != me)
    desired = tag_of(table, ids, 0, CHECKS)
    seen, come, took = _wait(table, window, COMBINE_FLAGS, desired, up, SIM)
    _add_waits(table, _WAITED_COMBINE, took, up, SIM)
    _report(table, desired, up & (come == 0), _COMBINE)
    tl.store(table + RETURNED + ids, tl.where(come, 1 + (seen & 0xFFFF), 0))


@triton.jit
def raise_weights_flags(table, me, up, CHECKS: tl.constexpr):
    """Tell the peers that the weights of this combine are in their windows."""
    ids = tl.arange(0, LANES)
    peers = tl.load(table + PEER + ids, mask=up, other=0)
    flags = (peers + _WEIGHTS_FLAGS).to(tl.pointer_type(tl.int64))
    tl.atomic_xchg(flags + me, tag_of(table, ids, 0, CHECKS), mask=up, sem="release", scope="sys")


@triton.jit
def await_weights(table, window, up, CHECKS: tl.constexpr, SIM: tl.constexpr):
    """Wait for the weights of the peers' combines; who does not come is left out."""
    ids = tl.arange(0, LANES)
    desired = tag_of(table, ids, 0, CHECKS)
    _, come, took = _wait(table, window, _WEIGHTS_FLAGS, desired, up, SIM)
    _add_waits(table, _WAITED_COMBINE, took, up, SIM)
    missing = up & (come == 0)
    _report(table, desired, missing, _COMBINE)
    active = tl.load(table + ACTIVE + ids)
    tl.store(table + ACTIVE + ids, tl.where(missing, 0, active))


@triton.jit(do_not_specialize=["me"])
def meet(table, window, me, SEND: tl.constexpr, WAIT: tl.constexpr, SIM: tl.constexpr):
    """A barrier of the active ranks on their GPUs; one program."""
    ids = tl.arange(0, LANES)
    active = tl.load(table + ACTIVE + ids)
    up = (active != 0) & (ids != me)
    count = tl.load(table + _MEETINGS + ids)
    if SEND:
        count += 1
    desired = tl.load(table + _TAG + ids) | ((count & 0xFFF) << _SEQUENCE_SHIFT)
    if SEND:
        peers = tl.load(table + PEER + ids, mask=up, other=0)
        theirs = (peers + _MEETING_FLAGS).to(tl.pointer_type(tl.int64))
        tl.atomic_xchg(theirs + me, desired, mask=up, sem="release", scope="sys")
        tl.store(table + _MEETINGS + ids, count)
    if WAIT:
        _, come, _ = _wait(table, window, _MEETING_FLAGS, desired, up, SIM)
        missing = up & (come == 0)
        _report(table, desired, missing, _MEETING)
        tl.store(table + ACTIVE + ids, tl.where(missing, 0, active))


@triton.jit(do_not_specialize=["bits", "me"])
def release(table, bits, me):
    """Tell the peers of these bits that this rank reads nothing more of their links; one program.
    Before the table is rewritten, and after all that was launched on it."""
    ids = tl.arange(0, LANES)
    told = ((bits.to(tl.int64) >> ids) & 1) != 0
    peers = tl.load(table + PEER + ids, mask=told, other=0)
    theirs = (peers + _RELEASE_FLAGS).to(tl.pointer_type(tl.int64))
    tags = tl.load(table + _TAG + ids)
    tl.atomic_xchg(theirs + me, tags, mask=told & (peers != 0), sem="release", scope="sys")


@triton.jit
def await_release(table, window, SIM: tl.constexpr):
    """Wait for the peers that may still be reading what this rank had sent over a link that broke;
    one program. Who does not say that it has given it up is left out."""
    ids = tl.arange(0, LANES)
    desired = tl.load(table + _ENDED + ids)
    up = desired != 0
    _, come, _ = _wait(table, window, _RELEASE_FLAGS, desired, up, SIM)
    missing = up & (come == 0)
    _report(table, desired, missing, _RELEASE)
    active = tl.load(table + ACTIVE + ids)
    tl.store(table + ACTIVE + ids, tl.where(missing, 0, active))
