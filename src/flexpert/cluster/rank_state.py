"""What the head knows of one rank."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field

from flexpert.cluster.interfaces import Work
from flexpert.cluster.views import RankStatus, RankView
from flexpert.engine import rank_protocol as msg
from flexpert.moe.placement import Placement

MOST_MACHINE = 300  # characters of a machine's name
MOST_STEPS = 300  # characters of what computes steps


@dataclass(slots=True)
class RankState:
    """Kept by the coordinator from the start of the process to its certain exit."""

    id: int
    instance: str = field(default_factory=lambda: secrets.token_hex(8))
    state: RankStatus = "starting"
    host: str = ""
    machine: str = ""  # ranks whose names are equal share memory
    over_nixl: list[int] = field(default_factory=list)  # peers, in the current epoch
    wire_bytes: dict[int, int] = field(default_factory=dict)  # peer → written to it
    exchanges: msg.ExchangeUse = field(default_factory=msg.ExchangeUse)
    ended: bool = False  # lost unasked: its connection is closed, its process not reaped yet
    pid: int = 0
    address: bytes = b""
    kv: bytes = b""  # address of its KV cache
    experts: bytes = b""  # address of those it holds
    load: msg.Load = field(default_factory=lambda: msg.Load(0, 0, 0.0))
    used: msg.MemoryUse = field(default_factory=lambda: msg.MemoryUse(0))
    memory: msg.Memory | None = None  # of the host, planned
    device_memory: msg.Memory | None = None  # of the GPU, planned
    error: str = ""
    blameless: bool = False  # terminated because others were lost
    heard: float = 0.0  # when, by the head's clock
    silent_s: float | None = None  # when it was found lost: since its last word
    steps: str = ""  # what computes them
    looked: float | None = None  # at its work, when it had been silent for a while
    work: Work | None = None  # what it had done by then
    starved: frozenset[int] = frozenset()  # threads that wanted a processor at each look since
    slow: bool = False  # holds the others up, by no work of its own
    suspect: bool = False  # silent for long, and has done nothing since

    def found_lost(self, now: float) -> None:
        """For the first time; by the head's clock."""
        if self.silent_s is None and self.heard:
            self.silent_s = max(0.0, now - self.heard)

    @property
    def failing(self) -> bool:
        """Whether it is lost, or is about to be."""
        return self.ended or self.suspect or self.state == "stalled"

    def introduce(self, hello: msg.Hello) -> None:
        """What its process says of itself."""
        self.pid, self.host = hello.pid, hello.host
        self.machine = hello.machine[:MOST_MACHINE]
        self.steps = hello.steps[:MOST_STEPS]
        self.address, self.kv, self.experts = hello.address, hello.kv, hello.experts

    def view(self, placement: Placement | None, *, safe_to_delete: bool) -> RankView:
        return RankView(
            id=self.id,
            instance=self.instance,
            safe_to_delete=safe_to_delete,
            state=self.state,
            host=self.host,
            machine=self.machine,
            over_nixl=self.over_nixl,
            wire_bytes={peer: self.wire_bytes.get(peer, 0) for peer in self.over_nixl},
            pid=self.pid,
            running=self.load.running,
            waiting=self.load.waiting,
            kv_used=round(self.load.kv_used, 4),
            experts=placement.count(self.id) if placement else 0,
            memory_bytes=self.used.host,
            planned_bytes=self.memory.total if self.memory else 0,
            device_memory_bytes=self.used.device,
            device_planned_bytes=self.device_memory.total if self.device_memory else 0,
            device_spare_bytes=self.used.device_spare,
            graphs=self.load.graphs,
            steps=self.steps,
            preemptions=self.load.preemptions,
            exchanges=self.exchanges.count,
            exchanged_bytes=self.exchanges.sent,
            dispatch_wait_s=round(self.exchanges.dispatch_s, 6),
            combine_wait_s=round(self.exchanges.combine_s, 6),
            slow=self.slow,
            waited_for={peer: round(s, 6) for peer, s in self.exchanges.peer_s.items()},
        )
