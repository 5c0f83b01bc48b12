"""What a head writes down for the next one: msgspec structs, and how they become rows."""

from __future__ import annotations

from enum import Enum

import msgspec

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


encode = msgspec.msgpack.Encoder().encode
decode_cluster = msgspec.msgpack.Decoder(SavedCluster).decode
decode_operation = msgspec.msgpack.Decoder(SavedOperation).decode
decode_sequence = msgspec.msgpack.Decoder(RequestSequence).decode
decode_event = msgspec.msgpack.Decoder(TokenEvent).decode
