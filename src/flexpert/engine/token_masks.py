"""Masks of a step's structured answers, made in a thread while the forward pass runs.

    begin(samples)   before the forward pass: what was published since is fed to the matchers
    finish()         before sampling: the masks

What is fed is read from the sequences themselves, so that a step that is broken and run again, or a
sequence that comes from elsewhere with half of its answer, needs nothing more.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from flexpert.engine.output_grammar import AnswerMatcher, GrammarCache
from flexpert.engine.sequence import SampleState
from flexpert.errors import FlexpertError


@dataclass(frozen=True, slots=True)
class StepMasks:
    """words: [M, vocab / 32 rounded up] int32, all ones in rows without a structure.

    failed: row → why its answer cannot go on.
    """

    words: NDArray[np.int32]
    failed: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Row:
    index: int
    matcher: AnswerMatcher
    tokens: list[int]  # that it does not know yet


class MaskBuilder:
    """Used by the step loop's thread; the thread that computes is started with the first mask."""

    def __init__(self, grammars: GrammarCache, vocab: int) -> None:
        self._grammars = grammars
        self._width = -(-vocab // 32)
        self._thread: ThreadPoolExecutor | None = None
        self._begun: Future[StepMasks] | None = None

    def begin(self, samples: Sequence[SampleState]) -> None:
        """Start on the masks for the next token of each sample."""
        self.finish()  # of a step that was broken: its matchers are still in use
        structured = [
            (index, sample, sample.matcher)
            for index, sample in enumerate(samples)
            if sample.matcher is not None
        ]
        if not structured:
            return
        rows = [
            _Row(index, matcher, sample.tokens[sample.prompt_length + matcher.fed :])
            for index, sample, matcher in structured
        ]
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="masks")
        self._begun = self._thread.submit(self._build, rows, len(samples))

    def finish(self) -> StepMasks | None:
        """What `begin` has started; None: no sample has a structure."""
        begun, self._begun = self._begun, None
        return None if begun is None else begun.result()

    def close(self) -> None:
        if self._thread is not None:
            self._thread.shutdown()

    def _build(self, rows: list[_Row], count: int) -> StepMasks:
        masks = StepMasks(np.full((count, self._width), -1, dtype=np.int32))
        for row in rows:
            try:
                row.matcher.advance(row.tokens, self._grammars)
                row.matcher.fill(masks.words[row.index])
            except (FlexpertError, ValueError) as error:
                masks.words[row.index] = -1
                masks.failed[row.index] = str(error)
        return masks
