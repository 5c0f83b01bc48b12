"""Masks of a step's structured answers, made in a thread while the forward pass runs.

    begin(samples)   before the forward pass: what was published since is fed to the matchers
    finish()         before sampling: the masks

What is fed is read from the sequences themselves, so that a step that is broken and run again, or a
sequence that comes from elsewhere with half of its answer, needs nothing more.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from llguidance import LLExecutor, LLMatcher
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


@dataclass(slots=True)
class _Job:
    """One step's. going: answers with one more token, which is nearly all of them. others: what
    they do not know yet, of those that have just come, from here or elsewhere."""

    count: int
    rows: dict[int, AnswerMatcher] = field(default_factory=dict)
    going: list[tuple[LLMatcher, int]] = field(default_factory=list)
    others: list[tuple[int, list[int]]] = field(default_factory=list)

    def add(self, row: int, sample: SampleState, matcher: AnswerMatcher) -> None:
        self.rows[row] = matcher
        fresh = len(sample.tokens) - sample.prompt_length - matcher.fed
        if fresh == 1 and matcher.compiled is not None:
            self.going.append((matcher.compiled, sample.tokens[-1]))
            matcher.fed += 1
        else:
            self.others.append((row, sample.tokens[sample.prompt_length + matcher.fed :]))


class MaskBuilder:
    """Used by the step loop's thread; the thread that computes is started with the first mask.

    While that one has Python's lock the forward pass waits for it: so it makes few calls, each for
    all answers, and those let go of the lock.
    """

    def __init__(self, grammars: GrammarCache, vocab: int) -> None:
        self._grammars = grammars
        self._width = -(-vocab // 32)
        self._thread: threading.Thread | None = None
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[StepMasks | BaseException] = queue.SimpleQueue()
        self._begun = False

    def begin(self, samples: Sequence[SampleState]) -> None:
        """Start on the masks for the next token of each sample."""
        self.finish()  # of a step that was broken: its matchers are still in use
        job = _Job(len(samples))
        for row, sample in enumerate(samples):
            if sample.matcher is not None:
                job.add(row, sample, sample.matcher)
        if not job.rows:
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="masks", daemon=True)
            self._thread.start()
        self._begun = True
        self._jobs.put(job)

    def finish(self) -> StepMasks | None:
        """What `begin` has started; None: no sample has a structure."""
        if not self._begun:
            return None
        self._begun = False
        done = self._done.get()
        if isinstance(done, BaseException):
            raise done
        return done

    def close(self) -> None:
        if self._thread is not None:
            self._jobs.put(None)
            self._thread.join()
            self._thread = None

    def _run(self) -> None:
        executor = LLExecutor(num_threads=1)
        while (job := self._jobs.get()) is not None:
            try:
                self._done.put(self._build(job, executor))
            except BaseException as error:  # noqa: BLE001 - the step loop waits for it, and raises it
                self._done.put(error)

    def _build(self, job: _Job, executor: LLExecutor) -> StepMasks:
        masks = StepMasks(np.full((job.count, self._width), -1, dtype=np.int32))
        if job.going:  # the engine refuses to do nothing
            executor.consume_token_par(job.going)
        for row, tokens in job.others:
            try:
                job.rows[row].advance(tokens, self._grammars)
            except (FlexpertError, ValueError) as error:
                masks.failed[row] = str(error)
        matchers = [
            (matcher.compiled, row)
            for row, matcher in job.rows.items()
            if matcher.compiled is not None and row not in masks.failed
        ]
        words = masks.words
        if matchers:
            executor.unsafe_compute_mask_ptr(
                matchers, words.ctypes.data, words.strides[0], job.count
            )
        some: NDArray[np.bool_] = np.any(words, axis=1)
        for compiled, row in matchers:
            if compiled.is_error() or not some[row]:
                words[row] = -1
                masks.failed[row] = job.rows[row].failure()
        return masks
