"""Responses that clients may ask for later, and go on with: in memory, the oldest make room."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import msgspec

from flexpert.server.http_errors import ApiError

MOST_STORED = 64 * 2**20  # bytes


class StoredResponse(msgspec.Struct, frozen=True):
    """body: the response, in JSON. history: the messages of the conversation with its answer."""

    body: bytes
    history: bytes

    @property
    def size(self) -> int:
        return len(self.body) + len(self.history)


class StoredResponses:
    """By id, at most `most` bytes of them; those that were not asked for longest go first.

    on_put: told of each that comes.
    """

    def __init__(self, most: int = MOST_STORED) -> None:
        self._most = most
        self._size = 0
        self._stored: OrderedDict[str, StoredResponse] = OrderedDict()
        self.on_put: Callable[[str, StoredResponse], None] = lambda id, response: None

    def items(self) -> list[tuple[str, StoredResponse]]:
        """All, with their ids."""
        return list(self._stored.items())

    def put(self, id: str, response: StoredResponse) -> None:
        """One that is larger than all of them may be is not kept."""
        self._drop(id)
        if response.size > self._most:
            return
        self._stored[id] = response
        self._size += response.size
        while self._size > self._most:
            self._drop(next(iter(self._stored)))
        self.on_put(id, response)

    def get(self, id: str, param: str | None = None) -> StoredResponse:
        """Raises: ApiError: 404. param: the field that names it."""
        found = self._stored.get(id)
        if found is None:
            raise ApiError(
                404,
                f"there is no response {id[:80]!r}: it was not stored, or made room for later ones "
                f"(the server keeps {self._most >> 20} MiB of them, and none over a restart); "
                "send the whole conversation as input",
                param=param,
                code="response_not_found",
            )
        self._stored.move_to_end(id)
        return found

    def delete(self, id: str) -> None:
        """Raises: ApiError: 404."""
        self.get(id)
        self._drop(id)

    def _drop(self, id: str) -> None:
        gone = self._stored.pop(id, None)
        if gone is not None:
            self._size -= gone.size
