"""Changes and memory as people read them, in one line each (pure)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from flexpert.cluster.views import ChangePreview, OperationView

if TYPE_CHECKING:
    from flexpert.engine.rank_protocol import Memory


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
    if not parts and operation.moved_experts:
        parts.append(f"move {operation.moved_experts} experts")
    return f"{', '.join(parts) or 'nothing to change'} → ranks {ids(operation.target)}"


def describe_preview(preview: ChangePreview) -> list[str]:
    """What a change would move, in lines."""
    if not (preview.add or preview.remove or preview.moved_experts):
        return ["nothing would change"]
    parts = []
    if preview.add:
        parts.append(f"{ids(preview.add)} would join")
    if preview.remove:
        parts.append(f"{ids(preview.remove)} would leave")
    lines = [f"{', '.join(parts) or 'experts would move'} → ranks {ids(preview.target)}"]
    if preview.moved_experts:
        most = max(preview.experts_to_load, key=lambda rank: preview.experts_to_load[rank])
        lines.append(
            f"{preview.moved_experts} experts to load, {mib(preview.moved_bytes)}; "
            f"the most on rank {most}: {preview.experts_to_load[most]}"
        )
    if preview.remove:
        lines.append(f"{preview.moved_requests} requests to move")
    return lines


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
    if operation.moved_cached_bytes:
        parts.append(f"{operation.moved_cached_bytes / 2**20:.1f} MiB of cached prefixes")
    return f" ({'; '.join(parts)})" if parts else ""


def mib(size: int) -> str:
    """Bytes in MiB."""
    return f"{size / 2**20:,.0f} MiB"


def describe_memory(host: Memory | None, device: Memory | None) -> str:
    """What a rank plans to use. host: of the host's memory; device: of a GPU's, if it has one."""
    if host is None:
        return ""
    if device is None:
        return f"{memory_parts(host)} planned"
    return f"GPU {memory_parts(device, gpu=True)}, host {host.total / 2**20:.1f} MiB planned"


def memory_parts(memory: Memory, *, gpu: bool = False) -> str:
    """The parts and their sum in MiB."""
    parts = (
        ("dense", memory.dense),
        ("experts", memory.experts),
        ("KV", memory.kv),
        ("windows", memory.windows),
        ("graphs and runtime" if gpu else "runtime", memory.runtime),
    )
    text = " + ".join(f"{name} {size / 2**20:.1f}" for name, size in parts)
    return f"{text} = {memory.total / 2**20:.1f} MiB"
