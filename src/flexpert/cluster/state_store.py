"""The database in which a head writes down its state (SQLite, write-ahead), from a thread.

It is there for another head of the same machine, after this one's process has ended, so that what
the system has been handed is safe: nothing waits for a disk. What requests and their tokens add is
written in batches: what has come of a request since the last one is one row, which the thread
encodes. Of what is in a batch that is not written yet ranks keep their part (`HeadLink`), and
clients ask again. What an epoch depends on is written before it is carried out.

If it cannot be written, serving goes on: the database is removed, since what it has is not true any
more, `failure` says why, and after a while all is written anew from what the head knows.
"""

from __future__ import annotations

import contextlib
import logging
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import msgspec

from flexpert.cluster import saved_state as saved
from flexpert.cluster.kept_counters import KeptSample
from flexpert.cluster.saved_state import (
    SavedCluster,
    SavedHost,
    SavedOperation,
    SavedRequest,
    SavedRun,
    SavedState,
)
from flexpert.engine.request import RequestSequence, TokenEvent
from flexpert.errors import ModelError

log = logging.getLogger("flexpert")

BATCH_S = 0.5  # ranks keep what is not written yet
KEPT_S = 120.0  # an answer that is complete, for a client that has not got its end
AGAIN_S = 10.0  # after a failure that follows others; sooner after the first ones
_FIRST_AGAIN_S = 1.0
_WAIT_S = 1.0  # for what is written before it is carried out
FORMAT = 2
_SCHEMA = """
    CREATE TABLE meta (name TEXT PRIMARY KEY, value BLOB) WITHOUT ROWID;
    CREATE TABLE operations (place INTEGER PRIMARY KEY, id TEXT UNIQUE, value BLOB);
    CREATE TABLE requests (place INTEGER PRIMARY KEY, id TEXT UNIQUE, value BLOB);
    CREATE TABLE tokens (place INTEGER PRIMARY KEY, id TEXT, value BLOB);
"""
_META = "INSERT OR REPLACE INTO meta VALUES (?, ?)"
_OPERATION = (
    "INSERT INTO operations (id, value) VALUES (?, ?) "
    "ON CONFLICT (id) DO UPDATE SET value = excluded.value"
)
_FORGET_OPERATION = "DELETE FROM operations WHERE id = ?"
_REQUEST = "INSERT OR REPLACE INTO requests (id, value) VALUES (?, ?)"
_FORGET = "DELETE FROM requests WHERE id = ?"
_TOKENS = "INSERT INTO tokens VALUES (?, ?, ?)"
_FORGET_TOKENS = "DELETE FROM tokens WHERE place = ?"

Row = tuple[str, tuple[object, ...]]


class StateStore:
    """Methods are called on the head's event loop.

    Args:
        path: of the database.
        settings: of the ranks, as JSON.
        on_written: told, from the thread, that what was noted up to a mark is written or will
            never be; see `mark`.

    failure: why nothing is written now, or None.
    """

    def __init__(
        self, path: Path, settings: str, on_written: Callable[[dict[int, int]], None]
    ) -> None:
        self._path = path
        self._settings = settings
        self._on_written = on_written
        self.failure: str | None = None
        self._rows: list[Row] = []
        self._events: deque[TokenEvent] = deque()  # to it the loop adds without a lock
        self._marks: dict[int, int] = {}
        self._ended: deque[tuple[float, str]] = deque()
        self._changed = threading.Condition()
        self._noted = self._written = 0  # calls of `_note`
        self._anew: _Anew | None = _Anew([], {})
        self._closing = self._urgent = False
        self._takes = False  # not after a failure, until all is begun again
        self._thread: threading.Thread | None = None
        self._again_at = self._failed_at = 0.0
        self._again_s = 0.0

    # ---- what is written ------------------------------------------------------------------------

    def start(self, *, keep: bool) -> None:
        """From now on. keep: what is noted comes to what is in the database; else that is
        replaced."""
        if keep:
            self._anew = None
        self._takes = True
        self._thread = threading.Thread(target=self._run, name="state", daemon=True)
        self._thread.start()

    def cluster(self, record: SavedCluster, *, urgent: bool) -> None:
        """urgent: written when this returns, unless it fails or takes longer than a second."""
        self._note([(_META, ("cluster", saved.encode(record)))], urgent=urgent)

    def hosts(self, records: list[SavedHost]) -> None:
        """All that have a rank."""
        self._note([(_META, ("hosts", saved.encode(records)))])

    def operation(self, record: SavedOperation, *, urgent: bool) -> None:
        """urgent: as for `cluster`."""
        self._note([(_OPERATION, (record.view.id, saved.encode(record)))], urgent=urgent)

    def counters(self, samples: list[KeptSample]) -> None:
        """What metrics have counted."""
        self._note([(_META, ("counters", saved.encode(samples)))])

    def forget_operation(self, operation_id: str) -> None:
        self._note([(_FORGET_OPERATION, (operation_id,))])

    def opened(self, sequence: RequestSequence) -> None:
        """A request has come."""
        self._note([(_REQUEST, (sequence.id, saved.encode(sequence)))])

    def published(self, event: TokenEvent) -> None:
        """Tokens of it; with the last its end. The thread is not woken: `mark` follows."""
        if self._takes:
            self._events.append(event)
        if event.finish is not None:
            self.ended(event.id)

    def ended(self, sequence_id: str) -> None:
        """An answer is complete; it is forgotten after a while."""
        self._ended.append((time.monotonic() + KEPT_S, sequence_id))

    def closed(self, sequence_id: str) -> None:
        """Nobody waits for it."""
        self._note([(_FORGET, (sequence_id,))])

    def mark(self, rank: int, count: int) -> None:
        """What a rank has published up to this number has been noted."""
        with self._changed:
            idle = self._idle
            self._marks[rank] = count
            if idle:
                self._changed.notify_all()

    @property
    def wants_all(self) -> bool:
        """After a failure: whether it is time to try `begin_again`."""
        return self.failure is not None and time.monotonic() >= self._again_at

    def begin_again(
        self,
        cluster: SavedCluster,
        hosts: list[SavedHost],
        operations: Iterable[SavedOperation],
        requests: Iterable[tuple[RequestSequence, SavedRun]],
    ) -> None:
        """After a failure: all there is."""
        rows: list[Row] = [(_META, ("cluster", saved.encode(cluster)))]
        rows.append((_META, ("hosts", saved.encode(hosts))))
        rows += [(_OPERATION, (one.view.id, saved.encode(one))) for one in operations]
        runs = {}
        for sequence, run in requests:
            rows.append((_REQUEST, (sequence.id, saved.encode(sequence))))
            runs[sequence.id] = [run]
        with self._changed:
            self._rows.clear()
            self._events.clear()
            self._takes = True
            self._anew = _Anew(rows, runs)
            self._again_at = time.monotonic() + AGAIN_S
            self._changed.notify()

    def close(self, *, remove: bool) -> None:
        """remove: nothing is left that could be resumed. Idempotent."""
        if self._thread is not None:
            with self._changed:
                self._closing = True
                self._changed.notify()
            self._thread.join()
            self._thread = None
        if remove:
            self._remove()

    def _note(self, rows: list[Row], *, urgent: bool = False) -> None:
        with self._changed:
            if not self._takes:
                return
            idle = self._idle
            self._rows += rows
            self._noted += 1
            if idle or urgent:  # the thread waits for the end of a batch undisturbed
                self._urgent |= urgent
                self._changed.notify_all()
            if urgent:
                mine = self._noted
                self._changed.wait_for(lambda: self._written >= mine, _WAIT_S)

    @property
    def _idle(self) -> bool:
        """The thread sleeps until there is something."""
        return not (self._rows or self._events or self._marks)

    # ---- the thread -----------------------------------------------------------------------------

    def _run(self) -> None:
        connection: sqlite3.Connection | None = None
        tokens = _TokenRows()
        if self._anew is None:
            try:
                connection = sqlite3.connect(self._path)
                tokens.find(connection)
            except sqlite3.Error as error:
                self._fail(error)
        while True:
            with self._changed:
                self._changed.wait_for(lambda: not self._idle or self._closing or self._anew, 1.0)
                if not (self._urgent or self._closing):
                    self._changed.wait_for(lambda: self._urgent or self._closing, BATCH_S)
                rows, self._rows = self._rows, []
                events = [self._events.popleft() for _ in range(len(self._events))]
                marks, self._marks = self._marks, {}
                anew, self._anew = self._anew, None
                closing, self._urgent = self._closing, False
                noted = self._noted
            rows += self._old()
            try:
                if anew is not None:
                    if connection is not None:
                        connection.close()
                    connection, tokens = self._create(), _TokenRows()
                    rows = [*anew.rows, *tokens.added(anew.runs), *rows]
                if connection is not None and (rows or events):
                    forgotten = {str(values[0]) for sql, values in rows if sql == _FORGET}
                    rows += tokens.written(events, forgotten)
                    with connection:
                        for sql, alike in groupby(rows, itemgetter(0)):
                            connection.executemany(sql, [values for _, values in alike])
                if anew is not None:
                    self.failure = None
            except (sqlite3.Error, OSError) as error:
                self._fail(error)
                if connection is not None:
                    with contextlib.suppress(sqlite3.Error):
                        connection.close()
                connection = None
                self._remove()
            if marks:
                self._on_written(marks)
            with self._changed:
                self._written = noted
                self._changed.notify_all()
            if closing:
                if connection is not None:
                    with contextlib.suppress(sqlite3.Error):
                        connection.close()
                return

    def _old(self) -> list[Row]:
        """Answers that nobody comes back for any more."""
        rows: list[Row] = []
        while self._ended and self._ended[0][0] < time.monotonic():
            _, name = self._ended.popleft()
            rows.append((_FORGET, (name,)))
        return rows

    def _create(self) -> sqlite3.Connection:
        self._remove()
        connection = sqlite3.connect(self._path)
        try:
            self._path.chmod(0o600)
            connection.execute("PRAGMA journal_mode = WAL")
            # the system keeps what a killed process has written; without power there are no ranks
            connection.execute("PRAGMA synchronous = OFF")
            connection.executescript(_SCHEMA)
            connection.execute(f"PRAGMA user_version = {FORMAT}")
            with connection:
                connection.execute(_META, ("settings", self._settings))
        except BaseException:
            connection.close()
            raise
        return connection

    def _fail(self, error: Exception) -> None:
        with self._changed:
            if self._anew is None:
                self._takes = False
                self._rows.clear()
                self._events.clear()
        if self.failure is None:
            log.warning(
                "the state of the service cannot be written down (%s): it serves, and could not be "
                "resumed; it is tried again, at last every %.0f s",
                error,
                AGAIN_S,
            )
        self.failure = str(error)
        now = time.monotonic()
        longer = now - self._failed_at < 2 * AGAIN_S
        self._again_s = min(AGAIN_S, 2 * self._again_s if longer else _FIRST_AGAIN_S)
        self._failed_at, self._again_at = now, now + self._again_s

    def _remove(self) -> None:
        remove_database(self._path)


@dataclass(frozen=True, slots=True)
class _Anew:
    """What a database begins with."""

    rows: list[Row]
    runs: Mapping[str, list[SavedRun]]


class _TokenRows:
    """Which rows of `tokens` a request has, by their numbers: what is written at once has numbers
    that follow each other, and so lies together."""

    def __init__(self) -> None:
        self._next = 1
        self._places: dict[str, list[int]] = {}

    def find(self, connection: sqlite3.Connection) -> None:
        """Those of the head before. Raises: sqlite3.Error"""
        for place, name in connection.execute("SELECT place, id FROM tokens ORDER BY place"):
            self._places.setdefault(name, []).append(place)
            self._next = place + 1

    def written(self, events: Iterable[TokenEvent], forgotten: Iterable[str]) -> list[Row]:
        """What is written of events, but for forgotten requests, whose rows go."""
        of_request: dict[str, list[TokenEvent]] = {}
        for event in events:
            of_request.setdefault(event.id, []).append(event)
        gone: list[Row] = []
        for name in forgotten:
            of_request.pop(name, None)
            gone += [(_FORGET_TOKENS, (place,)) for place in self._places.pop(name, ())]
        runs = {name: saved.runs_of(alike) for name, alike in of_request.items()}
        return gone + self.added(runs)

    def added(self, runs: Mapping[str, list[SavedRun]]) -> list[Row]:
        """A row for each request."""
        rows: list[Row] = []
        for name, of_request in runs.items():
            rows.append((_TOKENS, (self._next, name, saved.encode(of_request))))
            self._places.setdefault(name, []).append(self._next)
            self._next += 1
        return rows


def remove_database(path: Path) -> None:
    """With what SQLite keeps beside it."""
    for suffix in ("", "-wal", "-shm"):
        with contextlib.suppress(OSError):
            path.with_name(path.name + suffix).unlink()


def load(path: Path) -> SavedState | None:
    """What the head before has written down; None: there is nothing.

    Raises:
        ModelError: it is not of this version, or is damaged.
    """
    if not path.exists():
        return None
    try:
        with contextlib.closing(sqlite3.connect(path)) as connection:
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            if version != FORMAT:
                raise ModelError(
                    f"{path} has the format {version}, and this flexpert reads {FORMAT}: resume "
                    "with the version that wrote it, or start without --resume"
                )
            meta = dict(connection.execute("SELECT name, value FROM meta"))
            operations = connection.execute("SELECT value FROM operations ORDER BY place")
            requests = connection.execute("SELECT value FROM requests ORDER BY place")
            events: dict[str, list[TokenEvent]] = {}
            for name, value in connection.execute("SELECT id, value FROM tokens ORDER BY place"):
                events.setdefault(name, []).extend(saved.decode_events(name, value))
            sequences = [saved.decode_sequence(value) for (value,) in requests]
            cluster, counters = meta.get("cluster"), meta.get("counters")
            return SavedState(
                settings=str(meta.get("settings", "")),
                cluster=None if cluster is None else saved.decode_cluster(cluster),
                operations=[saved.decode_operation(value) for (value,) in operations],
                requests=[SavedRequest(one, events.get(one.id, [])) for one in sequences],
                hosts=saved.decode_hosts(meta["hosts"]) if "hosts" in meta else [],
                counters=[] if counters is None else saved.decode_counters(counters),
            )
    except (sqlite3.Error, msgspec.MsgspecError) as error:
        raise ModelError(
            f"{path} cannot be read ({error}); start without --resume: what it had is lost"
        ) from None
