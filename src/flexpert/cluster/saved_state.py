"""What a head writes down for the next one: msgspec structs, and how they become rows."""

from __future__ import annotations

from enum import Enum

import msgspec

from flexpert.cluster.hosts.agent_protocol import FreeMemory
from flexpert.cluster.kept_counters import KeptSample
from flexpert.cluster.membership import Phase
from flexpert.cluster.views import OperationView
from flexpert.engine.request import RequestSequence, TokenEvent
from flexpert.moe.placement import Placement


class Purpose(Enum):
    """Why a change runs."""

    REQUEST = "request"
    RECOVERY = "recovery"
    RESTART = "restart"
    RELOAD = "reload"
    REBALANCE = "rebalance"


class SavedChange(msgspec.Struct, frozen=True):
    """See `membership.Change`."""

    epoch: int
    before: frozenset[int]
    after: frozenset[int]
    doomed: frozenset[int]
    kept: bool
    cause: str


class SavedCluster(msgspec.Struct, frozen=True):
    """Written down before what it says is carried out.

    epochs: how many were begun, failed ones too. ranks: id → the process' instance, of all that the
    head knew of. placement: of `epoch`. events: how many were published.
    """

    epoch: int
    members: frozenset[int]
    epochs: int
    phase: Phase
    change: SavedChange | None
    placement: Placement | None
    desired: frozenset[int]
    ranks: dict[int, str]
    verdicts: bytes
    events: int = 0


class SavedTarget(msgspec.Struct, frozen=True):
    """See `operation.TargetRequest`."""

    ranks: int | None
    add: int
    remove: tuple[int, ...]
    join: tuple[int, ...] = ()
    rebalance: bool = False


class SavedOperation(msgspec.Struct, frozen=True):
    """view: as it was shown last. before: the ranks at its beginning. begun: else it has waited for
    another, and where it leads is not certain."""

    view: OperationView
    before: frozenset[int]
    purpose: Purpose
    request: SavedTarget | None
    begun: bool


class SavedHost(msgspec.Struct, frozen=True):
    """A host whose agent has been asked for its rank. session: known to it and the head alone.
    free: bytes of its memory, and of its GPU's, when its model was opened."""

    session: bytes
    rank: int
    host: str
    free: FreeMemory


class SavedRequest(msgspec.Struct, frozen=True):
    """A sequence that somebody waits for, or may come back for. events: what was published of it,
    in order."""

    sequence: RequestSequence
    events: list[TokenEvent]


class SavedState(msgspec.Struct, frozen=True):
    """All of it. settings: of the ranks, as JSON. operations: oldest first."""

    settings: str
    cluster: SavedCluster | None
    operations: list[SavedOperation]
    requests: list[SavedRequest]
    hosts: list[SavedHost] = []
    counters: list[KeptSample] = []


class SavedRun(msgspec.Struct, frozen=True, array_like=True):
    """What was published of one request, in order. tokens: from `position` on, each an event of its
    own that said nothing else; then `event`, which did."""

    position: int
    tokens: list[int]
    event: TokenEvent | None = None


encode = msgspec.msgpack.Encoder().encode
decode_cluster = msgspec.msgpack.Decoder(SavedCluster).decode
decode_operation = msgspec.msgpack.Decoder(SavedOperation).decode
decode_sequence = msgspec.msgpack.Decoder(RequestSequence).decode
decode_counters = msgspec.msgpack.Decoder(list[KeptSample]).decode
decode_hosts = msgspec.msgpack.Decoder(list[SavedHost]).decode
_decode_runs = msgspec.msgpack.Decoder(list[SavedRun]).decode


def runs_of(events: list[TokenEvent]) -> list[SavedRun]:
    """Of one request: nearly all are one token, and what they share is written once."""
    runs: list[SavedRun] = []
    position = events[0].position
    tokens: list[int] = []
    for event in events:
        if (
            len(event.tokens) == 1
            and event.finish is None
            and event.logprobs is None
            and event.prompt_logprobs is None
            and not (event.degraded or event.cached)
            and event.position == position + len(tokens)
        ):
            tokens += event.tokens
        else:
            runs.append(SavedRun(position, tokens, event))
            position, tokens = event.position + len(event.tokens), []
    if tokens:
        runs.append(SavedRun(position, tokens))
    return runs


def decode_events(sequence_id: str, data: bytes) -> list[TokenEvent]:
    """What `runs_of` was given, event by event. Raises: msgspec.MsgspecError"""
    events = []
    for run in _decode_runs(data):
        for place, token in enumerate(run.tokens, run.position):
            events.append(TokenEvent(sequence_id, place, [token], None, None))
        if run.event is not None:
            events.append(run.event)
    return events
