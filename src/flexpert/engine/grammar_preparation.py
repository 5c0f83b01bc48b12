"""Grammars are compiled in a thread before their sequences are scheduled: no step waits for one."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from flexpert.engine.output_grammar import GrammarCache
from flexpert.engine.request import RequestSequence, StructuredOutputsParams
from flexpert.errors import FlexpertError


@dataclass(frozen=True, slots=True)
class GrammarReady:
    """The grammar of a sequence is compiled. error: why it cannot be; "": it is."""

    sequence: RequestSequence
    error: str = ""


class GrammarPreparer:
    """Used by the step loop's thread. done: called in a thread, once for each `prepare`."""

    def __init__(self, grammars: GrammarCache, done: Callable[[GrammarReady], None]) -> None:
        self._grammars = grammars
        self._done = done
        self._thread: ThreadPoolExecutor | None = None

    def needs(self, sequence: RequestSequence) -> bool:
        """Whether its grammar is still to be compiled."""
        structure = sequence.params.structured_outputs
        return structure is not None and structure not in self._grammars

    def prepare(self, sequence: RequestSequence) -> None:
        """Compile, and say so."""
        self._threads().submit(self._prepare, sequence)

    def expect(self, sequence: RequestSequence) -> None:
        """Compile; the sequence may come later."""
        structure = sequence.params.structured_outputs
        if structure is not None and structure not in self._grammars:
            self._threads().submit(self._compile, structure)

    def close(self) -> None:
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)

    def _threads(self) -> ThreadPoolExecutor:
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammars")
        return self._thread

    def _prepare(self, sequence: RequestSequence) -> None:
        structure = sequence.params.structured_outputs
        try:
            error = "" if structure is None else self._compile(structure)
        except BaseException as unforeseen:  # the sequence must not wait for ever
            self._done(GrammarReady(sequence, f"{type(unforeseen).__name__}: {unforeseen}"))
            raise
        self._done(GrammarReady(sequence, error))

    def _compile(self, structure: StructuredOutputsParams) -> str:
        try:
            self._grammars.matcher(structure)
        except (FlexpertError, ValueError, TypeError) as error:
            return str(error)
        return ""
