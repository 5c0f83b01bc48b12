"""What head and ranks say to each other: msgspec structs as MessagePack over a socket pair.

Every message between them is one of these; a rank that says anything else is cut off. The same
structs go all the way, without a second spelling. A command takes five steps:

    1. the coordinator makes the struct and gives it to the head's `send`
    2. `Transport.send` encodes it and writes it to the rank's socket
    3. the rank's thread "commands" (`rank_process`) reads and decodes it
    4. `RankEngine.submit` queues it
    5. between two steps the engine calls the handler of its type

and a report four:

    1. the engine makes the struct and calls `report`
    2. `rank_process` encodes it and writes it to its socket
    3. the head's `Transport` reads and decodes it
    4. head and coordinator match on its type
"""

from __future__ import annotations

from typing import Literal

import msgspec

from flexpert.engine.draft_counts import DraftCounts
from flexpert.engine.request import (
    BlockChanges,
    CachedBlock,
    HeldKV,
    KVMigration,
    RequestSequence,
    TokenEvent,
)
from flexpert.errors import FlexpertError
from flexpert.moe.placement import Placement


class Contradiction(FlexpertError):  # noqa: N818
    """A report that cannot be true: the rank that sent it is not to be trusted any more."""


class Prepare(msgspec.Struct, frozen=True, tag="prepare"):
    """Get ready for an epoch while serving goes on. Answered by `Prepared` or `Failed`.

    members: rank id → address of its window. exporters: rank id → address of the experts it holds
    in the running epoch. cache: address of the host's copy of the experts; b"": there is none.
    machines: rank id → the machine it is on, of all that take part. bandwidth: bytes of experts a
    second that a rank loads at most; 0: as fast as it can.
    """

    epoch: int
    members: dict[int, bytes]
    placement: Placement
    exporters: dict[int, bytes] = {}
    cache: bytes = b""
    machines: dict[int, str] = {}
    bandwidth: int = 0


class Commit(msgspec.Struct, frozen=True, tag="commit"):
    """All members are ready: vote for the epoch; a newcomer enters it at once."""

    epoch: int


class Cancel(msgspec.Struct, frozen=True, tag="cancel"):
    """Forget a prepared epoch."""

    epoch: int


class Admit(msgspec.Struct, frozen=True, tag="admit"):
    """Sequences to run."""

    sequences: list[RequestSequence]


class Offer(msgspec.Struct, frozen=True, tag="offer"):
    """To a leaver: tell what KV can move ahead. Answered by `Offered`."""

    epoch: int


class Fetch(msgspec.Struct, frozen=True, tag="fetch"):
    """Copy the KV of sequences that will come from a leaver. Answered by `Fetched`.

    kv: address of the leaver's KV cache. cached: what else to copy of it, as far as there is room
    that nothing has; the first is the last to be missed.
    """

    epoch: int
    source: int
    kv: bytes
    migrations: list[KVMigration]
    cached: list[CachedBlock] = []


class Adopt(msgspec.Struct, frozen=True, tag="adopt"):
    """Go on with these sequences of a rank that has left. Answered by `Adopted`."""

    source: int
    kv: bytes
    migrations: list[KVMigration]


class Abort(msgspec.Struct, frozen=True, tag="abort"):
    """Sequences nobody waits for any more."""

    ids: list[str]


class Halt(msgspec.Struct, frozen=True, tag="halt"):
    """A peer is lost: drop the step under way and wait for this epoch. Answered by `Halted`."""

    epoch: int


class Hold(msgspec.Struct, frozen=True, tag="hold"):
    """After `Halt`: no epoch follows until there are more ranks. members: who is still there."""

    members: list[int]


class StoreAnswer(msgspec.Struct, frozen=True, tag="store_answer"):
    """To the `StoreRequest` with that number. value: what the entry holds then."""

    number: int
    value: str


class Attach(msgspec.Struct, frozen=True, tag="attach"):
    """The first command of a head that takes a running rank over. Answered by `Attached`."""


class Persisted(msgspec.Struct, frozen=True, tag="persisted"):
    """A head that could be resumed has written down what came up to this `Published`, counted from
    1 on: it need not be kept for the next head."""

    count: int


class Stop(msgspec.Struct, frozen=True, tag="stop"):
    """End this rank."""


Command = (
    Prepare
    | Commit
    | Cancel
    | Admit
    | Offer
    | Fetch
    | Adopt
    | Abort
    | Halt
    | Hold
    | StoreAnswer
    | Attach
    | Persisted
    | Stop
)


class Load(msgspec.Struct, frozen=True, array_like=True):
    """running, waiting: sequences; kv_used: share of KV blocks; since the process began, graphs:
    CUDA graphs captured, preemptions: how often a sequence lost its blocks."""

    running: int
    waiting: int
    kv_used: float
    graphs: int = 0
    preemptions: int = 0


class MemoryUse(msgspec.Struct, frozen=True, array_like=True):
    """Bytes of a rank, measured. host: private to it. device: of a GPU's memory; of these,
    device_spare are kept for experts to come."""

    host: int
    device: int = 0
    device_spare: int = 0


class ExchangeUse(msgspec.Struct, frozen=True, array_like=True):
    """Of a rank's exchanges since its process began. count: dispatches, each with its combine.
    dispatch_s, combine_s: waited for all peers. peer_s: peer → from the begin of such waits until
    that peer's part had come; the one with the largest is the slow one. sent: bytes of rows, those
    it keeps included. On GPUs only the count."""

    count: int = 0
    dispatch_s: float = 0.0
    combine_s: float = 0.0
    peer_s: dict[int, float] = {}
    sent: int = 0


class Memory(msgspec.Struct, frozen=True):
    """Planned bytes of a rank, of the host's memory or of a GPU's.

    runtime: measured when the rank is warm, before that an estimate. Of the host: what the process
    takes beyond its share of the fork server's pages. Of a GPU: the context, the code of kernels,
    captured graphs, and what torch's pools and libraries hold besides the weights.
    """

    dense: int
    experts: int
    kv: int
    windows: int
    runtime: int

    @property
    def total(self) -> int:
        return self.dense + self.experts + self.kv + self.windows + self.runtime


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    """A rank is up, its dense weights are loaded and its window is open.

    kv: address of its KV cache, for those who take its sequences over. experts: address of the
    experts it will hold, for those who need one. laps: what it did until now → seconds. life:
    address of the liveness lock that its main thread holds; b"": there is none. verdicts: which
    modules of the model our kernels compute, encoded, for later ranks (`fusion_verdicts`).
    machine: equal on ranks that can open each other's memory. steps: see `RankView`.
    """

    pid: int
    host: str
    address: bytes
    kv: bytes
    experts: bytes
    laps: dict[str, float] = {}
    life: bytes = b""
    verdicts: bytes = b""
    machine: str = ""
    steps: str = ""


class Unable(msgspec.Struct, frozen=True, tag="unable"):
    """A rank cannot come up; it ends when it is told to stop."""

    error: str


class Progress(msgspec.Struct, frozen=True, tag="progress"):
    """Share of a preparation that is done, 0 to 1."""

    epoch: int
    share: float


class Prepared(msgspec.Struct, frozen=True, tag="prepared"):
    """Connected, loaded and warm: ready to vote.

    copied: experts that came from peers' memory. memory: of the host. laps: what it did for this →
    seconds; "held back": of its experts' seconds, those in which it kept to the bandwidth.
    device_memory: of the GPU; None on a CPU. used: as measured last.
    """

    epoch: int
    copied: int
    memory: Memory
    laps: dict[str, float] = {}
    device_memory: Memory | None = None
    used: MemoryUse = MemoryUse(0)


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """A preparation failed, or what a `Commit` names is not prepared; it goes on as before."""

    epoch: int
    error: str


class Switched(msgspec.Struct, frozen=True, tag="switched"):
    """The first vote of the epoch is whole.

    pause_ms: see `OperationView`; None for newcomers. laps: parts of it → seconds. over_nixl: the
    peers of the epoch that this rank reaches over NIXL; the others share memory with it.
    """

    epoch: int
    pause_ms: float | None
    load: Load
    laps: dict[str, float] = {}
    over_nixl: list[int] = []


class Halted(msgspec.Struct, frozen=True, tag="halted"):
    """A `Halt` was heard: this process is alive, whatever its step loop does."""

    epoch: int


class RouterLoad(msgspec.Struct, frozen=True, array_like=True):
    """What this rank's tokens have asked of experts since the report before.

    choices: pairs of little-endian uint32, (layer * experts + expert, tokens that chose it), for
    those that any did. compute_s: time in the products of the experts that this rank holds; 0 on a
    GPU, where it is not measured.
    """

    choices: bytes
    compute_s: float = 0.0


class Alive(msgspec.Struct, frozen=True, tag="alive"):
    """Sent now and then from a thread of its own: the process is neither stopped nor starved.

    stuck_s: for how long its step loop has done nothing, not even wait. used: its memory, as
    measured last. wire_bytes: peer over NIXL → bytes written to it for exchanges, since it was
    connected. load: about once a second, if there was any.
    """

    stuck_s: float = 0.0
    used: MemoryUse = MemoryUse(0)
    wire_bytes: dict[int, int] = {}
    load: RouterLoad | None = None
    exchanges: ExchangeUse = ExchangeUse()


class Offered(msgspec.Struct, frozen=True, tag="offered"):
    """Full KV blocks of a leaver's sequences; they stay as they are until it has left. cached: and
    of its prefix cache, as `Fetch` has them."""

    epoch: int
    held: list[HeldKV]
    cached: list[CachedBlock] = []


class Fetched(msgspec.Struct, frozen=True, tag="fetched"):
    """What could be copied of a leaver's offer is here. size, cached: bytes of sequences that move,
    and of what no sequence holds. blocks: see `Published`."""

    epoch: int
    source: int
    size: int
    blocks: BlockChanges | None = None
    cached: int = 0


class HandedOver(msgspec.Struct, frozen=True, tag="handed_over"):
    """A leaver has left; these sequences must go on elsewhere. It keeps its KV until it ends."""

    epoch: int
    held: list[HeldKV]


class Adopted(msgspec.Struct, frozen=True, tag="adopted"):
    """A leaver's sequences go on here.

    moved: how many with their KV. size: bytes copied since `Fetched`. recomputed: tokens that must
    be computed again, because there were no blocks for them. blocks: see `Published`.
    """

    source: int
    moved: int
    size: int
    recomputed: int
    blocks: BlockChanges | None = None


class Published(msgspec.Struct, frozen=True, tag="published"):
    """The tokens of one whole step.

    blocks: how the prefix cache has changed since a report last said so; None: not at all.
    computed: how many tokens the step had, those of prompts included. drafts: what became of
    proposed tokens in it; None: there were none.
    """

    events: list[TokenEvent]
    load: Load
    blocks: BlockChanges | None = None
    computed: int = 0
    drafts: DraftCounts | None = None


class Rejected(msgspec.Struct, frozen=True, tag="rejected"):
    """A sequence that this rank can never run. fault: not for what it asks for, but for ours."""

    id: str
    error: str
    fault: bool = False


class OnTrial(msgspec.Struct, frozen=True, tag="on_trial"):
    """The first step with a sequence that may be what ends ranks begins now."""

    id: str


class Broken(msgspec.Struct, frozen=True, tag="broken"):
    """Evidence: a step could not be completed. ranks: those that did not answer."""

    epoch: int
    ranks: list[int]
    error: str


class Attached(msgspec.Struct, frozen=True, tag="attached"):
    """To a head that takes this rank over, behind what earlier commands have led to.

    hello: as at its beginning. sequences: ids of those that it has. persisted: how many `Published`
    the head before had written down; published: those after it. blocks: keys of all blocks that its
    prefix cache holds by now.
    """

    hello: Hello
    sequences: list[str]
    persisted: int
    published: list[Published]
    blocks: bytes = b""


StoreOperation = Literal["set", "compare_set", "delete"]


class StoreRequest(msgspec.Struct, frozen=True, tag="store"):
    """A call of the store through which ranks of different machines meet (`head_store.py`)."""

    number: int
    operation: StoreOperation
    key: str
    value: str = ""
    expected: str = ""


Report = (
    Hello
    | Attached
    | Unable
    | Progress
    | Prepared
    | Failed
    | Switched
    | Halted
    | Alive
    | Offered
    | Fetched
    | HandedOver
    | Adopted
    | Published
    | Rejected
    | OnTrial
    | Broken
    | StoreRequest
)

_encode = msgspec.msgpack.Encoder().encode
_latest: tuple[Prepare | None, bytes] = (None, b"")


def encode(message: Command | Report) -> bytes:
    """As bytes. A `Prepare` is as large as the placement and the same for all ranks of a change, so
    it is encoded once for all of them."""
    global _latest
    if type(message) is not Prepare:
        return _encode(message)
    plan, encoded = _latest
    if plan is not message:
        encoded = _encode(message)
        _latest = message, encoded
    return encoded


decode_command = msgspec.msgpack.Decoder(Command).decode
decode_report = msgspec.msgpack.Decoder(Report).decode
