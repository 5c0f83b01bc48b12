"""Sequences come into a rank's scheduler: what one of them is to blame for fails it alone.

What adding or sampling a sequence raises concerns nobody else, so that it is rejected and the rank
goes on. A sequence that is on trial may be what ends ranks; the first step with it is reported
before it begins. A structured one waits here until its grammar is compiled.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Iterable, Iterator

from flexpert.engine import rank_protocol as msg
from flexpert.engine.grammar_preparation import GrammarPreparer, GrammarReady
from flexpert.engine.request import RequestSequence
from flexpert.engine.scheduler import Scheduler
from flexpert.engine.sequence import SEQUENCE_FAULTS
from flexpert.errors import FlexpertError


class SequenceIntake:
    """Used by the step loop's thread."""

    def __init__(
        self,
        scheduler: Scheduler,
        report: Callable[[msg.Report], None],
        grammars: GrammarPreparer,
    ) -> None:
        self._scheduler = scheduler
        self._report = report
        self._grammars = grammars
        self._compiling: dict[str, RequestSequence] = {}
        self._on_trial: set[str] = set()  # whose first step is still to be reported

    def admit(self, sequences: Iterable[RequestSequence]) -> None:
        """Queue them; those whose grammar is not compiled yet once it is."""
        for sequence in sequences:
            if self._grammars.needs(sequence):
                if sequence.on_trial:  # what compiles it may be what ends ranks, too
                    self._report(msg.OnTrial(sequence.id))
                self._compiling[sequence.id] = sequence
                self._grammars.prepare(sequence)
            else:
                self._add(sequence)

    def expect(self, sequences: Iterable[RequestSequence]) -> None:
        """They may come from a rank that leaves: their grammars are compiled ahead."""
        for sequence in sequences:
            self._grammars.expect(sequence)

    def grammar_ready(self, event: GrammarReady) -> None:
        """A grammar is compiled; its sequence may be gone meanwhile."""
        name = event.sequence.id
        if self._compiling.get(name) is not event.sequence:
            return
        del self._compiling[name]
        if event.error:
            self._report(msg.Rejected(name, event.error))
        else:
            self._add(event.sequence)

    def leave(self) -> None:
        """This rank has left: the sequences that still wait go on elsewhere."""
        self._compiling.clear()

    @property
    def ids(self) -> list[str]:
        """Of sequences whose grammar is not there yet."""
        return list(self._compiling)

    def _add(self, sequence: RequestSequence) -> None:
        with self.isolated(sequence):
            self._scheduler.add(sequence)

    def abort(self, ids: Iterable[str]) -> None:
        """Forget them; unknown ids are ignored."""
        for name in ids:
            self._on_trial.discard(name)
            self._compiling.pop(name, None)
            self._scheduler.abort(name)

    @contextlib.contextmanager
    def isolated(self, sequence: RequestSequence) -> Iterator[None]:
        """While a sequence is added: what is raised rejects it."""
        if sequence.on_trial:
            self._on_trial.add(sequence.id)
        try:
            yield
        except FlexpertError as error:
            self._report(msg.Rejected(sequence.id, str(error)))
        except SEQUENCE_FAULTS as error:
            self.failed(sequence.id, error)

    def failed(self, sequence_id: str, error: Exception) -> None:
        """By a fault of ours that only this sequence brings about."""
        traceback.print_exception(error)
        why = f"the request could not be computed: {type(error).__name__}: {error}"
        self._report(msg.Rejected(sequence_id, why, True))

    def begin_step(self, ids: Iterable[str]) -> None:
        """A step with these is about to be computed."""
        if not self._on_trial:
            return
        for name in self._on_trial.intersection(ids):
            self._on_trial.discard(name)
            self._report(msg.OnTrial(name))
