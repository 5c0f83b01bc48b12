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
from llguidance import LLExecutor
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
        self._executor: LLExecutor | None = None
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
        going = []
        for row in rows:
            try:
                going.append((row, row.matcher.advance(row.tokens, self._grammars)))
            except (FlexpertError, ValueError) as error:
                masks.failed[row.index] = str(error)
        if self._executor is None:
            self._executor = LLExecutor(num_threads=1)
        # all at once, without Python's lock: the step loop need not hand it over for each
        words = masks.words
        self._executor.unsafe_compute_mask_ptr(
            [(matcher, row.index) for row, matcher in going],
            words.ctypes.data,
            words.strides[0],
            count,
        )
        for row, matcher in going:
            if matcher.is_error() or not words[row.index].any():
                words[row.index] = -1
                masks.failed[row.index] = row.matcher.failure()
        return masks
