"""Where in an answer a client is that asks for its rest: ids of a stream's events."""

from __future__ import annotations

import re
import sys
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
        self._had, self._had_sum = (int(found[1]), int(found[2], 16)) if found else (0, 0)

    @property
    def id(self) -> bytes:
        """Of the event that ends here."""
        return b"%d-%08x" % (self._count, self._sum)

    def advance(self) -> bool:
        """To all tokens that there are. Returns whether the client has not had them.

        Raises: RequestError: what it has had is not the beginning of this answer.
        """
        tokens, before = self._answer.tokens, self._count
        count = self._count = len(tokens)
        if count == before + 1:  # nearly always; each token of each stream comes by here
            new = tokens[before].to_bytes(4, sys.byteorder)
        else:
            new = array("I", tokens[before:]).tobytes()
        self._sum = zlib.crc32(new, self._sum)
        had = self._had
        if before < had <= count and (count, self._sum) != (had, self._had_sum):
            raise RequestError(
                "some tokens of this answer were lost and computed again, and it does not go on "
                "from what you have: ask for all of it, without Last-Event-ID"
            )
        return count > had
