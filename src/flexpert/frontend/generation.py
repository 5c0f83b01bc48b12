"""One request → its sequences in the head → the parts of its choices."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

import msgspec

from flexpert.cluster.sequence_trace import SequenceTrace
from flexpert.cluster.views import Delta
from flexpert.engine.request import FINISH_LENGTH, FINISH_STOP, SamplingParams, TokenLogprobs
from flexpert.errors import FlexpertError, RequestError, ServiceStopped
from flexpert.frontend.text import AnswerText, StopTexts

if TYPE_CHECKING:
    from flexpert.cluster.head import Head, TokenStream
    from flexpert.cluster.journal import Arrival


# What submitting a sequence costs apart from its prompt, counted in prompt tokens, and what may be
# spent before others get their turn: about ten milliseconds.
_SUBMIT_COST = 2_000
_COST_OF_A_TURN = 300_000


class TokenRecord(msgspec.Struct, frozen=True):
    """A token of an answer with its log probabilities; offset: where its text begins, in characters
    of the answer."""

    id: int
    offset: int
    logprobs: TokenLogprobs


class Part(msgspec.Struct):
    """What a choice has grown by.

    index: prompt * n + sample, the choice's number. records: None unless log probabilities were
    asked for. finish: set on a choice's last part: "stop" or "length". degraded: some of the choice
    so far was computed while experts were missing. tokens: ids that have come, those without text
    included. prompt: on a choice's first part, log probabilities of the prompt's tokens from the
    second on, if they were asked for.
    """

    index: int
    text: str
    records: list[TokenRecord] | None
    finish: str | None
    degraded: bool = False
    tokens: Sequence[int] = ()
    prompt: list[TokenLogprobs] | None = None


class PromptTokensDetails(msgspec.Struct, frozen=True):
    """cached_tokens: of the prompts, those that were found in the prefix cache."""

    cached_tokens: int = 0


class Usage(msgspec.Struct, frozen=True):
    """Tokens a request has cost; a prompt counts once whatever n is."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails = PromptTokensDetails()


class Meter(Protocol):
    """Who wants to know what is asked for, and how fast tokens come; seconds."""

    def asked(self, choices: int) -> None: ...

    def first_token(self, waited_s: float) -> None: ...

    def next_tokens(self, gap_s: float, count: int) -> None: ...


class ChoiceTracer(Protocol):
    """Who traces the sequences of a request."""

    def sequence(self) -> SequenceTrace:
        """Of the next choice."""
        ...


class Generation:
    """The choices of one request: every prompt, sampled `params.n` times.

    `submit` has them run; leaving the context frees those that still do. What comes is read from
    `parts` on an event loop; or from `arrived`, which waits for nothing, whenever `when_arrived`
    says that there is something.

    Args:
        prompts: token ids of each prompt.
        request_id: the sequences are named after it.
        without_answer: only the prompts' log probabilities are wanted.
        tracer: None: what the sequences go through is not traced.
    """

    def __init__(
        self,
        head: Head,
        text: AnswerText,
        prompts: Sequence[list[int]],
        params: SamplingParams,
        *,
        request_id: str,
        without_answer: bool = False,
        meter: Meter | None = None,
        tracer: ChoiceTracer | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._head = head
        self._text = text
        self._prompts = prompts
        self._params = params
        self.request_id = request_id
        self._without_answer = without_answer
        self._meter = meter
        self._tracer = tracer
        self._clock = clock
        self._started = clock()
        self._prompt_tokens = sum(map(len, prompts))
        self.answers: list[Answer] = []
        self._unfinished = 0
        self._arrived: deque[tuple[Answer, Arrival]] = deque()
        self._tell: Callable[[], None] | None = None

    async def submit(self) -> None:
        """All sequences, or none; many of them a few at a time, because others want the loop too.

        Raises:
            RequestError, Overloaded, ServiceStopped: as the head refuses.
        """
        params = self._params
        params.check()
        if params.stop:
            self._text.check_stop_texts()
        if not all(self._prompts):
            raise RequestError("prompt must have at least one token", "prompt")
        self._head.check_room(len(self._prompts) * params.n)
        if self._meter is not None:
            self._meter.asked(params.n)
        hidden = frozenset((*params.stop_token_ids, *self._head.info.eos_token_ids))
        cost = 0
        try:
            for prompt in self._prompts:
                # equal prompts in one request are different samples unless a seed was given
                seed = secrets.randbits(63) if params.seed is None else params.seed
                for sample in range(params.n):
                    index = len(self.answers)
                    one = msgspec.structs.replace(params, n=1, seed=_wrap(seed + sample))
                    name, trace = f"{self.request_id}-{index}", None
                    if self._tracer is not None:
                        trace = self._tracer.sequence()
                    stream = self._head.submit(prompt, one, request_id=name, trace=trace)
                    answer = Answer(index, stream, one, self._text, hidden)
                    self.answers.append(answer)
                    self._unfinished += 1
                    stream.listen(partial(self._arrive, answer))
                    cost += _SUBMIT_COST + len(prompt)
                    if cost > _COST_OF_A_TURN:
                        cost = 0
                        await asyncio.sleep(0)
        except BaseException:
            self.cancel()
            raise

    def __enter__(self) -> Generation:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.cancel()

    def cancel(self) -> None:
        """Free every sequence that still runs; idempotent."""
        for answer in self.answers:
            answer.stream.cancel()

    @property
    def params(self) -> SamplingParams:
        """As they were asked for."""
        return self._params

    @property
    def usage(self) -> Usage:
        """So far."""
        completion = sum(len(answer.tokens) for answer in self.answers)
        cached = sum(answer.cached for answer in self.answers[:: self._params.n])
        return Usage(
            self._prompt_tokens,
            completion,
            self._prompt_tokens + completion,
            PromptTokensDetails(cached),
        )

    @property
    def over(self) -> bool:
        """Whether all choices are finished, and read."""
        return not self._unfinished

    def when_arrived(self, tell: Callable[[], None]) -> None:
        """Call `tell` once: now if something is there already, else from within whatever brings it,
        which must not be kept waiting."""
        if self._arrived:
            tell()
        else:
            self._tell = tell

    def arrived(self) -> Iterator[list[Part]]:
        """What the choices have grown by since it was last read: of a single one part after part,
        each made only when it is asked for; of several all in one list.

        Raises:
            FlexpertError: a sequence failed.
        """
        if len(self.answers) == 1:
            while self._arrived:
                if (part := self._next()) is not None:
                    yield [part]
            return
        parts = []
        while self._arrived:
            if (part := self._next()) is not None:
                parts.append(part)
        if parts:
            yield parts

    async def parts(self) -> AsyncGenerator[list[Part], None]:
        """As `arrived`, and what comes after it, until all choices are finished.

        Raises:
            FlexpertError: a sequence failed.
        """
        loop = asyncio.get_running_loop()
        while not self.over:
            for parts in self.arrived():
                yield parts
            if not self.over:
                waiting = loop.create_future()
                self.when_arrived(partial(_set, waiting))
                await waiting

    async def whole(self) -> list[Part]:
        """Every choice put together, in order.

        Raises:
            FlexpertError: a sequence failed.
        """
        gathered: list[list[Part]] = [[] for _ in self.answers]
        async with aclosing(self.parts()) as arriving:
            async for parts in arriving:
                for part in parts:
                    gathered[part.index].append(part)
        return [_join(parts) for parts in gathered]

    def _arrive(self, answer: Answer, item: Arrival) -> None:
        self._arrived.append((answer, item))
        if self._tell is not None:
            tell, self._tell = self._tell, None
            tell()

    def _next(self) -> Part | None:
        """Made of what came first; None: its choice was finished already."""
        answer, item = self._arrived.popleft()
        if answer.finished:
            return None
        if item is None or answer.stream.cancelled:
            raise ServiceStopped("the service stopped before the answer was complete")
        if isinstance(item, FlexpertError):
            answer.stream.over()
            raise item
        if self._meter is not None and item.tokens:
            self._measure(self._meter, answer, len(item.tokens))
        part = answer.no_answer(item) if self._without_answer else answer.feed(item)
        if part.finish is not None:
            answer.finished = True
            self._unfinished -= 1
            if item.finish is not None:
                answer.stream.over()
            else:
                answer.stream.enough = True
                answer.stream.cancel()  # a stop text was met, the sequence would go on
        return part

    def _measure(self, meter: Meter, answer: Answer, count: int) -> None:
        now = self._clock()
        if answer.latest is None:
            meter.first_token(now - self._started)
        else:
            meter.next_tokens(now - answer.latest, count)
        answer.latest = now


class Answer:
    """One sequence's answer as it grows.

    tokens: ids so far, the one that ended it included. latest: when the last ones came. cached:
    tokens of the prompt that were found in the prefix cache. finished: its last part is made.
    """

    __slots__ = (
        "_armed_at",
        "_detokenizer",
        "_fast",
        "_hidden",
        "_keeps_end",
        "_length",
        "_records",
        "_shown",
        "_stops",
        "_with_logprobs",
        "cached",
        "finished",
        "index",
        "latest",
        "stream",
        "tokens",
    )

    def __init__(
        self,
        index: int,
        stream: TokenStream,
        params: SamplingParams,
        text: AnswerText,
        hidden: frozenset[int],
    ) -> None:
        self.index = index
        self.stream = stream
        self.tokens: list[int] = []
        self.latest: float | None = None
        self.cached = 0
        self.finished = False
        self._detokenizer = text.detokenizer(skip_special_tokens=params.skip_special_tokens)
        self._keeps_end = params.include_stop_str_in_output
        self._stops = StopTexts(params.stop, include=self._keeps_end)
        self._armed_at = params.min_tokens
        self._hidden = hidden
        self._with_logprobs = params.logprobs is not None
        self._fast = not params.stop and not self._with_logprobs
        self._records: list[TokenRecord] = []  # of tokens whose text is not out yet
        self._length = 0  # characters detokenised
        self._shown = 0  # characters let through

    def feed(self, delta: Delta) -> Part:
        """The part that these tokens make.

        A token that ended the answer (end of sequence, stop token) has no text and no record,
        unless what stops an answer is to be part of it. A stop text is not looked for in the
        first `min_tokens` tokens.
        """
        tokens = delta.tokens
        visible = len(tokens)
        ended = delta.finish == FINISH_STOP and tokens and tokens[-1] in self._hidden
        if ended and not self._keeps_end:
            visible -= 1
        if self._fast:
            self.tokens += tokens
            text = self._detokenizer.push(tokens[:visible] if ended else tokens)
            if delta.finish is not None:
                text += self._detokenizer.flush()
            part = Part(self.index, text, None, delta.finish, delta.degraded, tokens)
        else:
            before = len(self.tokens)
            part = self._feed_each(delta, visible)
            part.degraded = delta.degraded
            part.tokens = self.tokens[before:]
        self._begin(part, delta)
        return part

    def no_answer(self, delta: Delta) -> Part:
        """The only part of a choice that has no answer; the token that came is nobody's."""
        part = Part(self.index, "", [] if self._with_logprobs else None, FINISH_LENGTH)
        part.degraded = delta.degraded
        self._begin(part, delta)
        return part

    def _begin(self, part: Part, delta: Delta) -> None:
        part.prompt = delta.prompt_logprobs
        self.cached += delta.cached

    def _feed_each(self, delta: Delta, visible: int) -> Part:
        """Token by token: for stop texts, which may end within the delta, and for offsets."""
        pieces: list[str] = []
        for place, token in enumerate(delta.tokens[:visible]):
            self.tokens.append(token)
            if self._with_logprobs and delta.logprobs is not None:
                self._records.append(TokenRecord(token, self._length, delta.logprobs[place]))
            pieces.append(self._let_through(self._detokenizer.push((token,))))
            if self._stops.met:
                return self._part(pieces, FINISH_STOP)
        self.tokens += delta.tokens[visible:]
        if delta.finish is not None:
            pieces.append(self._let_through(self._detokenizer.flush()))
            if self._stops.met:
                return self._part(pieces, FINISH_STOP)
            pieces.append(self._stops.flush())
        return self._part(pieces, delta.finish)

    def _let_through(self, text: str) -> str:
        self._length += len(text)
        return self._stops.push(text) if len(self.tokens) >= self._armed_at else text

    def _part(self, pieces: list[str], finish: str | None) -> Part:
        text = "".join(pieces)
        self._shown += len(text)
        if not self._with_logprobs:
            return Part(self.index, text, None, finish)
        # a record goes out with its token's text; those of a stop text that was cut off never do
        if finish is not None and not self._stops.met:
            out = len(self._records)
        else:
            out = sum(record.offset < self._shown for record in self._records)
        records, self._records = self._records[:out], self._records[out:]
        return Part(self.index, text, records, finish)


def _set(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _join(parts: list[Part]) -> Part:
    last = parts[-1]
    records: list[TokenRecord] | None = None
    if last.records is not None:
        records = [record for part in parts for record in part.records or ()]
    text = "".join([part.text for part in parts])
    tokens = [token for part in parts for token in part.tokens]
    return Part(last.index, text, records, last.finish, last.degraded, tokens, parts[0].prompt)


def _wrap(seed: int) -> int:
    """Into a signed 64-bit number."""
    return (seed + 2**63) % 2**64 - 2**63
