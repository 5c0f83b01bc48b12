"""Two levels: a token goes to another machine once, and one sum comes back."""

from __future__ import annotations

import importlib.util
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import msgspec
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from support.comm_local import applied, check_received, masked_ids, placed, poke, same_bits
from support.comm_ranks import LIMIT_S, Rank, apply_experts, random_sent, set_active, spec_of, vote

from flexpert.comm import Buffer, BufferSpec, CommError, ExpertTable, RankLost, RankTimeout, quant
from flexpert.comm.buffer import Pending, Received, Scales
from flexpert.comm.host._kernels import ffi
from flexpert.comm.host.gateways import group_of, plan_gateways
from flexpert.comm.host.host_buffer import HostBuffer
from flexpert.comm.routing import Sent
from flexpert.comm.window_layout import DISPATCH_FLAG_AT as FLAG_AT
from flexpert.comm.window_layout import LINK_MEMORY_AT, ROWS_AT

HAS_NIXL = any(importlib.util.find_spec(f"nixl_cu{cuda}") for cuda in (12, 13))
needs_nixl = pytest.mark.skipif(not HAS_NIXL, reason="pip install 'flexpert[nixl]' to test it")

PAIRS = {0: "a", 1: "a", 2: "b", 3: "b"}
LAYOUTS = {
    "two pairs": PAIRS,
    "interleaved": {0: "a", 1: "b", 2: "a", 3: "b"},
    "two and one": {0: "a", 1: "a", 2: "b"},
    "three machines": {0: "a", 1: "b", 3: "a", 4: "c", 5: "b"},
    "one each": {0: "a", 1: "b", 2: "c"},
    "three of one": {1: "a", 2: "b", 3: "b", 4: "b"},
}


# ---- the plan -----------------------------------------------------------------------------------


@given(st.dictionaries(st.integers(0, 20), st.sampled_from(["", "a", "b", "c"]), min_size=1))
def test_all_ranks_plan_the_same_gateways_and_share_the_load(machines: dict[int, str]) -> None:
    groups = {rank: group_of(name) if name else b"" for rank, name in machines.items()}
    plans = {}
    for rank in machines:
        remote = {other for other in machines if machines[other] != machines[rank]}
        plans[rank] = plan_gateways(rank, groups, remote)
    served = dict.fromkeys(machines, 0)
    for source, plan in plans.items():
        assert groups[source] or not (plan.out or plan.into)
        for member, gateway in plan.out.items():
            assert machines[gateway] == machines[member] != machines[source]
            assert plans[member].into[source] == gateway
            served[member] += member == gateway
        for other, gateway in plan.into.items():
            assert plans[other].out[source] == gateway
    for name in ("a", "b", "c"):
        loads = [served[rank] for rank in machines if machines[rank] == name]
        assert not loads or max(loads) - min(loads) <= 1
        assert len(loads) != 1 or loads == [0]  # nothing to hand on: it is sent its rows itself


def test_a_peer_that_is_not_behind_nixl_is_sent_its_rows_itself() -> None:
    groups = {0: group_of("a"), 1: group_of("b"), 2: group_of("b")}
    assert plan_gateways(0, groups, {1, 2}).out == {1: 1, 2: 1}
    assert plan_gateways(0, groups, {2}).out == {}
    assert plan_gateways(1, groups, {0}).into == {0: 1}
    assert plan_gateways(1, groups, {0, 2}).into == {}
    assert plan_gateways(1, groups, set()).into == {}


# ---- rank processes -----------------------------------------------------------------------------


class Machines:
    """Rank processes on machines that only their names make different."""

    def __init__(self, names: Mapping[int, str], spec: BufferSpec, **options: Any) -> None:
        self.options = options
        self.spec = spec
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.names: dict[int, str] = {}
        self.ranks: dict[int, Rank] = {}
        self.epoch = 0
        self.start(names)

    def __enter__(self) -> Machines:
        return self

    def __exit__(self, *_: object) -> None:
        for rank in self.ranks.values():
            rank.kill()

    def start(self, names: Mapping[int, str], **options: Any) -> None:
        """More ranks, connected with all."""
        for rank, name in names.items():
            self.names[rank] = name
            self.ranks[rank] = Rank(
                rank, self.spec, self.store.port, machine=name, **{**self.options, **options}
            )
        self.some(self.ranks, meet, sorted(self.ranks))

    def some(self, ids: Iterable[int], task: Callable[..., Any], *args: Any) -> dict[int, Any]:
        chosen = sorted(ids)
        for rank in chosen:
            self.ranks[rank].ask(task, *args)
        return {rank: self.ranks[rank].answer() for rank in chosen}

    def activate(self, ids: Iterable[int]) -> None:
        self.epoch += 1
        chosen = tuple(sorted(ids))
        self.some(chosen, set_active, chosen, self.epoch)

    def exchange(self, ids: Iterable[int], seeds: range, **how: Any) -> dict[int, Any]:
        chosen = tuple(sorted(ids))
        names = {rank: self.names[rank] for rank in chosen}
        return self.some(chosen, exchanges, names, seeds, how)


def meet(buffer: Buffer, ids: list[int]) -> None:
    buffer.connect(ids)


def sums(s: Sent, home: int, names: Mapping[int, str]) -> torch.Tensor:
    """What combine(reduce="rank") gives for `apply_experts`, bit for bit: other machines with more
    than one rank add up in float32 and round once."""
    shared = {name for name, ranks in Counter(names.values()).items() if ranks > 1}
    shared.discard(names[home])
    of_rank: dict[tuple[int, int], torch.Tensor] = {}
    for token, experts in enumerate(s.expert_ids.tolist()):
        for choice, expert in enumerate(experts):
            if expert < 0:
                continue
            row = (s.x[token].float() * (1.0 + 0.25 * int(s.table.slot[expert]))).to(s.x.dtype)
            key = (token, int(s.table.rank[expert]))
            before = of_rank.get(key, torch.zeros(s.x.shape[1]))
            of_rank[key] = before + s.weights[token, choice] * row.float()
    of_machine: dict[tuple[int, str | int], torch.Tensor] = {}  # in the order in which they add up
    for token, owner in sorted(of_rank):
        place = (token, names[owner] if names[owner] in shared else owner)
        before = of_machine.get(place, torch.zeros(s.x.shape[1]))
        of_machine[place] = before + of_rank[token, owner]
    out = torch.zeros(s.x.shape)
    for (token, _), value in of_machine.items():
        out[token] += value.to(s.x.dtype).float()
    return out.to(s.x.dtype)


def exchanges(
    buffer: Buffer, names: Mapping[int, str], seeds: range, how: Mapping[str, Any]
) -> Counter[int]:
    """Exchanges of random routings, compared; returns the bytes of rows dispatched to each rank."""
    ids = tuple(sorted(names))
    dispatched = Counter[int]()
    idle = random.Random(buffer.rank)

    def pause() -> None:
        if how.get("pauses"):
            time.sleep(idle.choice([0.0, 0.0, idle.random() * 0.004]))

    for seed in seeds:
        sent = random_sent(buffer.spec, ids, seed, idle=how.get("idle", ()))
        s = sent[buffer.rank]
        before = buffer.statistics().bytes_sent
        pending = buffer.begin_dispatch(s.x, s.expert_ids, s.weights, s.table)
        pause()
        got = pending()
        for rank, now in buffer.statistics().bytes_sent.items():
            dispatched[rank] += now - before[rank]
        check_received(got, sent, buffer.rank)
        reduce = how.get("reduce", ("rank", "home")[seed % 2])
        y = placed(buffer, got, apply_experts(got.x, got.offsets))
        pause()
        combining = buffer.begin_combine(y, got, reduce=reduce)
        pause()
        out = combining()
        pause()
        merged = reduce == "rank" and how.get("merged", True)
        expected = sums(s, buffer.rank, names) if merged else applied(s, reduce)
        assert same_bits(out, expected), (buffer.rank, seed, reduce)
        assert buffer.missing_results(got) is None
    return dispatched


@needs_nixl
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_and_sums_are_those_of_the_reference(layout: str) -> None:
    names = LAYOUTS[layout]
    with Machines(names, spec_of(6, hidden=264)) as machines:
        machines.activate(names)
        machines.exchange(names, range(12))
        machines.exchange(names, range(12, 14), idle=tuple(names)[:2])
        machines.exchange(names, range(14, 16), idle=tuple(names))


@needs_nixl
def test_ranks_that_pause_anywhere_change_nothing() -> None:
    names = LAYOUTS["three machines"]
    with Machines(names, spec_of(6, hidden=72)) as machines:
        machines.activate(names)
        for rank in names:
            machines.ranks[rank].ask(exchanges, names, range(60), {"pauses": True})
        for rank in (1, 0, 3, 4, 5):  # gateways among them
            pid = machines.ranks[rank].process.pid
            assert pid
            os.kill(pid, signal.SIGSTOP)
            time.sleep(0.05)
            os.kill(pid, signal.SIGCONT)
        assert sorted(names) == [rank for rank in names if machines.ranks[rank].answer()]


@needs_nixl
@pytest.mark.parametrize(
    ("dtype", "topk"),
    [(torch.float16, 3), (torch.float32, 3), (torch.bfloat16, 2), (torch.float32, 2)],
)
def test_other_dtypes_and_few_experts_are_added_up_in_float32(
    dtype: torch.dtype, topk: int
) -> None:
    with Machines(PAIRS, spec_of(4, hidden=40, topk=topk, dtype=dtype)) as machines:
        machines.activate(PAIRS)
        machines.exchange(PAIRS, range(6), reduce="rank")


@needs_nixl
def test_every_kind_of_rows_arrives() -> None:
    with Machines(PAIRS, spec_of(4, hidden=512)) as machines:
        machines.activate(PAIRS)
        machines.some(PAIRS, kinds, tuple(PAIRS), range(4))


def kinds(buffer: Buffer, ids: tuple[int, ...], seeds: range) -> None:
    """Quantised rows and bytes are those that the senders have."""
    scales: list[Scales | None] = ["float32", "power2", "ue8m0", None]
    for seed in seeds:
        sent = random_sent(buffer.spec, ids, seed)
        s, fp8 = sent[buffer.rank], scales[seed % 4]
        x = s.x if fp8 else s.x.view(torch.uint8)[:, :700].contiguous()
        got = buffer.dispatch(x, s.expert_ids, s.weights, s.table, fp8=fp8)
        for row in range(got.x.shape[0]):
            home, token = int(got.source[row]), int(got.token[row])
            if fp8:
                values, scale = quant.quantise(sent[home].x[token : token + 1], fp8)
                assert torch.equal(got.x[row].view(torch.uint8), values[0].view(torch.uint8))
                assert got.scales is not None
                assert torch.equal(got.scales[row], scale[0])
            else:
                assert torch.equal(got.x[row], sent[home].x[token].view(torch.uint8)[:700])
        buffer.combine(buffer.combine_input(got).zero_(), got)


# ---- bytes --------------------------------------------------------------------------------------


def wire_bytes(buffer: Buffer, tokens: int, experts: int, *, each: bool) -> int:
    """Written to other machines in one dispatch and combine of tokens with 8 experts each, all as
    likely. each: a row for each expert."""
    spec, ranks = buffer.spec, len(buffer.active)
    generator = torch.Generator().manual_seed(buffer.rank)
    x = torch.randn(tokens, spec.hidden, generator=generator).to(spec.dtype)
    ids = torch.rand(tokens, experts, generator=generator).topk(8).indices
    if each:
        x, ids = x.repeat_interleave(8, 0), ids.reshape(-1, 1)
    expert = torch.arange(experts, dtype=torch.int32)
    per_rank = experts // ranks
    table = ExpertTable(expert // per_rank, expert % per_rank, per_rank)
    before = sum(buffer.statistics().wire_bytes.values())
    got = buffer.dispatch(x, ids, torch.ones(ids.shape), table)
    buffer.combine(got.x, got, reduce="rank")
    return sum(buffer.statistics().wire_bytes.values()) - before


@needs_nixl
def test_bytes_between_two_machines() -> None:
    """4 ranks on 2 machines, top-8 of 128 experts, bf16, hidden 512, both directions."""
    wire: dict[str, int] = {}
    for name, two_level in (("expert", False), ("rank", False), ("machine", True)):
        spec = spec_of(4, max_tokens=8 * 64, hidden=512, topk=8)
        with Machines(PAIRS, spec, two_level=two_level) as machines:
            machines.activate(PAIRS)
            each = name == "expert"
            wire[name] = sum(machines.some(PAIRS, partial(wire_bytes, each=each), 64, 128).values())
    assert wire["machine"] < 0.45 * wire["expert"]
    assert wire["machine"] < 0.75 * wire["rank"]
    # not less than one row of each token each way, which all but 1 in 256 tokens need
    assert wire["machine"] > 4 * 64 * 0.98 * 2 * 1024


# ---- epochs and losses --------------------------------------------------------------------------


@needs_nixl
def test_gateways_change_with_the_epoch() -> None:
    with Machines(PAIRS, spec_of(6, hidden=72)) as machines:
        machines.activate(PAIRS)
        first = machines.exchange(PAIRS, range(4), reduce="rank")
        assert [peer for peer in (2, 3) if first[0][peer]] == [2]
        assert [peer for peer in (2, 3) if first[1][peer]] == [3]
        machines.activate([0, 2, 3])
        machines.exchange([0, 2, 3], range(4, 8))
        machines.activate([1, 2, 3])  # 1 gets the gateway that was 0's
        alone = machines.exchange([1, 2, 3], range(8, 12))
        assert [peer for peer in (2, 3) if alone[1][peer]] == [2]
        machines.start({4: "b", 5: "a"})
        machines.activate([0, 1, 4, 5])
        machines.exchange([0, 1, 4, 5], range(12, 14), reduce="rank")
        machines.activate(range(6))
        machines.exchange(range(6), range(14, 18))
        machines.ranks.pop(2).kill()
        machines.some([0, 1, 3, 4, 5], disconnects, [2])
        machines.activate([0, 1, 3, 4, 5])
        machines.exchange([0, 1, 3, 4, 5], range(18, 22))
        machines.start({2: "a"})  # the id, on another machine
        machines.activate(range(6))
        machines.exchange(range(6), range(22, 26))


def disconnects(buffer: Buffer, ids: list[int]) -> None:
    buffer.disconnect(ids)


@needs_nixl
def test_who_takes_no_part_is_sent_its_rows_itself() -> None:
    """Without two_level, or with masks; and a group of the others is shared nevertheless."""
    with Machines(PAIRS, spec_of(6, hidden=72)) as machines:
        machines.start({4: "b"}, two_level=False)
        machines.activate(range(5))
        sent = machines.exchange([0, 1, 2, 3, 4], range(1, 5), reduce="home")
        assert all(sent[0][peer] for peer in (2, 4))
        assert not sent[0][3]
    for options in ({"two_level": False}, {"on_timeout": "mask"}):
        with Machines(PAIRS, spec_of(4, hidden=72), **options) as machines:
            machines.activate(PAIRS)
            sent = machines.exchange(PAIRS, range(4), merged=False)
            assert all(sent[0][peer] for peer in (1, 2, 3))


@needs_nixl
def test_a_pair_that_masks_each_other_goes_on_with_the_rest() -> None:
    with Machines(PAIRS, spec_of(4, hidden=72)) as machines:
        machines.activate(PAIRS)
        machines.exchange(PAIRS, range(2))
        machines.some([0], masks, [3])
        machines.some([3], masks, [0])
        machines.some(PAIRS, exchanges_without, PAIRS, {0: 3, 3: 0}, range(2, 6))
        machines.some([0], unmasks, [3])
        machines.some([3], unmasks, [0])
        machines.some(PAIRS, exchanges_without, PAIRS, {}, range(6, 9))
        machines.activate(PAIRS)
        machines.some(PAIRS, vote)
        machines.exchange(PAIRS, range(9, 12))


def masks(buffer: Buffer, ids: list[int]) -> None:
    buffer.mask(ids)


def unmasks(buffer: Buffer, ids: list[int]) -> None:
    buffer.unmask(ids)


def exchanges_without(
    buffer: Buffer, names: Mapping[int, str], apart: Mapping[int, int], seeds: range
) -> None:
    """Ranks in `apart` choose no expert of the other one."""
    ids = tuple(sorted(names))
    for seed in seeds:
        sent = {}
        for rank, s in random_sent(buffer.spec, ids, seed).items():
            view = set(ids) - ({apart[rank]} if rank in apart else set())
            sent[rank] = Sent(s.x, masked_ids(s, view), s.weights, s.table)
        s = sent[buffer.rank]
        got = buffer.dispatch(s.x, s.expert_ids, s.weights, s.table)
        check_received(got, sent, buffer.rank)
        out = buffer.combine(apply_experts(got.x, got.offsets), got, reduce="home")
        assert same_bits(out, applied(s, "home"))


def fails(buffer: Buffer, ids: tuple[int, ...], seed: int) -> tuple[str, tuple[int, ...], float]:
    """What an exchange raises, whom it names, and after how many seconds."""
    s = random_sent(buffer.spec, ids, seed)[buffer.rank]
    began = time.monotonic()
    try:
        got = buffer.dispatch(s.x, s.expert_ids, s.weights, s.table)
        buffer.combine(apply_experts(got.x, got.offsets), got)
    except (RankLost, RankTimeout) as error:
        return type(error).__name__, error.ranks, time.monotonic() - began
    return "whole", (), time.monotonic() - began


def sends_only(buffer: Buffer, ids: tuple[int, ...], seed: int) -> None:
    """The sending half of a dispatch; what should be handed on is not."""
    s = random_sent(buffer.spec, ids, seed)[buffer.rank]
    buffer.begin_dispatch(s.x, s.expert_ids, s.weights, s.table)


def receives_only(buffer: Buffer, ids: tuple[int, ...], seed: int) -> None:
    """A dispatch and the sending half of a combine; sums are not answered."""
    s = random_sent(buffer.spec, ids, seed)[buffer.rank]
    got = buffer.dispatch(s.x, s.expert_ids, s.weights, s.table)
    buffer.begin_combine(apply_experts(got.x, got.offsets), got)


def expected(until: Callable[..., None], rank: int, kind: str) -> tuple[str, tuple[int, ...]]:
    """Of a rank, when rank 2 goes no further than `until`: it is the gateway of 0, and 3 that of 1,
    so that 0 alone needs it once its sums are there."""
    return ("whole", ()) if until is receives_only and rank != 0 else (kind, (2,))


@needs_nixl
@pytest.mark.parametrize("until", [sends_only, receives_only])
def test_a_gateway_that_is_killed_on_the_way_is_named_at_once(
    until: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UCX_TLS", "tcp")
    with Machines(PAIRS, spec_of(4, hidden=72)) as machines:
        for round_ in range(2):
            machines.activate(PAIRS)
            machines.some(PAIRS, vote)
            machines.exchange(PAIRS, range(2))
            for rank in (0, 1, 3):
                machines.ranks[rank].ask(fails, tuple(PAIRS), 5)
            machines.some([2], until, tuple(PAIRS), 5)
            machines.ranks.pop(2).kill()
            for rank in (0, 1, 3):
                kind, ranks, took = machines.ranks[rank].answer()
                assert (kind, ranks) == expected(until, rank, "RankLost")
                assert took < LIMIT_S / 4
            machines.some([0, 1, 3], disconnects, [2])
            machines.activate([0, 1, 3])
            machines.some([0, 1, 3], vote)
            machines.exchange([0, 1, 3], range(6, 10))
            if not round_:
                machines.start({2: "b"})


@needs_nixl
@pytest.mark.parametrize("until", [sends_only, receives_only])
def test_a_gateway_that_hangs_is_named_and_nobody_else(until: Callable[..., None]) -> None:
    with Machines(PAIRS, spec_of(4, hidden=72), timeout_s=3.0) as machines:
        machines.activate(PAIRS)
        machines.exchange(PAIRS, range(2))
        for rank in (0, 1, 3):
            machines.ranks[rank].ask(fails, tuple(PAIRS), 5)
        machines.some([2], until, tuple(PAIRS), 5)
        for rank in (0, 1, 3):
            kind, ranks, _ = machines.ranks[rank].answer()
            assert (kind, ranks) == expected(until, rank, "RankTimeout")
        machines.activate(PAIRS)
        machines.some(PAIRS, vote)
        machines.exchange(PAIRS, range(6, 10))


@needs_nixl
@pytest.mark.parametrize("until", [sends_only, receives_only])
def test_another_rank_of_a_machine_that_hangs_is_named_and_no_gateway(
    until: Callable[..., None],
) -> None:
    """The gateway waits for it, and says so."""
    names = LAYOUTS["three of one"]
    with Machines(names, spec_of(5, hidden=72), timeout_s=3.0) as machines:
        machines.activate(names)
        machines.exchange(names, range(2))
        for rank in (1, 2, 4):
            machines.ranks[rank].ask(fails, tuple(names), 5)
        machines.some([3], until, tuple(names), 5)
        told = {rank: machines.ranks[rank].answer()[:2] for rank in (1, 2, 4)}
        whole = ("whole", ()) if until is receives_only else ("RankTimeout", (3,))
        assert told == dict.fromkeys((1, 2, 4), whole)


# ---- what a broken peer may do ------------------------------------------------------------------


@pytest.fixture
def threads() -> Iterator[dict[int, HostBuffer]]:
    """The buffers of `PAIRS` in this process, in an epoch."""
    store = dist.HashStore()
    spec = spec_of(4, hidden=72)
    buffers = {
        rank: HostBuffer(rank, spec, store=store, machine=name, timeout_s=LIMIT_S)
        for rank, name in PAIRS.items()
    }
    try:
        each(buffers, lambda buffer: buffer.connect(list(PAIRS)))
        each(buffers, lambda buffer: buffer.set_active(PAIRS, 1))
        yield buffers
    finally:
        for buffer in buffers.values():
            buffer.close()


def each(buffers: Mapping[int, HostBuffer], call: Callable[[HostBuffer], Any]) -> dict[int, Any]:
    with ThreadPoolExecutor(len(buffers)) as pool:
        jobs = {rank: pool.submit(call, buffer) for rank, buffer in buffers.items()}
        return {rank: job.result(LIMIT_S) for rank, job in jobs.items()}


def send(buffers: Mapping[int, HostBuffer], seed: int) -> dict[int, Pending[Received]]:
    """The sending halves of a dispatch in which rank 0 has tokens for 2 and 3."""
    expert = torch.arange(8, dtype=torch.int32)
    generator = torch.Generator().manual_seed(seed)
    pending = {}
    for rank, buffer in buffers.items():
        x = torch.randn(5, 72, generator=generator).to(torch.bfloat16)
        ids = torch.arange(20).view(5, 4) % 8
        table = ExpertTable(expert // 2, expert % 2, 2)
        pending[rank] = buffer.begin_dispatch(x, ids, torch.ones(5, 4), table)
    return pending


def receives(
    buffers: Mapping[int, HostBuffer], pending: Mapping[int, Pending[Received]]
) -> dict[int, str]:
    """What each rank's receiving half raises, if anything."""

    def receive(buffer: HostBuffer) -> str:
        try:
            pending[buffer.rank](2.0)
        except CommError as error:
            return str(error)
        return ""

    return each(buffers, receive)


def meta_at(buffer: HostBuffer, peer: int) -> int:
    """Address of the first row for a peer, where its meta begins."""
    return int(buffer._core.b.outbox[peer]) + ROWS_AT


@needs_nixl
@pytest.mark.parametrize(
    ("offset", "wrong"),
    [
        (8 + 6 * 4, bytes([1] * 4)),  # owners: rank 1 is on the machine of the sender
        (8 + 6 * 4, bytes([200] * 4)),
        (8 + 4 * 4, (777).to_bytes(2, "little") * 4),  # slots
        (8 + 4 * 4, (-2).to_bytes(2, "little", signed=True) * 4),
    ],
    ids=["owner elsewhere", "no such owner", "no such slot", "negative slot"],
)
def test_merged_rows_that_cannot_be_are_refused_and_their_sender_named(
    threads: dict[int, HostBuffer], monkeypatch: pytest.MonkeyPatch, offset: int, wrong: bytes
) -> None:
    broken = threads[0]
    flush = broken._exchange._remote.flush

    def spoil_and_flush() -> bool:
        poke(meta_at(broken, 2) + offset, wrong)
        return flush()

    monkeypatch.setattr(broken._exchange._remote, "flush", spoil_and_flush)
    told = receives(threads, send(threads, 1))
    assert told[0] == told[1] == ""
    for rank in (2, 3):  # the first row is for both
        assert "rank 0 sent rows or slots that cannot be" in told[rank]


@needs_nixl
@pytest.mark.parametrize(
    ("peer", "rows", "mode"),
    [(2, 17, 0x100), (2, 2**32 - 1, 0x100), (3, 5, 0x100), (2, 5, 0x101)],
)
def test_merged_flags_that_cannot_be_are_refused(
    threads: dict[int, HostBuffer], peer: int, rows: int, mode: int
) -> None:
    """Too many rows, rows for who is not the gateway, and rows of another kind."""
    pending = send(threads, 1)
    until = time.monotonic() + LIMIT_S
    victim = threads[peer]
    inbox = int(victim._core.b.inbox[0])
    tag = bytes(ffi.buffer(ffi.cast("char *", int(threads[0]._core.b.outbox[2]) + FLAG_AT), 8))
    while peer == 2 and bytes(ffi.buffer(ffi.cast("char *", inbox + FLAG_AT), 8)) != tag:
        for buffer in threads.values():
            buffer._exchange._remote.flush()
        assert time.monotonic() < until
    poke(inbox + FLAG_AT, tag + rows.to_bytes(4, "little") + mode.to_bytes(4, "little"))
    told = receives(threads, pending)
    assert "rank 0 sent" in told[peer]


@needs_nixl
@pytest.mark.parametrize(
    ("line", "what"),
    [
        (bytes(52), "nothing about its link to rank 0"),
        (None, "a wrong place of its link to rank 0"),
    ],
    ids=["nothing", "behind the end"],
)
def test_a_sibling_that_exports_what_cannot_be_is_named(
    threads: dict[int, HostBuffer], line: bytes | None, what: str
) -> None:
    """None: an offset behind the end of its memory."""
    pending = send(threads, 1)
    at = int(threads[2]._core.b.control[2]) + LINK_MEMORY_AT
    poke(at, (1 << 40).to_bytes(8, "little") if line is None else line)
    told = receives(threads, pending)
    assert f"rank 2 sent {what}" in told[3]
    assert told[0] == told[1] == told[2] == ""


def test_a_rank_in_the_group_of_another_machine_is_refused() -> None:
    store = dist.HashStore()
    spec = spec_of(2)
    honest = HostBuffer(0, spec, store=store, machine="a")
    other = HostBuffer(1, spec, store=store, machine="a")
    try:
        connector = other._connector
        connector._greeting = msgspec.structs.replace(connector._greeting, machine="b")
        with ThreadPoolExecutor(1) as pool:
            vain = pool.submit(other.connect, [0], timeout_s=1.0)
            with pytest.raises(ValueError, match="rank 1 would share rows of another machine"):
                honest.connect([1], timeout_s=1.0)
            with pytest.raises((CommError, ValueError)):
                vain.result(LIMIT_S)
        assert honest.connected == (0,)
    finally:
        honest.close()
        other.close()
