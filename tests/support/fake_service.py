"""Canned answers of a service that is none."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

OPERATION = {
    "id": "op-1",
    "state": "preparing",
    "target": [0, 1, 2, 3],
    "add": [2, 3],
    "remove": [],
    "phase": "spawn",
    "progress": 0.0,
    "phases": {"spawn": 0.1},
    "epoch": 2,
}
DONE = OPERATION | {
    "state": "done",
    "phase": "done",
    "phases": {"spawn": 0.25, "load": 0.5, "commit": 0.01},
    "moved_experts": 32,
    "moved_requests": 3,
    "moved_with_kv": 2,
    "moved_kv_bytes": 3 << 20,
    "recomputed_tokens": 40,
    "pause_ms": 4.25,
}
CLUSTER = {
    "epoch": 7,
    "model": "tiny",
    "max_ranks": 4,
    "ranks": [
        {"id": 0, "state": "active", "host": "h", "pid": 11, "running": 3, "kv_used": 0.5},
        {"id": 2, "state": "leaving", "host": "h", "pid": 12, "waiting": 1, "experts": 32},
    ],
    "placement": {"layers": 4, "experts": 16, "replicas": 64, "experts_per_rank": {"0": 32}},
    "operation": None,
}


@dataclass
class FakeService:
    """replies: "METHOD /path" → (status, JSON or raw bytes), or a list of them, one a time (the
    last for ever). requests: what came: (METHOD /path, body, authorization)."""

    url: str = ""
    replies: dict[str, Any] = field(default_factory=dict)
    requests: list[tuple[str, Any, str | None]] = field(default_factory=list)

    def reply(self, what: str) -> tuple[int, Any]:
        found = self.replies.get(what, (404, {"error": {"message": f"no {what}"}}))
        if isinstance(found, list):
            found = found.pop(0) if len(found) > 1 else found[0]
        return found
