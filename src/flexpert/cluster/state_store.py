"""The database in which a head writes down its state (SQLite, write-ahead), from a thread.

It is there for another head of the same machine, after this one's process has ended, so that what
the system has been handed is safe: nothing waits for a disk. What requests and their tokens add is
written in batches; of what is in a batch that is not written yet ranks keep their part
(`HeadLink`), and clients ask again. What an epoch depends on is written before it is carried out.

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
from collections.abc import Callable, Iterable
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import msgspec

from flexpert.cluster import saved_state as saved
from flexpert.cluster.saved_state import SavedCluster, SavedOperation, SavedRequest, SavedState
from flexpert.engine.request import RequestSequence, TokenEvent
from flexpert.errors import ModelError

log = logging.getLogger("flexpert")

BATCH_S = 0.25  # ranks keep what is not written yet
KEPT_S = 120.0  # an answer that is complete, for a client that has not got its end
AGAIN_S = 10.0  # after a failure
_WAIT_S = 1.0  # for what is written before it is carried out
_FORMAT = 1
_SCHEMA = """
    CREATE TABLE meta (name TEXT PRIMARY KEY, value BLOB) WITHOUT ROWID;
    CREATE TABLE operations (place INTEGER PRIMARY KEY, id TEXT UNIQUE, value BLOB);
    CREATE TABLE requests (place INTEGER PRIMARY KEY, id TEXT UNIQUE, value BLOB);
    CREATE TABLE tokens (id TEXT, position INTEGER, value BLOB, PRIMARY KEY (id, position))
        WITHOUT ROWID;
"""
_META = "INSERT OR REPLACE INTO meta VALUES (?, ?)"
_OPERATION = (
    "INSERT INTO operations (id, value) VALUES (?, ?) "
    "ON CONFLICT (id) DO UPDATE SET value = excluded.value"
)
_FORGET_OPERATION = "DELETE FROM operations WHERE id = ?"
_REQUEST = "INSERT OR REPLACE INTO requests (id, value) VALUES (?, ?)"
_TOKENS = "INSERT OR REPLACE INTO tokens VALUES (?, ?, ?)"
_FORGET = ("DELETE FROM requests WHERE id = ?", "DELETE FROM tokens WHERE id = ?")

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
        self._marks: dict[int, int] = {}
        self._ended: deque[tuple[float, str]] = deque()
        self._changed = threading.Condition()
        self._noted = self._written = 0  # calls of `_note`
        self._anew: list[Row] | None = []  # to begin a database with
        self._closing = self._urgent = False
        self._thread: threading.Thread | None = None
        self._again_at = 0.0

    # ---- what is written ------------------------------------------------------------------------

    def start(self, *, keep: bool) -> None:
        """From now on. keep: what is noted comes to what is in the database; else that is
        replaced."""
        if keep:
            self._anew = None
        self._thread = threading.Thread(target=self._run, name="state", daemon=True)
        self._thread.start()

    def cluster(self, record: SavedCluster, *, urgent: bool) -> None:
        """urgent: written when this returns, unless it fails or takes longer than a second."""
        self._note([(_META, ("cluster", saved.encode(record)))], urgent=urgent)

    def operation(self, record: SavedOperation, *, urgent: bool) -> None:
        """urgent: as for `cluster`."""
        self._note([(_OPERATION, (record.view.id, saved.encode(record)))], urgent=urgent)

    def forget_operation(self, operation_id: str) -> None:
        self._note([(_FORGET_OPERATION, (operation_id,))])

    def opened(self, sequence: RequestSequence) -> None:
        """A request has come."""
        self._note([(_REQUEST, (sequence.id, saved.encode(sequence)))])

    def published(self, event: TokenEvent) -> None:
        """Tokens of it; with the last its end."""
        self._note([(_TOKENS, (event.id, event.position, saved.encode(event)))])
        if event.finish is not None:
            self.ended(event.id)

    def ended(self, sequence_id: str) -> None:
        """An answer is complete; it is forgotten after a while."""
        self._ended.append((time.monotonic() + KEPT_S, sequence_id))

    def closed(self, sequence_id: str) -> None:
        """Nobody waits for it."""
        self._note([(sql, (sequence_id,)) for sql in _FORGET])

    def mark(self, rank: int, count: int) -> None:
        """What a rank has published up to this number has been noted."""
        with self._changed:
            idle = not (self._rows or self._marks)
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
        operations: Iterable[SavedOperation],
        requests: Iterable[SavedRequest],
    ) -> None:
        """After a failure: all there is."""
        rows: list[Row] = [(_META, ("cluster", saved.encode(cluster)))]
        rows += [(_OPERATION, (one.view.id, saved.encode(one))) for one in operations]
        for request in requests:
            rows.append((_REQUEST, (request.sequence.id, saved.encode(request.sequence))))
            rows += [
                (_TOKENS, (event.id, event.position, saved.encode(event)))
                for event in request.events
            ]
        with self._changed:
            self._rows.clear()
            self._anew = rows
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
        if self._thread is None:
            return
        with self._changed:
            if self.failure is not None:
                return
            idle = not (self._rows or self._marks)
            self._rows += rows
            self._noted += 1
            if idle or urgent:  # the thread waits for the end of a batch undisturbed
                self._urgent |= urgent
                self._changed.notify_all()
            if urgent:
                mine = self._noted
                self._changed.wait_for(lambda: self._written >= mine, _WAIT_S)

    # ---- the thread -----------------------------------------------------------------------------

    def _run(self) -> None:
        connection: sqlite3.Connection | None = None
        if self._anew is None:
            connection = sqlite3.connect(self._path)
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: self._rows or self._marks or self._closing or self._anew, 1.0
                )
                if not (self._urgent or self._closing):
                    self._changed.wait_for(lambda: self._urgent or self._closing, BATCH_S)
                rows, self._rows = self._rows, []
                marks, self._marks = self._marks, {}
                anew, self._anew = self._anew, None
                closing, self._urgent = self._closing, False
                noted = self._noted
            rows += self._old()
            try:
                if anew is not None:
                    if connection is not None:
                        connection.close()
                    connection = self._create()
                    rows = [*anew, *rows]
                if connection is not None and rows:
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
            rows += [(sql, (name,)) for sql in _FORGET]
        return rows

    def _create(self) -> sqlite3.Connection:
        self._remove()
        connection = sqlite3.connect(
            self._path,
        )
        try:
            self._path.chmod(0o600)
            connection.execute("PRAGMA journal_mode = WAL")
            # the system keeps what a killed process has written; without power there are no ranks
            connection.execute("PRAGMA synchronous = OFF")
            connection.executescript(_SCHEMA)
            connection.execute(f"PRAGMA user_version = {_FORMAT}")
            with connection:
                connection.execute(_META, ("settings", self._settings))
        except BaseException:
            connection.close()
            raise
        return connection

    def _fail(self, error: Exception) -> None:
        if self.failure is None:
            log.warning(
                "the state of the service cannot be written down (%s): it serves, and could not be "
                "resumed; it is tried again every %.0f s",
                error,
                AGAIN_S,
            )
        self.failure = str(error)
        self._again_at = time.monotonic() + AGAIN_S

    def _remove(self) -> None:
        remove_database(self._path)


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
            if version != _FORMAT:
                raise ModelError(
                    f"{path} has the format {version}, and this flexpert reads {_FORMAT}: resume "
                    "with the version that wrote it, or start without --resume"
                )
            meta = dict(connection.execute("SELECT name, value FROM meta"))
            operations = connection.execute("SELECT value FROM operations ORDER BY place")
            requests = connection.execute("SELECT value FROM requests ORDER BY place")
            events: dict[str, list[TokenEvent]] = {}
            for (value,) in connection.execute("SELECT value FROM tokens ORDER BY id, position"):
                event = saved.decode_event(value)
                events.setdefault(event.id, []).append(event)
            sequences = [saved.decode_sequence(value) for (value,) in requests]
            cluster = meta.get("cluster")
            return SavedState(
                settings=str(meta.get("settings", "")),
                cluster=None if cluster is None else saved.decode_cluster(cluster),
                operations=[saved.decode_operation(value) for (value,) in operations],
                requests=[SavedRequest(one, events.get(one.id, [])) for one in sequences],
            )
    except (sqlite3.Error, msgspec.MsgspecError) as error:
        raise ModelError(
            f"{path} cannot be read ({error}); start without --resume: what it had is lost"
        ) from None
