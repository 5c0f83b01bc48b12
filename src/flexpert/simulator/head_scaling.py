"""`flexpert simulate scale`: what the head does for many ranks, by its real code without processes.

All times are processor time of this thread.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec
from rich.table import Table

from flexpert.bench.machine import Machine, this_machine
from flexpert.bench.report_table import figures_table
from flexpert.cluster.journal import Arrival, Journal
from flexpert.cluster.request_routing import RankCaches, Router
from flexpert.engine import rank_protocol as msg
from flexpert.engine.block_keys import prompt_keys, stride_of
from flexpert.engine.request import BlockChanges, SamplingParams, TokenEvent
from flexpert.errors import FlexpertError
from flexpert.moe.placement import Placement, cover, replan
from flexpert.simulator.immediate_ranks import ADDRESS_BYTES, ImmediateRanks
from flexpert.simulator.simulated_service import skewed_loads
from flexpert.simulator.step_vote import extrapolated, vote_us

Note = Callable[[str], None]

_STREAMS = 8  # sequences of each rank
_PROMPT = 512  # tokens
_REQUESTS = 64
_STEPS = 3
_BLOCKS = 4096
_VOTES = (2, 4, 8, 16, 32)  # ranks for which the vote is measured
_BY_LOAD_MOST_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalingPlan:
    """experts: of each of `layers`, with `redundant` replicas more, and at least as many as let
    every rank have one. votes: numbers of ranks for which the vote is measured."""

    ranks: Sequence[int]
    experts: int
    layers: int
    redundant: int = 0
    votes: Sequence[int] = _VOTES

    def redundant_on(self, ranks: int) -> int:
        """So that every rank has at least one expert of each layer."""
        return max(self.redundant, ranks + 1 - self.experts)


class ScaledHead(msgspec.Struct, frozen=True, kw_only=True):
    """With so many ranks.

    first_s, join_s, loss_s: placing all experts anew, for one rank more, and on those that are left
    after a loss; by_load_s: one rank more, by the load of experts; None: not measured, because the
    number before took too long.
    prepare_bytes, prepare_encode_ms, prepare_decode_ms: of the command to each rank.
    published_bytes: of the report of a rank's step with 8 tokens.
    step_ms, token_us: the head's time for the reports of a step of all ranks, and for each token.
    request_ms: routing, journal and end of a request.
    change_s, change_messages, change_bytes: the control plane of a join of one rank.
    vote_us: of a rank for a vote.
    """

    ranks: int
    redundant: int
    first_s: float
    join_s: float
    loss_s: float
    by_load_s: float | None
    prepare_bytes: int
    prepare_encode_ms: float
    prepare_decode_ms: float
    published_bytes: int
    step_ms: float
    token_us: float
    request_ms: float
    change_s: float
    change_messages: int
    change_bytes: int
    vote_us: float


class ScalingReport(msgspec.Struct, frozen=True, kw_only=True):
    """The JSON of `flexpert simulate scale`. votes_us: measured; those of `heads` are a straight
    line through them."""

    command: str
    machine: Machine
    experts: int
    layers: int
    votes_us: dict[int, float]
    heads: list[ScaledHead]


def run_scaling(plan: ScalingPlan, note: Note) -> ScalingReport:
    """Raises: FlexpertError: a change does not come to its end."""
    votes = {ranks: vote_us(ranks) for ranks in plan.votes}
    note("votes: " + ", ".join(f"{ranks} ranks {us:.1f} µs" for ranks, us in votes.items()))
    heads: list[ScaledHead] = []
    for ranks in plan.ranks:
        by_load = not heads or (heads[-1].by_load_s or _BY_LOAD_MOST_S) < _BY_LOAD_MOST_S / 8
        heads.append(_measure(plan, ranks, votes, by_load=by_load, note=note))
    return ScalingReport(
        command=" ".join(["flexpert", *sys.argv[1:]]),
        machine=this_machine(),
        experts=plan.experts,
        layers=plan.layers,
        votes_us=votes,
        heads=heads,
    )


def _seconds(work: Callable[[], object]) -> float:
    begin = time.thread_time()
    work()
    return time.thread_time() - begin


def _measure(
    plan: ScalingPlan, ranks: int, votes: dict[int, float], *, by_load: bool, note: Note
) -> ScaledHead:
    redundant = plan.redundant_on(ranks)

    def place(before: Placement | None, count: int, loads: object = None) -> Placement:
        return replan(
            before,
            range(count),
            experts=plan.experts,
            layers=plan.layers,
            redundant=redundant,
            loads=loads,  # type: ignore[arg-type]
        )

    note(f"{ranks} ranks: placement")
    placed: list[Placement] = []
    first_s = _seconds(lambda: placed.append(place(None, ranks)))
    before = placed[0]
    join_s = _seconds(lambda: place(before, ranks + 1))
    loss_s = _seconds(lambda: cover(before, range(1, ranks)))
    by_load_s = None
    if by_load:
        skewed = skewed_loads(plan.layers, plan.experts, 0.8, 0)
        by_load_s = _seconds(lambda: place(before, ranks + 1, skewed))
    note(f"{ranks} ranks: messages")
    address = random.Random(0).randbytes(ADDRESS_BYTES)
    prepare = msg.Prepare(
        2,
        dict.fromkeys(range(ranks), address),
        before,
        dict.fromkeys(range(ranks), address),
        machines=dict.fromkeys(range(ranks), "machine"),
    )
    told: list[bytes] = []
    encode_s = _seconds(lambda: told.append(msg.encode(prepare)))
    encoded = told[0]
    step = _StepReports(ranks)
    times = []
    for _ in range(_STEPS):
        times.append(_seconds(step.take))
        step.compute()
    step_s = min(times)
    note(f"{ranks} ranks: requests")
    request_s = _request_s(ranks)
    note(f"{ranks} ranks: a change")
    cluster = ImmediateRanks(ranks, ranks + 1, plan.experts, plan.layers)
    messages, sizes = cluster.messages, sum(cluster.sizes.values())
    change_s = _seconds(lambda: cluster.change(add=1))
    return ScaledHead(
        ranks=ranks,
        redundant=redundant,
        first_s=first_s,
        join_s=join_s,
        loss_s=loss_s,
        by_load_s=by_load_s,
        prepare_bytes=len(encoded),
        prepare_encode_ms=1e3 * encode_s,
        prepare_decode_ms=1e3
        * min(_seconds(lambda: msg.decode_command(encoded)) for _ in range(_STEPS)),
        published_bytes=step.size,
        step_ms=1e3 * step_s,
        token_us=1e6 * step_s / (ranks * _STREAMS),
        request_ms=1e3 * request_s,
        change_s=change_s,
        change_messages=cluster.messages - messages,
        change_bytes=sum(cluster.sizes.values()) - sizes,
        vote_us=extrapolated(list(votes), list(votes.values()), ranks),
    )


class _StepReports:
    """All ranks publish a token of each of their sequences. size: bytes of a rank's report."""

    def __init__(self, ranks: int) -> None:
        self._router = Router("prefix")
        self._router.set_caches(RankCaches(_BLOCKS, 16, _STREAMS, prefix_cache=True))
        self._journal = Journal(ranks * _STREAMS, self._router)
        self._position = 0
        params = SamplingParams(max_tokens=2**20, temperature=0.0, ignore_eos=True)
        counts = {rank: [f"{rank}.{number}" for number in range(_STREAMS)] for rank in range(ranks)}
        self._names = counts
        for rank, names in counts.items():
            for name in names:
                entry = self._journal.open(name, [1] * 16, params, (), lambda _: None)
                entry.stream.listen(self._heard)
                self._journal.assign(entry, (rank,))
        self._next = self._reports()
        self.size = len(self._next[0])

    def _heard(self, arrival: Arrival) -> None:
        if isinstance(arrival, FlexpertError):
            raise arrival

    def _reports(self) -> list[bytes]:
        changes = BlockChanges(bytes(8), b"")
        return [
            msg.encode(
                msg.Published(
                    [TokenEvent(name, self._position, [7], None, None) for name in names],
                    msg.Load(_STREAMS, 0, 0.5),
                    changes if self._position % 16 == 0 else None,
                    _STREAMS,
                )
            )
            for names in self._names.values()
        ]

    def take(self) -> None:
        """Decode them and give them to the journal, as the head does; HTTP comes on top."""
        for rank, report in enumerate(self._next):
            published = msg.decode_report(report)
            assert isinstance(published, msg.Published)
            self._router.learn(rank, published.blocks)
            for event in published.events:
                self._journal.publish(rank, event)

    def compute(self) -> None:
        """The ranks' part: the next step."""
        self._position += 1
        self._next = self._reports()


def _request_s(ranks: int) -> float:
    """Of a request with a prompt that some rank has in its cache."""
    draw = random.Random(0)
    router = Router("prefix")
    router.set_caches(RankCaches(_BLOCKS, 16, 64, prefix_cache=True))
    journal = Journal(2**20, router)
    params = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
    prompts = [[draw.randrange(2**17) for _ in range(_PROMPT)] for _ in range(_REQUESTS)]
    for number, prompt in enumerate(prompts):
        keys = prompt_keys(prompt, 16, stride_of(_BLOCKS), "").keys
        added = b"".join(key.to_bytes(8, "little") for key in keys)
        router.learn(number % ranks, BlockChanges(added))

    def ask() -> None:
        for number, prompt in enumerate(prompts):
            entry = journal.open(str(number), prompt, params, (), lambda _: None)
            rank = journal.assign(entry, range(ranks))
            assert rank is not None
            journal.publish(rank, TokenEvent(str(number), 0, [1], None, None))
            journal.close(str(number))

    return min(_seconds(ask) for _ in range(_STEPS)) / _REQUESTS


def scaling_text(report: ScalingReport) -> Table:
    """A column for each number of ranks."""
    heads = report.heads
    table = figures_table(
        f"{report.experts} experts in each of {report.layers} layers; processor time",
        "ranks",
        [str(head.ranks) for head in heads],
    )
    votes = ", ".join(f"{ranks}: {us:.1f}" for ranks, us in report.votes_us.items())
    table.caption = f"votes were measured for ranks {votes} µs; {report.machine.line()}"
    rows: tuple[tuple[str, Callable[[ScaledHead], str]], ...] = (
        ("placement: all experts anew, s", lambda one: f"{one.first_s:.2f}"),
        ("  one rank more, s", lambda one: f"{one.join_s:.2f}"),
        (
            "  one rank more, by load, s",
            lambda one: "-" if one.by_load_s is None else f"{one.by_load_s:.2f}",
        ),
        ("  after a loss, s", lambda one: f"{one.loss_s:.2f}"),
        ("Prepare, KiB for each rank", lambda one: f"{one.prepare_bytes / 1024:,.0f}"),
        ("  encode / decode, ms", lambda one: _pair(one.prepare_encode_ms, one.prepare_decode_ms)),
        ("Published, bytes of 8 tokens", lambda one: f"{one.published_bytes}"),
        ("  a step of all ranks in the head, ms", lambda one: f"{one.step_ms:.2f}"),
        ("  of that a token, µs", lambda one: f"{one.token_us:.2f}"),
        ("a request: routing and journal, ms", lambda one: f"{one.request_ms:.2f}"),
        ("a rank joins: control plane, s", lambda one: f"{one.change_s:.2f}"),
        ("  messages", lambda one: f"{one.change_messages:,}"),
        ("  MiB", lambda one: f"{one.change_bytes / 2**20:,.1f}"),
        ("a vote, µs of a rank (straight line)", lambda one: f"{one.vote_us:.0f}"),
    )
    for name, cell in rows:
        table.add_row(name, *(cell(head) for head in heads))
    return table


def _pair(first: float, second: float) -> str:
    return f"{first:.1f} / {second:.1f}"
