"""`flexpert bench rebalance`: what moving experts by their load gains, and what streams feel.

Two services of the same skewed model, one with `--balance off` and one with `--balance auto`, get
the same streams in turn. First the second one is left to find its placement, under streams: their
gaps then are compared with those before.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import msgspec
import torch

from flexpert.bench.elastic import PROMPT, ElasticPlan, ElasticStreams
from flexpert.bench.load import call
from flexpert.bench.machine import Machine, this_machine
from flexpert.bench.service import own_service
from flexpert.bench.skewed_checkpoint import make_skewed_checkpoint
from flexpert.errors import FlexpertError

_SETTLE_S = 1.0
_KV, _LARGE_KV = "64MiB", "2GiB"
_LOOK_S = 0.05
MODES = ("off", "auto")

Note = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class RebalancePlan:
    """prompt, tokens: of each request and its answer. seconds: of each measurement. rounds: of both
    services in turn. balance_s: for the second to find its placement. large: a model whose experts
    keep GPUs busy. flags: of both, besides."""

    ranks: int = 4
    clients: int = 16
    prompt: int = PROMPT
    tokens: int = 200
    large: bool = False
    rounds: int = 3
    seconds: float = 10.0
    balance_s: float = 120.0
    flags: tuple[str, ...] = ()


class RebalancedRound(msgspec.Struct, frozen=True, kw_only=True):
    """One measurement of one service."""

    mode: str
    tokens_per_s: float
    longest_gap_ms: float
    imbalance: float


class BalanceChange(msgspec.Struct, frozen=True, kw_only=True):
    """A rebalance that the service began. longest_gap_ms: of any stream, from 1 s before it began
    to be looked for until half a second after its end."""

    state: str
    moved_experts: int
    pause_ms: float | None
    longest_gap_ms: float
    reason: str


class RebalanceReport(msgspec.Struct, frozen=True, kw_only=True):
    """undisturbed_gap_ms: the longest of the same service before it moved anything. lost: answers
    that were not whole."""

    rounds: list[RebalancedRound]
    changes: list[BalanceChange]
    undisturbed_gap_ms: float
    lost: list[str]
    clients: int
    ranks: int
    flags: list[str]
    machine: Machine

    def rate(self, mode: str) -> float:
        """Tokens a second, of all rounds."""
        found = [one.tokens_per_s for one in self.rounds if one.mode == mode]
        return sum(found) / len(found) if found else 0.0


def run_rebalance(plan: RebalancePlan, note: Note) -> RebalanceReport:
    """Raises: FlexpertError: a service does not start, or stops answering."""
    return asyncio.run(_run(plan, note))


async def _run(plan: RebalancePlan, note: Note) -> RebalanceReport:
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "skewed"
        (_make_large if plan.large else make_skewed_checkpoint)(folder)
        streams: dict[str, ElasticStreams] = {}
        clients = ElasticPlan(clients=plan.clients, prompt=plan.prompt, tokens=plan.tokens)
        memory = _LARGE_KV if plan.large else _KV
        for mode in MODES:
            flags = (
                *("--model", str(folder), "--ranks", str(plan.ranks), "--balance", mode),
                *("--max-ranks", str(plan.ranks), "--kv-memory", memory, *plan.flags),
            )
            service = await stack.enter_async_context(own_service(flags, start_timeout_s=600.0))
            note(f"--balance {mode}: ready")
            streams[mode] = ElasticStreams(service.target, clients)
        undisturbed_ms, changes = await _settle(streams["auto"], plan, note)
        rounds = []
        for _ in range(plan.rounds):
            for mode in MODES:
                rounds.append(await _measure(mode, streams[mode], plan.seconds, note))
        return RebalanceReport(
            rounds=rounds,
            changes=changes,
            undisturbed_gap_ms=undisturbed_ms,
            lost=[error for one in streams.values() for error in one.lost],
            clients=plan.clients,
            ranks=plan.ranks,
            flags=list(plan.flags),
            machine=this_machine(),
        )


def _make_large(folder: Path) -> None:
    """6.5 GB of bfloat16."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    make_skewed_checkpoint(
        folder, hidden=2048, inter=4096, layers=8, dtype=torch.bfloat16, device=device
    )
    if device == "cuda":
        torch.cuda.empty_cache()


async def _get(streams: ElasticStreams, path: str) -> Any:
    status, answer = await call(streams.target, "GET", path, None, timeout_s=60.0)
    if status >= 300:
        raise FlexpertError(f"GET {path}: HTTP {status}: {answer}")
    return answer


async def _settle(
    streams: ElasticStreams, plan: RebalancePlan, note: Note
) -> tuple[float, list[BalanceChange]]:
    """Streams until the service has moved what it moves; (longest gap before, the changes)."""
    begun: list[tuple[float, float, dict[str, Any]]] = []
    async with streams.running():
        await asyncio.sleep(_SETTLE_S)
        begin = perf_counter()
        first: float | None = None
        while perf_counter() - begin < plan.balance_s:
            await asyncio.sleep(_LOOK_S)
            cluster = await _get(streams, "/cluster")
            operation = cluster["operation"]
            if operation is not None:
                first = first or perf_counter()
                at, id = perf_counter(), operation["id"]
                while operation["state"] in ("preparing", "committing"):
                    await asyncio.sleep(_LOOK_S)
                    operation = await _get(streams, f"/cluster/operations/{id}")
                begun.append((at, perf_counter(), operation))
                note(
                    f"{operation['state']}: {operation['reason']}, {operation['moved_experts']} "
                    f"experts, pause {operation['pause_ms']} ms"
                )
            done = cluster["balance"]["verdict"] in ("small", "balanced")
            if begun and done and cluster["operation"] is None:
                break
    undisturbed_s, _ = streams.longest_gap_s(begin, (first or perf_counter()) - 1.0)
    changes = [
        BalanceChange(
            state=operation["state"],
            moved_experts=operation["moved_experts"],
            pause_ms=operation["pause_ms"],
            longest_gap_ms=streams.longest_gap_s(at - 1.0, end + 0.5)[0] * 1e3,
            reason=operation["reason"] or "",
        )
        for at, end, operation in begun
    ]
    return undisturbed_s * 1e3, changes


async def _measure(
    mode: str, streams: ElasticStreams, seconds: float, note: Note
) -> RebalancedRound:
    async with streams.running():
        await asyncio.sleep(_SETTLE_S)
        begin = perf_counter()
        await asyncio.sleep(seconds)
        end = perf_counter()
        imbalance = (await _get(streams, "/cluster"))["balance"]["imbalance"]
    found = RebalancedRound(
        mode=mode,
        tokens_per_s=streams.rate(begin, end),
        longest_gap_ms=streams.longest_gap_s(begin, end)[0] * 1e3,
        imbalance=imbalance,
    )
    note(f"--balance {mode}: {found.tokens_per_s:,.0f} tokens/s, imbalance {imbalance:.2f}")
    return found


def rebalance_text(report: RebalanceReport) -> str:
    """For people."""
    lines = [f"{report.ranks} ranks, {report.clients} streams"]
    for one in report.rounds:
        lines.append(
            f"  --balance {one.mode:<5} {one.tokens_per_s:8,.0f} tokens/s, imbalance "
            f"{one.imbalance:.2f}, longest gap {one.longest_gap_ms:.0f} ms"
        )
    off, auto = report.rate("off"), report.rate("auto")
    if off:
        lines.append(f"auto over off: {auto / off:.2f}")
    lines.append(f"longest gap before anything moved: {report.undisturbed_gap_ms:.1f} ms")
    for change in report.changes:
        pause = "-" if change.pause_ms is None else f"{change.pause_ms:.1f} ms"
        lines.append(
            f"rebalance, {change.state}: {change.moved_experts} experts, pause {pause}, longest "
            f"gap {change.longest_gap_ms:.1f} ms ({change.reason})"
        )
    lines += [f"lost: {error}" for error in report.lost]
    return "\n".join(lines)
