"""What ranks on different machines tell each other to meet, kept by the head (pure).

A pair of ranks meets through two entries, one written by each (`comm/rendezvous.py`). A rank may
write only what is from it, and read and delete only what is from or for it.
"""

from __future__ import annotations

import re

from flexpert.engine.rank_protocol import Contradiction, StoreRequest

MOST_BYTES = 2**18
"""Of an entry: how to reach a rank, and the keys of its memory."""
_MOST_KEYS = 2048  # written by one rank

_KEY = re.compile(r"flexpert/(?:[a-z]{1,16}/)?(\d{1,3})>(\d{1,3})")


class RankStore:
    """As torch's stores behave, for the three calls that a meeting needs."""

    def __init__(self) -> None:
        self._entries: dict[str, str] = {}
        self._written: dict[int, set[str]] = {}

    def answer(self, rank: int, request: StoreRequest) -> str:
        """Carry a request out; what the entry holds afterwards, or "" for a deletion.

        Raises: Contradiction: the rank has no business with that entry.
        """
        found = _KEY.fullmatch(request.key)
        if found is None:
            raise Contradiction(f"it asks for an entry {request.key[:64]!a}")
        source, target = int(found[1]), int(found[2])
        if rank not in (source, target):
            raise Contradiction(f"it asks for an entry of the ranks {source} and {target}")
        writes = request.operation == "set" or request.expected != request.value
        if request.operation == "delete":
            self._delete(source, request.key)
            return ""
        if writes and rank != source:
            raise Contradiction(f"it writes an entry of rank {source}")
        if request.operation == "set":
            return self._write(source, request.key, request.value)
        now = self._entries.get(request.key)
        if now is None:  # as a TCPStore answers
            return (
                self._write(source, request.key, request.value)
                if not request.expected
                else (request.expected)
            )
        if now == request.expected and writes:
            return self._write(source, request.key, request.value)
        return now

    def forget(self, rank: int) -> None:
        """Its process is gone."""
        for key in self._written.pop(rank, ()):
            self._entries.pop(key, None)

    def __len__(self) -> int:
        return len(self._entries)

    def _write(self, source: int, key: str, value: str) -> str:
        written = self._written.setdefault(source, set())
        if len(value) > MOST_BYTES or len(written | {key}) > _MOST_KEYS:
            raise Contradiction(f"it writes {len(value)} bytes, and {len(written)} entries")
        written.add(key)
        self._entries[key] = value
        return value

    def _delete(self, source: int, key: str) -> None:
        self._entries.pop(key, None)
        self._written.get(source, set()).discard(key)
