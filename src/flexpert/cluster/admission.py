"""New sequences, and those that wait, go to the ranks that admit; those nobody waits for are
terminated.

How sequences of a rank that leaves or is lost go on is `Coordinator`'s work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from flexpert.cluster.journal import Entry, Journal
from flexpert.engine import rank_protocol as msg


class Admission:
    """admitting: ids that may be given sequences now. send: a command on its way to a rank."""

    def __init__(
        self,
        journal: Journal,
        admitting: Callable[[], Iterable[int]],
        send: Callable[[int, msg.Command], None],
    ) -> None:
        self._journal = journal
        self._admitting = admitting
        self._send = send
        journal.on_trial_over = self.admit_waiting

    def admit(self, entry: Entry) -> None:
        """Give a sequence to a rank; it waits in the journal while none admits."""
        rank = self._journal.assign(entry, self._admitting())
        if rank is not None:
            self._send(rank, msg.Admit([entry.resume()]))

    def admit_waiting(self) -> None:
        """There is capacity again: what no rank runs goes on."""
        for entry in self._journal.waiting():
            self.admit(entry)

    def cancel(self, sequence_id: str) -> bool:
        """Nobody waits for a sequence any more. Returns whether it was unfinished."""
        rank = self._journal.rank_of(sequence_id)
        if self._journal.close(sequence_id) is None:
            return False
        if rank is not None:
            self._send(rank, msg.Abort([sequence_id]))
        return True
