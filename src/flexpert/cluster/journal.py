"""The request journal: what was asked, what was published, and where it runs.

It holds everything a sequence needs to go on elsewhere (prompt, published tokens, sampling by
position), so no rank is ever the only one that knows. One entry per unfinished sequence.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from types import TracebackType

import msgspec

from flexpert.cluster.views import Delta
from flexpert.engine.request import HeldKV, Move, SamplingParams, Sequence, TokenEvent
from flexpert.errors import FlexpertError, Overloaded


class Entry:
    """One unfinished sequence.

    rank: where it runs; None while no rank has it. heir: where its KV has been copied to, while its
    rank leaves. degraded: some of what it has said was computed without some experts.
    """

    __slots__ = ("degraded", "generated", "heir", "rank", "request", "stream")

    def __init__(self, request: Sequence, stream: TokenStream) -> None:
        self.request = request
        self.stream = stream
        self.generated: list[int] = []
        self.rank: int | None = None
        self.heir: int | None = None
        self.degraded = False

    def resume(self) -> Sequence:
        """The sequence as the next rank must receive it."""
        return msgspec.structs.replace(self.request, generated=list(self.generated))


class TokenStream:
    """The answer of one sequence as it comes; leaving its context or `cancel` frees and ends it."""

    def __init__(self, sequence_id: str, on_cancel: Callable[[str], None]) -> None:
        self.id = sequence_id
        self._queue: asyncio.Queue[Delta | FlexpertError | None] = asyncio.Queue()
        self._on_cancel = on_cancel
        self._over = False

    def put(self, item: Delta | FlexpertError) -> None:
        """Called by the journal."""
        self._queue.put_nowait(item)

    def cancel(self) -> None:
        if not self._over:
            self._over = True
            self._on_cancel(self.id)
            self._queue.put_nowait(None)  # a reader that waits ends, too

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
        return self._deltas()

    async def _deltas(self) -> AsyncIterator[Delta]:
        while not self._over:
            item = await self._queue.get()
            if item is None:
                return
            if isinstance(item, FlexpertError):
                self._over = True
                raise item
            if item.finish is not None:
                self._over = True
            yield item


class Journal:
    """All unfinished sequences; decides which rank runs what.

    Its memory is bounded: at most `limit` of them, each as long as the model's context.
    kv_tokens: how many tokens the KV cache of a rank holds; set before the first rank leaves.
    tokens_published, tokens_degraded: since the start; the latter were computed without some
    experts, or follow such. answers_degraded: how many sequences have any.
    """

    def __init__(self, limit: int = 16384) -> None:
        self.kv_tokens = 2**62
        self._limit = limit
        self._entries: dict[str, Entry] = {}
        self._by_rank: dict[int, set[str]] = {}
        self.tokens_published = 0
        self.tokens_degraded = 0
        self.answers_degraded = 0

    def __len__(self) -> int:
        return len(self._entries)

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
    ) -> Entry:
        """A new entry, not assigned yet.

        Raises: Overloaded
        """
        if len(self._entries) >= self._limit:
            raise Overloaded(
                f"{self._limit} sequences are unfinished already (max_sequences); try again later"
            )
        stream = TokenStream(sequence_id, on_cancel)
        request = Sequence(id=sequence_id, prompt=prompt, generated=[], params=params, eos=eos)
        entry = self._entries[sequence_id] = Entry(request, stream)
        return entry

    def assign(self, entry: Entry, ranks: Iterable[int]) -> int | None:
        """Give a sequence to the rank with the fewest; None if there are no ranks."""
        rank = min(ranks, key=lambda rank: (len(self._by_rank.get(rank, ())), rank), default=None)
        if rank is not None:
            entry.rank = rank
            self._by_rank.setdefault(rank, set()).add(entry.request.id)
        return rank

    def bequeath(self, held: Iterable[HeldKV], heirs: Iterable[int]) -> dict[int, list[Move]]:
        """Choose who will go on with a leaver's sequences; they stay where they are for now.

        Returns: heir → what moves there. Each goes to the rank that will then have the fewest, of
        those whose KV cache has room for it if there are any.
        """
        counts = {heir: len(self._by_rank.get(heir, ())) for heir in sorted(heirs)}
        tokens = {heir: sum(map(self._tokens_of, self._by_rank.get(heir, ()))) for heir in counts}
        for name, entry in self._entries.items():
            if entry.heir in counts and entry.rank not in counts:
                counts[entry.heir] += 1
                tokens[entry.heir] += self._tokens_of(name)
        moves: dict[int, list[Move]] = {}
        for one in held:
            found = self._entries.get(one.id)
            if found is None or not counts:
                continue
            more = self._tokens_of(one.id)
            full = {heir for heir in counts if tokens[heir] + more > self.kv_tokens}
            heir = min(counts, key=lambda rank: (rank in full, counts[rank], rank))
            found.heir = heir
            counts[heir] += 1
            tokens[heir] += more
            moves.setdefault(heir, []).append(Move(found.resume(), one))
        return moves

    def _tokens_of(self, sequence_id: str) -> int:
        entry = self._entries[sequence_id]
        return len(entry.request.prompt) + len(entry.generated)

    def hand_over(
        self, rank: int, held: Iterable[HeldKV], heirs: Iterable[int]
    ) -> dict[int, list[Move]]:
        """A rank has left: assign its sequences, to whom they were bequeathed if that one is among
        the heirs, else to the one with the fewest.

        Returns: heir → what moves there. Sequences of which nothing is held move, too.
        """
        heirs = sorted(heirs)
        known = {one.id: one for one in held}
        moves: dict[int, list[Move]] = {}
        for name in sorted({*known, *self._by_rank.get(rank, ())}):
            entry = self._entries.get(name)
            if entry is None or entry.rank != rank:
                continue  # it is over, or runs elsewhere already
            self.release(name)
            chosen = [entry.heir] if entry.heir in heirs else heirs
            entry.heir = None
            heir = self.assign(entry, [r for r in chosen if r is not None])
            if heir is not None:
                one = known.get(name) or HeldKV(name, 0, [])
                moves.setdefault(heir, []).append(Move(entry.resume(), one))
        return moves

    def release(self, sequence_id: str) -> Entry | None:
        """Take a sequence off its rank; it stays in the journal."""
        entry = self._entries.get(sequence_id)
        if entry and entry.rank is not None:
            self._by_rank[entry.rank].discard(sequence_id)
            entry.rank = None
        return entry

    def close(self, sequence_id: str) -> Entry | None:
        """Forget a sequence."""
        entry = self.release(sequence_id)
        self._entries.pop(sequence_id, None)
        return entry

    def publish(self, rank: int, event: TokenEvent) -> None:
        """Append what a rank produced, if it is the next of a sequence that runs there."""
        entry = self._entries.get(event.id)
        if entry is None or entry.rank != rank or event.position != len(entry.generated):
            return  # cancelled meanwhile, or from a rank that no longer runs it
        entry.generated += event.tokens
        self.tokens_published += len(event.tokens)
        if event.degraded:
            self.tokens_degraded += len(event.tokens)
            self.answers_degraded += not entry.degraded
            entry.degraded = True
        if event.finish is not None:
            self.close(event.id)
        entry.stream.put(
            Delta(
                tokens=event.tokens,
                logprobs=event.logprobs,
                finish=event.finish,
                degraded=entry.degraded,
            )
        )

    def waiting(self) -> list[Entry]:
        """Sequences that no rank runs, oldest first."""
        return [entry for entry in self._entries.values() if entry.rank is None]

    def fail(self, sequence_id: str, error: FlexpertError) -> None:
        """End a sequence with an error."""
        entry = self.close(sequence_id)
        if entry:
            entry.stream.put(error)

    def of_rank(self, rank: int) -> list[str]:
        """Ids of the sequences a rank runs."""
        return sorted(self._by_rank.get(rank, ()))

    def fail_all(self, error: FlexpertError) -> None:
        for sequence_id in list(self._entries):
            self.fail(sequence_id, error)
