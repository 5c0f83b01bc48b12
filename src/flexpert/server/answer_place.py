"""Where in an answer a client is that asks for its rest: ids of a stream's events."""

from __future__ import annotations

import re
import zlib
from array import array

from flexpert.errors import RequestError
from flexpert.frontend.generation import Generation


class AnswerPlace:
    """An event's id says how many tokens of the only choice there are with it, and their checksum:
    where a head and a rank were lost at once some may have been computed again, and what follows
    must follow from what the client has.

    last: id of the latest event that the client has had; "" or none of ours: it has had nothing.
    """

    def __init__(self, generation: Generation, last: str) -> None:
        self._answer = generation.answers[0]
        self._count = self._sum = 0
        found = re.fullmatch(r"([0-9]{1,10})-([0-9a-f]{8})", last)
        self._had = (int(found[1]), int(found[2], 16)) if found else (0, 0)

    @property
    def id(self) -> str:
        """Of the event that ends here."""
        return f"{self._count}-{self._sum:08x}"

    def advance(self) -> bool:
        """To all tokens that there are. Returns whether the client has not had them.

        Raises: RequestError: what it has had is not the beginning of this answer.
        """
        tokens = self._answer.tokens
        self._sum = zlib.crc32(array("I", tokens[self._count :]).tobytes(), self._sum)
        before, self._count = self._count, len(tokens)
        had, checksum = self._had
        if before < had <= self._count and (self._count, self._sum) != (had, checksum):
            raise RequestError(
                "some tokens of this answer were lost and computed again, and it does not go on "
                "from what you have: ask for all of it, without Last-Event-ID"
            )
        return self._count > had
