"""The request journal: what was asked, what was published, and where it runs.

It holds everything a sequence needs to go on elsewhere (prompt, published tokens, sampling by
position), so no rank is ever the only one that knows. One entry per unfinished sequence.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from types import TracebackType
from typing import Protocol

import msgspec

from flexpert.cluster.quarantine import Quarantine
from flexpert.cluster.request_routing import Router
from flexpert.cluster.request_times import RequestTimes
from flexpert.cluster.saved_state import SavedRun
from flexpert.cluster.sequence_trace import SequenceTrace
from flexpert.cluster.views import Delta
from flexpert.engine.rank_protocol import Contradiction
from flexpert.engine.request import (
    FINISH_LENGTH,
    FINISH_STOP,
    HeldKV,
    KVMigration,
    RequestSequence,
    SamplingParams,
    TokenEvent,
)
from flexpert.errors import FlexpertError, Overloaded

_FINISHES = (None, FINISH_STOP, FINISH_LENGTH)


class Entry:
    """One unfinished sequence.

    rank: where it runs; None while no rank has it. said: tokens it had said when that rank took it.
    destination: where its KV has been copied to, while its rank leaves. on_trial: it may be what
    terminates ranks, and that rank tells when it begins with it.
    degraded: some of what it has said was computed without some experts. finished: all is said.
    times: for metrics only. trace: what it goes through, where that is to be told; else None.
    """

    __slots__ = (
        "degraded",
        "destination",
        "finished",
        "generated",
        "on_trial",
        "rank",
        "request",
        "said",
        "stream",
        "times",
        "trace",
    )

    def __init__(
        self,
        request: RequestSequence,
        stream: TokenStream,
        now: float,
        trace: SequenceTrace | None = None,
    ) -> None:
        self.times = RequestTimes(now)
        self.trace = trace
        self.request = request
        self.stream = stream
        self.generated: list[int] = []
        self.rank: int | None = None
        self.said = 0
        self.destination: int | None = None
        self.degraded = False
        self.on_trial = False
        self.finished = False

    def resume(self) -> RequestSequence:
        """The sequence as the next rank must receive it."""
        generated, on_trial = list(self.generated), self.on_trial
        return msgspec.structs.replace(self.request, generated=generated, on_trial=on_trial)


# What comes of a sequence: tokens, the error that ends it, or None: it was cancelled.
Arrival = Delta | FlexpertError | None


class TokenStream:
    """The answer of one sequence as it comes; leaving its context or `cancel` frees and ends it.

    It has one reader: who iterates over it, or who listens.

    enough: whoever cancels it has a whole answer, which a stop text has ended. cancelled: it was,
    before it was over; what has come and was not read yet is nobody's.
    """

    __slots__ = (
        "__weakref__",
        "_arrived",
        "_listener",
        "_on_cancel",
        "_over",
        "_waiting",
        "cancelled",
        "enough",
        "id",
    )

    def __init__(self, sequence_id: str, on_cancel: Callable[[str], None]) -> None:
        self.id = sequence_id
        self.enough = False
        self.cancelled = False
        self._on_cancel = on_cancel
        self._over = False
        self._arrived: deque[Arrival] = deque()
        self._waiting: asyncio.Future[None] | None = None
        self._listener: Callable[[Arrival], None] = self._keep

    def put(self, item: Delta | FlexpertError) -> None:
        """Called by the journal."""
        self._listener(item)

    def listen(self, listener: Callable[[Arrival], None]) -> None:
        """Have it told of what comes, beginning with what is here already. It is called from within
        whatever has something to tell: it notes that, and works later."""
        self._listener = listener
        while self._arrived:
            listener(self._arrived.popleft())

    def cancel(self) -> None:
        if not self._over:
            self._over = self.cancelled = True
            self._on_cancel(self.id)
            self._listener(None)  # a reader that waits ends, too

    def over(self) -> None:
        """Its reader has read all of it: there is nothing to cancel any more."""
        self._over = True

    async def __aenter__(self) -> TokenStream:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.cancel()

    def __aiter__(self) -> AsyncIterator[Delta]:
        return self

    async def __anext__(self) -> Delta:
        if self._over:
            raise StopAsyncIteration
        while not self._arrived:
            self._waiting = asyncio.get_running_loop().create_future()
            await self._waiting
        item = self._arrived.popleft()
        if item is None:
            raise StopAsyncIteration
        if isinstance(item, FlexpertError):
            self._over = True
            raise item
        if item.finish is not None:
            self._over = True
        return item

    def _keep(self, item: Arrival) -> None:
        self._arrived.append(item)
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)


class JournalMeter(Protocol):
    """Who wants to know how long requests take."""

    def first_token(self, entry: Entry) -> None: ...
    def finished(self, entry: Entry, finish: str, now: float) -> None: ...
    def failed(self) -> None: ...


class JournalLog(Protocol):
    """Who writes the journal down."""

    def opened(self, sequence: RequestSequence) -> None: ...
    def published(self, event: TokenEvent) -> None: ...
    def closed(self, sequence_id: str) -> None: ...


class Journal:
    """All unfinished sequences; decides which rank runs what.

    Its memory is bounded: at most `limit` of them, each as long as the model's context.
    log: what is told of every change, so that another head may go on with it; None: nobody.
    meter: what is told of how long requests take, by `clock` (seconds); None: nobody.
    on_trial_over: sequences that waited because of a suspect may run; see `quarantine`.
    router: which of several ranks gets a sequence; default: the one with the fewest.
    kv_tokens: how many tokens the KV cache of a rank holds; set before the first rank leaves.
    tokens_published, tokens_degraded: since the start; the latter were computed without some
    experts, or follow such. answers_degraded: how many sequences have any.
    """

    def __init__(
        self,
        limit: int = 16384,
        router: Router | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.router = router or Router("fewest")
        self.kv_tokens = 2**62
        self.clock = clock
        self.meter: JournalMeter | None = None
        self._limit = limit
        self._entries: dict[str, Entry] = {}
        self._by_rank: dict[int, set[str]] = {}
        self._quarantine = Quarantine()
        self.on_trial_over: Callable[[], None] = lambda: None
        self.log: JournalLog | None = None
        self.tokens_published = 0
        self.tokens_degraded = 0
        self.answers_degraded = 0

    def __len__(self) -> int:
        return len(self._entries)

    def check_room(self, sequences: int) -> None:
        """Raises: Overloaded: there is none for so many more."""
        if len(self._entries) + sequences > self._limit:
            raise Overloaded(
                f"{len(self._entries)} sequences are unfinished and {self._limit} may be "
                f"(--max-sequences), {sequences} more are too many; try again later"
            )

    def rank_of(self, sequence_id: str) -> int | None:
        """Where a sequence runs."""
        entry = self._entries.get(sequence_id)
        return entry.rank if entry else None

    def open(
        self,
        sequence_id: str,
        prompt: list[int],
        params: SamplingParams,
        eos: tuple[int, ...],
        on_cancel: Callable[[str], None],
        trace: SequenceTrace | None = None,
    ) -> Entry:
        """A new entry, not assigned yet.

        Raises: Overloaded
        """
        self.check_room(1)
        stream = TokenStream(sequence_id, on_cancel)
        request = RequestSequence(
            id=sequence_id, prompt=prompt, generated=[], params=params, eos=eos
        )
        now = self.clock()
        entry = self._entries[sequence_id] = Entry(request, stream, now, trace)
        if trace is not None:
            trace.open(now, len(prompt))
        if self.log:
            self.log.opened(request)
        return entry

    def restore(
        self, request: RequestSequence, events: list[TokenEvent], on_cancel: Callable[[str], None]
    ) -> Entry:
        """An entry of another head, whose stream begins anew; see `catch_up`, `place`."""
        entry = Entry(request, TokenStream(request.id, on_cancel), self.clock())
        self._entries[request.id] = entry
        meter, self.meter = self.meter, None  # that head has counted it
        for event in events:
            if event.position == len(entry.generated):
                self._append(entry, event)
        self.meter = meter
        if entry.generated:
            entry.times.begun(entry.times.opened, 0.0)
        return entry

    def place(self, sequence_id: str, rank: int) -> bool:
        """A rank that was taken over runs this sequence; False: it must not."""
        entry = self._entries.get(sequence_id)
        if entry is None or entry.rank not in (None, rank):
            return False
        entry.rank, entry.said = rank, len(entry.generated)
        self._by_rank.setdefault(rank, set()).add(sequence_id)
        return True

    def catch_up(self, event: TokenEvent) -> None:
        """Tokens that ranks have published while there was no head."""
        entry = self._entries.get(event.id)
        if entry is not None and event.position == len(entry.generated):
            if self.log:
                self.log.published(event)
            self._append(entry, event)

    def requests(self) -> list[tuple[RequestSequence, SavedRun]]:
        """All that is unfinished, for another head; tokens without what was told with them, but
        that some were degraded."""
        found = []
        for name, entry in self._entries.items():
            tokens = list(entry.generated)
            last = TokenEvent(name, len(tokens), [], None, None, True) if entry.degraded else None
            found.append((entry.request, SavedRun(0, tokens, last)))
        return found

    def unfinished(self) -> dict[TokenStream, int]:
        """Every stream → how many tokens it has been given."""
        return {entry.stream: len(entry.generated) for entry in self._entries.values()}

    def assign(self, entry: Entry, ranks: Iterable[int], computed: int = 0) -> int | None:
        """Give a sequence to one of these ranks. computed: tokens whose KV it brings along.

        Returns: None: there are no ranks, or none that may be given it now, because of a request
            that may be what terminates ranks; `on_trial_over` tells when that has changed.
        """
        quarantine, name = self._quarantine, entry.request.id
        on_trial = self._entries.get(quarantine.trial or "")
        counts = {rank: len(self._by_rank.get(rank, ())) for rank in ranks}
        suspect = quarantine.suspects(name)
        if on_trial is not None:
            if suspect:
                return None
            counts.pop(on_trial.rank if on_trial.rank is not None else -1, None)
        if not counts:
            return None
        if suspect:
            rank = min(counts, key=lambda rank: (len(self._silent(rank)), counts[rank], rank))
            quarantine.try_alone(name)
        else:
            rank = self.router.choose(entry.request, counts)
        entry.on_trial = suspect
        self.router.placed(entry.resume(), rank, computed)
        entry.rank, entry.said = rank, len(entry.generated)
        if entry.times.assigned is None:
            entry.times.assigned = self.clock()
        if entry.trace is not None:
            entry.trace.placed(rank, self.clock(), entry.said, computed)
        self._by_rank.setdefault(rank, set()).add(name)
        return rank

    def _silent(self, rank: int) -> list[str]:
        """The sequences of a rank that have said nothing since it took them."""
        entries = [self._entries[name] for name in sorted(self._by_rank.get(rank, ()))]
        return [e.request.id for e in entries if len(e.generated) == e.said]

    def assign_destinations(
        self, held: Iterable[HeldKV], destinations: Iterable[int]
    ) -> dict[int, list[KVMigration]]:
        """Choose who will go on with a leaver's sequences; they stay where they are for now.

        Returns: destination → what goes there. Each goes to one of those whose KV cache has room,
        if there are any; see `Router.destination`.
        """
        counts = {
            destination: len(self._by_rank.get(destination, ()))
            for destination in sorted(destinations)
        }
        tokens = {
            destination: sum(map(self._tokens_of, self._by_rank.get(destination, ())))
            for destination in counts
        }
        for name, entry in self._entries.items():
            if entry.destination in counts and entry.rank not in counts:
                counts[entry.destination] += 1
                tokens[entry.destination] += self._tokens_of(name)
        coming: dict[int, set[int]] = {destination: set() for destination in counts}
        migrations: dict[int, list[KVMigration]] = {}
        for one in held:
            found = self._entries.get(one.id)
            if found is None or not counts:
                continue
            more = self._tokens_of(one.id)
            able = {r: n for r, n in counts.items() if tokens[r] + more <= self.kv_tokens}
            destination = self.router.destination(found.request, able or counts, coming)
            found.destination = destination
            counts[destination] += 1
            tokens[destination] += more
            migrations.setdefault(destination, []).append(KVMigration(found.resume(), one))
        return migrations

    def _tokens_of(self, sequence_id: str) -> int:
        entry = self._entries[sequence_id]
        return len(entry.request.prompt) + len(entry.generated)

    def hand_over(
        self, rank: int, held: Iterable[HeldKV], destinations: Iterable[int]
    ) -> dict[int, list[KVMigration]]:
        """A rank has left: assign its sequences, to whom they were assigned if that one is among
        the destinations, else to the one with the fewest.

        Returns: destination → what goes there. Sequences of which nothing is held move, too.
        """
        destinations = sorted(destinations)
        known = {one.id: one for one in held}
        migrations: dict[int, list[KVMigration]] = {}
        for name in sorted({*known, *self._by_rank.get(rank, ())}):
            entry = self._entries.get(name)
            if entry is None or entry.rank != rank:
                continue  # it is over, or runs elsewhere already
            self.release(name)
            chosen = [entry.destination] if entry.destination in destinations else destinations
            entry.destination = None
            one = known.get(name) or HeldKV(name, 0, [])
            destination = self.assign(entry, [r for r in chosen if r is not None], one.computed)
            if destination is not None:
                migrations.setdefault(destination, []).append(KVMigration(entry.resume(), one))
        return migrations

    def release(self, sequence_id: str) -> Entry | None:
        """Take a sequence off its rank; it stays in the journal."""
        entry = self._entries.get(sequence_id)
        if entry and entry.rank is not None:
            self._by_rank[entry.rank].discard(sequence_id)
            entry.rank = None
            if entry.trace is not None:
                entry.trace.left(self.clock())
            self._quarantine.over(sequence_id)
            self.router.computed(sequence_id)
        return entry

    def close(self, sequence_id: str) -> Entry | None:
        """Forget a sequence."""
        cleared = self._quarantine.cleared(sequence_id)
        entry = self.release(sequence_id)
        self._entries.pop(sequence_id, None)
        if entry is not None and entry.trace is not None:
            outcome = "stop" if entry.stream.enough else "cancelled"
            entry.trace.over(self.clock(), outcome, len(entry.generated))
        self.router.closed(sequence_id)
        if self.log and entry and not entry.finished:
            self.log.closed(sequence_id)
        if cleared:
            self.on_trial_over()
        return entry

    def on_trial(self, sequence_id: str) -> None:
        """A rank takes its first step with a suspect now."""
        self._quarantine.begun(sequence_id)

    def rank_exited(self, rank: int, *, own_fault: bool) -> str | None:
        """A rank has exited unasked: a sequence that is found to terminate ranks is failed.

        own_fault: it was no signal that anybody may have sent. Returns the sequence's id.
        """
        silent = self._silent(rank)
        speaking = self._by_rank.get(rank, set()) - set(silent)
        convicted = self._quarantine.exited(silent, speaking, own_fault=own_fault)
        if convicted is not None:
            self.fail(
                convicted,
                FlexpertError(
                    f"request {convicted} is not tried again: more than one rank has exited in the "
                    "step that took it; the log of the service says how"
                ),
            )
        return convicted

    def publish(self, rank: int, event: TokenEvent) -> None:
        """Append what a rank produced, if it is the next of a sequence that runs there.

        Raises: Contradiction: tokens before it are missing.
        """
        entry = self._entries.get(event.id)
        if entry is None or entry.rank != rank or event.position < len(entry.generated):
            return  # cancelled meanwhile, or from a rank that no longer runs it
        if event.position > len(entry.generated) or event.finish not in _FINISHES:
            raise Contradiction(
                f"after token {len(entry.generated)} of {event.id} it publishes token "
                f"{event.position}, finish {event.finish!r}"
            )
        if self.log:
            self.log.published(event)
        if len(entry.generated) > entry.said:
            self._append(entry, event)
            return
        # the first that its rank says of it
        cleared = self._quarantine.cleared(event.id)
        self.router.computed(event.id)
        self._append(entry, event)
        if cleared:
            self.on_trial_over()

    def _append(self, entry: Entry, event: TokenEvent) -> None:
        entry.generated += event.tokens
        self.tokens_published += len(event.tokens)
        if event.degraded:
            self.tokens_degraded += len(event.tokens)
            self.answers_degraded += not entry.degraded
            entry.degraded = True
        self._measure(entry, event)
        if event.finish is not None:
            entry.finished = True
            if entry.trace is not None:
                entry.trace.over(self.clock(), event.finish, len(entry.generated))
            self.close(event.id)
        entry.stream.put(
            Delta(
                tokens=event.tokens,
                logprobs=event.logprobs,
                finish=event.finish,
                degraded=entry.degraded,
                prompt_logprobs=event.prompt_logprobs,
                cached=event.cached,
            )
        )

    def _measure(self, entry: Entry, event: TokenEvent) -> None:
        first = event.position == 0 and entry.times.first is None
        if self.meter is None or not (first or event.finish):
            return
        now = self.clock()
        if first:
            entry.times.begun(now, event.waited)
            self.meter.first_token(entry)
            if entry.trace is not None:
                entry.trace.first_token(now, event.waited)
        if event.finish:
            self.meter.finished(entry, event.finish, now)

    def entry(self, sequence_id: str) -> Entry | None:
        """An unfinished sequence."""
        return self._entries.get(sequence_id)

    def waiting(self) -> list[Entry]:
        """Sequences that no rank runs, oldest first."""
        return [entry for entry in self._entries.values() if entry.rank is None]

    def fail(self, sequence_id: str, error: FlexpertError) -> None:
        """End a sequence with an error."""
        failed = self._entries.get(sequence_id)
        if failed is not None and failed.trace is not None:
            failed.trace.over(self.clock(), "failed", len(failed.generated), str(error))
        entry = self.close(sequence_id)
        if entry:
            if self.meter:
                self.meter.failed()
            entry.stream.put(error)

    def rank_lost(self, rank: int) -> None:
        """For traces: a rank that runs sequences has ended unasked."""
        for sequence_id in self._by_rank.get(rank, ()):
            trace = self._entries[sequence_id].trace
            if trace is not None:
                trace.rank_lost()

    def of_rank(self, rank: int) -> list[str]:
        """Ids of the sequences a rank runs."""
        return sorted(self._by_rank.get(rank, ()))

    def fail_all(self, error: FlexpertError) -> None:
        for sequence_id in list(self._entries):
            self.fail(sequence_id, error)
