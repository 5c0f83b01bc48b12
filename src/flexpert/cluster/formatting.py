"""Changes as people read them, in one line each (pure)."""

from __future__ import annotations

from collections.abc import Sequence

from flexpert.cluster.views import OperationView


def ids(ranks: Sequence[int]) -> str:
    """[0, 2, 3] → "0 2 3"."""
    return " ".join(map(str, ranks)) or "none"


def describe_change(operation: OperationView) -> str:
    """What a change is about, in one line."""
    parts = []
    if operation.add:
        parts.append(f"add {ids(operation.add)}")
    if operation.remove:
        parts.append(f"remove {ids(operation.remove)}")
    return f"{', '.join(parts) or 'nothing to change'} → ranks {ids(operation.target)}"


def outcome_line(operation: OperationView) -> str:
    """How a change that is over went."""
    if operation.state == "failed":
        return f"failed: {operation.error or 'no reason was given'}"
    if operation.state == "cancelled":
        return "cancelled; the service is as it was"
    total = sum(operation.phases.values())
    pause = "" if operation.pause_ms is None else f", pause {operation.pause_ms:.1f} ms"
    return (
        f"done in {total:.2f} s: epoch {operation.epoch}, {operation.moved_experts} experts and "
        f"{operation.moved_requests} requests moved{_how_moved(operation)}{pause}"
    )


def _how_moved(operation: OperationView) -> str:
    """What of the requests that moved came along, and what did not."""
    parts = []
    if operation.moved_with_kv:
        size = operation.moved_kv_bytes / 2**20
        parts.append(f"{operation.moved_with_kv} with their KV, {size:.1f} MiB")
    if operation.recomputed_tokens:
        parts.append(f"up to {operation.recomputed_tokens} tokens computed again for want of room")
    return f" ({'; '.join(parts)})" if parts else ""
