"""Survivors without a coordinator come to one view of who is up, through any torch `Store`.

For each epoch there is one decision, written by compare-and-set, so that there can be no second.
Who wants a new epoch leaves a report; the lowest member whom nobody has voted out decides when all
members have reported, or those that have not are suspected by most, or were silent for too long. If
that one is silent itself, the next lowest does. Nobody waits for anybody in particular, and a rank
that nobody heard from is in no view.

A rank is known by its id and its *life*, a number of the process: one that was stopped, and wakes
when its id belongs to another, finds another life in the decision and learns that it was evicted.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import msgspec

from flexpert.comm.bounded import BoundedStore
from flexpert.comm.errors import CommError, Evicted, RankTimeout

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

T = TypeVar("T")

_FIRST_NAP_S, _LONGEST_NAP_S = 0.001, 0.02
_NOTHING = "-"  # what a read of a missing key returns; never a value
_FOREIGN = (
    "the store that ranks agree through holds what no rank has written; give each group of ranks a "
    "store, or a prefix, of its own"
)
_KEPT = 3  # epochs whose keys stay

_life = secrets.token_bytes(8)


def _begin_life() -> None:
    global _life
    _life = secrets.token_bytes(8)


# ranks may be forks of one process that has imported this; each is another life
os.register_at_fork(after_in_child=_begin_life)


@dataclass(frozen=True, slots=True)
class View:
    """Who is up in an epoch: ids, sorted."""

    epoch: int
    ranks: tuple[int, ...]


class SuspectReport(msgspec.Struct, frozen=True, array_like=True):
    """What one rank knows when it asks for an epoch."""

    life: bytes
    suspects: tuple[int, ...] = ()


Decision = dict[int, bytes]  # id → life


def accepted(reports: Mapping[int, SuspectReport]) -> tuple[int, ...]:
    """Who of those that reported stays: nobody who stays suspects one who stays.

    Two of which one suspects the other are at odds. The rank at odds with most goes first, whoever
    accuses whom: one that suspects everybody has most likely lost its own link, or was stopped. Of
    equals the one with more accusers goes, then the higher id.
    """
    staying = set(reports)
    while True:
        accusers = {
            rank: {a for a in staying if rank in reports[a].suspects and a != rank}
            for rank in staying
        }
        odds = {
            rank: accusers[rank] | {b for b in staying if rank in accusers[b]} for rank in staying
        }
        worst = max(staying, key=lambda rank: (len(odds[rank]), len(accusers[rank]), rank))
        if not odds[worst]:
            return tuple(sorted(staying))
        staying.remove(worst)


def awaited(members: Iterable[int], reports: Mapping[int, SuspectReport]) -> tuple[int, ...]:
    """Members that have not reported, but for those that are suspected by most members.

    A suspicion makes an end of waiting only if those who stay are more than half of the members,
    or half with the lowest: a rank that was stopped suspects everybody when it wakes, and must
    hear them before it decides.
    """
    members = set(members)
    staying = members & set(accepted(reports)) if reports else set()
    silent = members - set(reports)
    most = 2 * len(staying) + (min(members, default=None) in staying) > len(members)
    if most:
        silent -= {rank for at in staying for rank in reports[at].suspects}
    return tuple(sorted(silent))


def agree(
    store: Store,
    rank: int,
    view: View,
    *,
    suspects: Iterable[int] = (),
    joining: bool = False,
    timeout_s: float = 30.0,
    patience_s: float = 1.0,
    life: bytes = b"",
) -> View:
    """The next epoch, the same on all ranks that get one.

    With a buffer in on_timeout="mask" mode: after an exchange in which ranks were masked
    (`Received.masked`, `Buffer.missing_results`), call this with them as suspects, then
    `buffer.set_active(view.ranks, view.epoch)` and `buffer.barrier(...)`, then run the step again.

    Args:
        store: the same for all ranks of the group. Its own timeout does not matter.
        rank: the own id.
        view: the epoch this rank is in, as `agree` returned it; at first all that began together.
            For a newcomer the ranks do not matter.
        suspects: ids that this rank could not reach. Evidence, not a verdict.
        joining: this rank is in no view yet; it waits for one that has it. Members take newcomers
            in whenever they agree on an epoch.
        timeout_s: limit of the whole call, seconds.
        patience_s: how long a member may be silent before it is left out (one that most suspect is
            not waited for), and how long the one whose turn it is may take to decide. More than the
            ranks' calls lie apart.
        life: tells processes with one id apart; default: a random number of this process.

    Returns: a view of a later epoch that has this rank.

    Raises:
        Evicted: a later epoch was agreed without this rank.
        RankTimeout: no decision within the limit ("agree"); it names who was waited for.
        CommError: the store is gone, or gave no answer within the limit and little more than
            a second.
    """
    report = SuspectReport(life or _life, tuple(sorted(set(suspects))))
    try:
        with BoundedStore(store, timeout_s) as bounded:
            return _Call(bounded, rank, view, report, joining).run(timeout_s, patience_s)
    except RuntimeError as error:  # torch's DistStoreError and its kin
        raise CommError(f"the store that ranks agree through does not answer: {error}") from error


def asked(store: Store, view: View) -> bool:
    """Whether some rank wants an epoch after this one. A rank that still waits for others in the
    old one should stop (`Buffer.interrupt`) and call `agree`, too.

    Raises: CommError: the store gave no answer for a second.
    """
    with BoundedStore(store, 0.0) as bounded:
        call = _Call(bounded, -1, view, SuspectReport(b""), joining=True)
        return call.newest() > view.epoch or bool(call.read_text(f"{view.epoch + 1}/who"))


class _Call:
    def __init__(
        self, store: BoundedStore, rank: int, view: View, report: SuspectReport, joining: bool
    ) -> None:
        self.store = store
        self.rank = rank
        self.view = view
        self.report = report
        self.joining = joining
        self.epoch = 0  # asked for

    def run(self, timeout_s: float, patience_s: float) -> View:
        began = changed = time.monotonic()
        known: dict[int, SuspectReport] = {}
        nap_s = _FIRST_NAP_S
        while True:
            # known before the look: who was stopped past the limit looks once more
            late = time.monotonic() - began >= timeout_s
            newest = self.newest()
            found = self.settled(newest)
            if found:
                return found
            if self.epoch != max(newest, self.view.epoch) + 1:
                self.epoch = max(newest, self.view.epoch) + 1
                self.hand_in()
            reports = self.reports()
            now = time.monotonic()
            if reports != known:
                known, changed, nap_s = reports, now, _FIRST_NAP_S
            missing = awaited(self.view.ranks, reports)
            turn = self.turn(reports)
            if turn is not None:
                ready = changed + (patience_s if missing else 0.0)
                if now >= ready + turn * patience_s:
                    self.decide(reports)
                    continue
            if late:
                silent = missing or tuple(sorted(set(self.view.ranks) - {self.rank}))
                raise RankTimeout(silent, "agree", self.epoch, timeout_s)
            nap_s = min(1.5 * nap_s, _LONGEST_NAP_S)
            time.sleep(nap_s)

    def turn(self, reports: Mapping[int, SuspectReport]) -> int | None:
        """How many would decide before this rank; None: it does not decide."""
        deciders = [rank for rank in accepted(reports) if rank in self.view.ranks]
        if self.joining or self.rank not in deciders:
            return None
        return deciders.index(self.rank)

    def settled(self, newest: int) -> View | None:
        """The newest decision, if it is later than what this rank has."""
        for epoch in (newest + 1, newest):  # a decider may have died before it said so
            decision = self.decision(epoch)
            if decision is None or epoch <= self.view.epoch:
                continue
            if epoch > newest:
                self.announce(epoch)
            if decision.get(self.rank) == self.report.life:
                return View(epoch, tuple(sorted(decision)))
            if not self.joining:
                raise Evicted(self.rank, epoch, tuple(sorted(decision)))
            return None
        return None

    # ---- the store ----------------------------------------------------------------------------

    def hand_in(self) -> None:
        self.write(f"{self.epoch}/report/{self.rank}", self.report)
        while True:  # add the own id to those that have reported
            there = self.read_text(f"{self.epoch}/who")
            ids = set(there.split()) if there else set()
            if str(self.rank) in ids:
                return
            more = " ".join(sorted({*ids, str(self.rank)}))
            if self.swap(f"{self.epoch}/who", there, more):
                return

    def reports(self) -> dict[int, SuspectReport]:
        found: dict[int, SuspectReport] = {}
        for rank in map(_number, self.read_text(f"{self.epoch}/who").split()):
            text = self.read_text(f"{self.epoch}/report/{rank}")
            if text:
                found[rank] = _decoded(text, SuspectReport)
        return found

    def decide(self, reports: Mapping[int, SuspectReport]) -> None:
        """At most one decision of an epoch is ever written; if it is another's, so be it."""
        decision: Decision = {rank: reports[rank].life for rank in accepted(reports)}
        value = msgspec.msgpack.encode(decision).hex()
        self.swap(f"{self.epoch}/decision", "", value)
        self.announce(self.epoch)
        old = self.epoch - _KEPT
        for rank in self.read_text(f"{old}/who").split():
            self.delete(f"{old}/report/{rank}")
        self.delete(f"{old}/who")
        self.delete(f"{old}/decision")

    def decision(self, epoch: int) -> Decision | None:
        text = self.read_text(f"{epoch}/decision")
        return _decoded(text, Decision) if text else None

    def newest(self) -> int:
        return _number(self.read_text("newest") or "0")

    def announce(self, epoch: int) -> None:
        """Never lets the number fall: who wakes from an old epoch cannot bring it back."""
        while True:
            text = self.read_text("newest")
            if _number(text or "0") >= epoch or self.swap("newest", text, str(epoch)):
                return

    def read_text(self, key: str) -> str:
        """Without waiting, as `get` would for a missing key; "" if it is missing."""
        try:
            text = self.store.compare_set(_key(key), _NOTHING, _NOTHING).decode()
        except UnicodeDecodeError as error:
            raise CommError(_FOREIGN) from error
        return "" if text == _NOTHING else text

    def write(self, key: str, value: SuspectReport) -> None:
        self.store.set(_key(key), msgspec.msgpack.encode(value).hex())

    def swap(self, key: str, old: str, new: str) -> bool:
        return self.store.compare_set(_key(key), old, new) == new.encode()

    def delete(self, key: str) -> None:
        if self.read_text(key):
            self.store.delete_key(_key(key))


def _decoded(text: str, kind: type[T]) -> T:
    """Raises: CommError"""
    try:
        return msgspec.msgpack.decode(bytes.fromhex(text), type=kind)
    except ValueError as error:  # msgspec's are
        raise CommError(_FOREIGN) from error


def _number(text: str) -> int:
    """Raises: CommError"""
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise CommError(_FOREIGN)
    return int(text)


def _key(name: str) -> str:
    return f"flexpert/agree/{name}"
