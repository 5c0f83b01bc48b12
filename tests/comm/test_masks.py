"""Masks and links: ranks that come and go one by one, and results that say what they lack."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from support.comm_local import (
    Local,
    applied,
    apply_experts,
    check_received,
    dispatch,
    masked_ids,
    placed,
    same_bits,
)
from support.comm_ranks import LIMIT_S, Ranks, random_sent, spec_of

from flexpert.comm import Buffer, CommError, MissingResults, RankLost
from flexpert.comm.errors import StaleEpoch
from flexpert.comm.host._kernels import ffi, lib
from flexpert.comm.host.host_buffer import HostBuffer
from flexpert.comm.routing import Sent, expected_rows

Views = dict[int, set[int]]  # rank → whom it exchanges with


def unmask_all(local: Local, ids: tuple[int, ...]) -> None:
    for rank in ids:
        local.buffers[rank].unmask(ids)


def together(ids: tuple[int, ...]) -> Views:
    return {rank: set(ids) for rank in ids}


def exchange(
    local: Local,
    sent: dict[int, Sent],
    views: Views,
    reduce: str = "rank",
    limits: dict[int, float] | None = None,
) -> None:
    """One exchange; each rank gets exactly what its view at the end promises, and knows it."""

    def one(
        buffer: HostBuffer,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, MissingResults | None]:
        limit_s = (limits or {}).get(buffer.rank, LIMIT_S)
        got = dispatch(buffer, sent[buffer.rank], limit_s)
        x = got.x.clone()
        y = placed(buffer, got, apply_experts(x, got.offsets))
        out = buffer.combine(y, got, reduce=reduce, timeout_s=limit_s)  # type: ignore[arg-type]
        return x, got.offsets, out, buffer.missing_results(got)

    kept = {rank: replace_ids(s, masked_ids(s, views[rank])) for rank, s in sent.items()}
    for rank, (x, offsets, out, missing) in local.each(sent, one).items():
        rows, expected_offsets, _ = expected_rows(
            {home: s for home, s in kept.items() if home in views[rank]}, rank
        )
        assert torch.equal(offsets, expected_offsets)
        assert same_bits(x, rows)
        assert same_bits(out, applied(kept[rank], reduce))
        lost = (sent[rank].expert_ids >= 0) & (kept[rank].expert_ids < 0)
        if not lost.any():
            assert missing is None
            continue
        assert missing is not None
        assert torch.equal(missing.choices, lost)
        torch.testing.assert_close(missing.weight, (sent[rank].weights * lost).sum(1))
        owners = sent[rank].table.rank[sent[rank].expert_ids[lost].long()]
        assert set(missing.ranks) == set(owners.tolist())


def replace_ids(s: Sent, ids: torch.Tensor) -> Sent:
    return Sent(s.x, ids, s.weights, s.table)


# ---- joining ------------------------------------------------------------------------------------


def test_ranks_that_unmask_each_other_need_no_epoch(local: Local) -> None:
    """Holes from the start; nobody coordinates."""
    spec = spec_of(4)
    local.start(spec, [0, 2])
    unmask_all(local, (0, 2))
    for seed in range(4):
        sent = random_sent(spec, (0, 2), seed)
        exchange(local, sent, together((0, 2)), "rank" if seed % 2 else "home")
    assert local.buffers[0].epoch == 0
    assert local.buffers[0].active == (0, 2)


@pytest.mark.parametrize("before", [1, 2, 5])
def test_a_newcomer_meets_ranks_with_any_number_of_exchanges_behind_them(
    local: Local, before: int
) -> None:
    spec = spec_of(4)
    local.start(spec, [0, 1])
    unmask_all(local, (0, 1))
    for seed in range(before):
        exchange(local, random_sent(spec, (0, 1), seed), together((0, 1)))
    local.start(spec, [3])
    assert local.buffers[0].active == (0, 1)
    unmask_all(local, (0, 1, 3))
    for seed in range(10, 13):
        exchange(local, random_sent(spec, (0, 1, 3), seed), together((0, 1, 3)), "home")


def test_what_one_side_has_not_unmasked_is_waited_for(local: Local) -> None:
    spec = spec_of(2)
    zero, one = local.start(spec, [0, 1]).values()
    zero.unmask([1])
    sent = random_sent(spec, (0, 1), 1)
    first = local.pool.submit(dispatch, zero, sent[0])
    one.unmask([0])
    check_received(dispatch(one, sent[1]), sent, 1)
    check_received(first.result(LIMIT_S), sent, 0)


def test_a_vote_reaches_a_peer_that_unmasks_late(local: Local) -> None:
    zero, one = local.start(spec_of(2), [0, 1]).values()
    zero.unmask([1])
    first = local.pool.submit(lambda: zero.barrier(b"zero", timeout_s=LIMIT_S))
    one.unmask([0])
    votes = {0: b"zero", 1: b"one"}
    assert one.barrier(b"one", timeout_s=LIMIT_S) == votes
    assert first.result(LIMIT_S) == votes


def test_the_capacity_grows_while_peers_go_on(local: Local) -> None:
    local.start(spec_of(2), [0, 1])
    unmask_all(local, (0, 1))
    spec = spec_of(5)
    exchange(local, random_sent(spec_of(2), (0, 1), 1), together((0, 1)))
    with pytest.raises(ValueError, match="capacity 2"):
        local.buffers[0].connect({4: b""})
    local.start_one(spec, 4)
    for buffer in local.buffers.values():
        buffer.grow(5)
    local.connect_all()
    unmask_all(local, (0, 1, 4))
    exchange(local, random_sent(spec, (0, 1, 4), 2), together((0, 1, 4)))
    with pytest.raises(ValueError, match="cannot shrink"):
        local.buffers[0].grow(4)
    with pytest.raises(ValueError, match="256"):
        local.buffers[0].grow(257)
    for rank in (0, 1):
        local.buffers[rank].shrink(2)
        assert local.buffers[rank].connected == local.buffers[rank].active == (0, 1)
    with pytest.raises(ValueError, match="cannot shrink to 4"):
        local.buffers[4].shrink(4)
    exchange(local, random_sent(spec_of(2), (0, 1), 3), together((0, 1)))


# ---- losing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduce", ["rank", "home"])
def test_a_rank_that_does_not_come_is_masked_and_the_result_says_what_it_lacks(
    local: Local, reduce: str
) -> None:
    spec = spec_of(4)
    ids = (0, 1, 3)
    local.start(spec, ids, "mask")
    unmask_all(local, ids)
    exchange(local, random_sent(spec, ids, 1), together(ids), reduce)
    both = random_sent(spec, ids, 2)
    sent = {rank: both[rank] for rank in (0, 3)}
    exchange(local, sent, together((0, 3)), reduce, {0: 0.3, 3: 0.3})
    assert local.buffers[0].active == local.buffers[3].active == (0, 3)
    more = random_sent(spec, ids, 3)
    del more[1]
    exchange(local, more, together((0, 3)), reduce)  # without a wait for it
    late = local.buffers[1]
    got = dispatch(late, both[1])  # what was sent to it in time is whole
    check_received(got, both, 1)
    late.combine(got.x.clone(), got, reduce=reduce, timeout_s=0.1)  # type: ignore[arg-type]
    missing = late.missing_results(got)
    assert missing is not None
    assert (missing.ranks, late.active) == ((0, 3), (1,))
    unmask_all(local, ids)
    for seed in range(5, 8):
        exchange(local, random_sent(spec, ids, seed), together(ids), reduce)


def test_who_is_masked_on_one_side_only_times_out_and_may_come_back(local: Local) -> None:
    spec = spec_of(2)
    zero, one = local.start(spec, [0, 1], "mask").values()
    unmask_all(local, (0, 1))
    exchange(local, random_sent(spec, (0, 1), 1), together((0, 1)))
    zero.mask([1])
    exchange(local, random_sent(spec, (0, 1), 2), {0: {0}, 1: {1}}, limits={1: 0.2})
    assert (zero.active, one.active) == ((0,), (1,))
    zero.unmask([1])  # and not one: zero waits in vain
    exchange(local, random_sent(spec, (0, 1), 3), {0: {0}, 1: {1}}, limits={0: 0.2})
    unmask_all(local, (0, 1))
    exchange(local, random_sent(spec, (0, 1), 4), together((0, 1)))


def test_rows_that_are_still_being_read_are_not_overwritten_by_a_fresh_link(local: Local) -> None:
    """0 gives up on 1, takes it back and sends again, while 1 has not read what came before."""
    spec = spec_of(2)
    zero, one = local.start(spec, [0, 1], "mask").values()
    unmask_all(local, (0, 1))
    old, new = random_sent(spec, (0, 1), 1), random_sent(spec, (0, 1), 2)
    received = local.each([0, 1], lambda b: dispatch(b, old[b.rank]))
    zero.combine(received[0].x.clone(), received[0], timeout_s=0.1)
    assert zero.active == (0,)
    zero.unmask([1])
    sending = local.pool.submit(dispatch, zero, new[0])
    check_received(received[1], old, 1)  # gathers only now
    one.combine(received[1].x.clone(), received[1], timeout_s=0.1)
    one.unmask([0])
    check_received(dispatch(one, new[1]), new, 1)
    check_received(sending.result(LIMIT_S), new, 0)


def test_masking_from_another_thread_ends_a_wait(local: Local) -> None:
    spec = spec_of(3)
    ids = (0, 1, 2)
    local.start(spec, ids, "mask")
    unmask_all(local, ids)
    sent = random_sent(spec, ids, 1)
    del sent[2]
    timers = [threading.Timer(0.1, local.buffers[rank].mask, [[2]]) for rank in (0, 1)]
    for timer in timers:
        timer.start()
    exchange(local, sent, together((0, 1)))
    for timer in timers:
        timer.join()


def test_masks_are_refused_where_they_make_no_sense(local: Local) -> None:
    (buffer, _) = local.start(spec_of(3), [0, 1]).values()
    with pytest.raises(ValueError, match="cannot mask itself"):
        buffer.mask([0])
    with pytest.raises(ValueError, match="rank 2 is not connected"):
        buffer.unmask([1, 2])
    assert buffer.active == (0,)
    buffer.mask([2])  # unknown: ignored
    buffer.unmask([0])


def test_an_expert_of_a_masked_rank_is_an_error_unless_masks_are_wanted(local: Local) -> None:
    spec = spec_of(2)
    zero, _ = local.start(spec, [0, 1]).values()
    sent = random_sent(spec, (0, 1), 3)
    assert (sent[0].table.rank[sent[0].expert_ids.clamp(min=0)] == 1).any()
    with pytest.raises(ValueError, match="rank 1, which is not active"):
        dispatch(zero, sent[0])


def killed_while_it_is_waited_for(buffer: Buffer, s: Sent) -> tuple[object, ...]:
    try:
        dispatch(buffer, s)
    except RankLost as error:
        return error.ranks, error.phase, error.why, buffer.lost
    return buffer.active, buffer.lost


@pytest.mark.parametrize("on_timeout", ["raise", "mask"])
def test_a_killed_rank_is_known_without_waiting_for_the_limit(on_timeout: str) -> None:
    spec = spec_of(3)
    with Ranks(spec, (0, 1, 2), on_timeout=on_timeout) as ranks:
        ranks.activate((0, 1, 2), 1)
        sent = random_sent(spec, (0, 1, 2), 3)
        for rank in (0, 1):
            ranks.ranks[rank].ask(killed_while_it_is_waited_for, sent[rank])
        ranks.ranks.pop(2).kill()
        gone = {2: "process exited"}
        raised = ((2,), "dispatch", gone, gone)
        for rank in (0, 1):
            answer = ranks.ranks[rank].answer()  # within LIMIT_S, which is the buffers' limit
            assert answer == (raised if on_timeout == "raise" else ((0, 1), gone))


def test_a_rejoined_id_is_not_disturbed_by_its_old_process(local: Local) -> None:
    """The first rank 2 stalled, lost its id to another, and wakes in the middle of its copies."""
    spec = spec_of(3, hidden=256)
    ids = (0, 1, 2)
    local.start(spec, ids, "mask")
    unmask_all(local, ids)
    exchange(local, random_sent(spec, ids, 1), together(ids))
    old = local.buffers.pop(2)
    s = random_sent(spec, ids, 9)[2]
    for buffer in local.buffers.values():
        buffer.disconnect([2])
    local.start(spec, [2], "mask")
    unmask_all(local, ids)
    stop = threading.Event()
    bad = ffi.new("int64_t *")
    y = torch.full((3 * spec.max_tokens * spec.topk, spec.hidden), float("nan")).to(spec.dtype)

    def hammer() -> int:
        rounds = 0
        while not stop.is_set():
            lib.fx_greet(old._core.b)
            lib.fx_send_dispatch(
                old._core.b,
                s.x.data_ptr(),
                2 * spec.hidden,
                2 * spec.hidden,
                0,
                s.expert_ids.data_ptr(),
                1,
                s.weights.data_ptr(),
                *s.expert_ids.shape,
                s.table.rank.data_ptr(),
                s.table.slot.data_ptr(),
                s.table.rank.shape[0],
                bad,
            )
            lib.fx_send_combine(old._core.b, y.data_ptr(), rounds % 2)
            rounds += 1
        return rounds

    hammering = local.pool.submit(hammer)
    try:
        for seed in range(10, 40):
            exchange(local, random_sent(spec, ids, seed), together(ids))
    finally:
        stop.set()
    assert hammering.result(LIMIT_S) > 0
    old.close()


# ---- hooks, bytes, statistics -------------------------------------------------------------------


def test_nothing_is_received_until_the_hook_is_called(local: Local) -> None:
    spec = spec_of(2)
    zero, one = local.start(spec, [0, 1]).values()
    unmask_all(local, (0, 1))
    sent = random_sent(spec, (0, 1), 1)
    hooks = {
        rank: b.begin_dispatch(
            sent[rank].x, sent[rank].expert_ids, sent[rank].weights, sent[rank].table
        )
        for rank, b in ((0, zero), (1, one))
    }  # on one thread: sending waits for nobody
    for call in (lambda: zero.post_vote(b""), lambda: dispatch(zero, sent[0])):
        with pytest.raises(CommError, match="dispatch"):
            call()
    received = {rank: hook() for rank, hook in hooks.items()}
    for rank in (0, 1):
        check_received(received[rank], sent, rank)
        with pytest.raises(StaleEpoch, match="once"):
            hooks[rank]()
    sums = {
        rank: b.begin_combine(received[rank].x.clone(), received[rank], reduce="home")
        for rank, b in ((0, zero), (1, one))
    }
    for rank in (0, 1):
        assert sums[rank]().shape == sent[rank].x.shape
        with pytest.raises(StaleEpoch, match="once"):
            sums[rank]()


def test_rows_must_be_copied_before_combine(local: Local) -> None:
    spec = spec_of(1)
    buffer = local.start(spec, [0])[0]
    sent = random_sent(spec, (0,), 1)
    got = dispatch(buffer, sent[0])
    y = buffer.combine_input(got)
    assert y.data_ptr() == buffer.combine_input(got).data_ptr()
    buffer.combine(y.zero_(), got)
    with pytest.raises(StaleEpoch, match="use x before"):
        _ = got.x


def test_any_bytes_travel_and_everybody_must_send_the_same_kind(local: Local) -> None:
    spec = spec_of(2)
    zero, one = local.start(spec, [0, 1]).values()
    unmask_all(local, (0, 1))
    sent = {
        rank: Sent(
            torch.randint(0, 256, (s.x.shape[0], 13), dtype=torch.uint8),
            s.expert_ids,
            s.weights,
            s.table,
        )
        for rank, s in random_sent(spec, (0, 1), 1).items()
    }
    received = local.each(sent, lambda b: dispatch(b, sent[b.rank]))
    for rank, got in received.items():
        rows, offsets, _ = expected_rows(sent, rank)
        assert torch.equal(got.x, rows)
        assert torch.equal(got.offsets, offsets)
        assert got.scales is None
    local.each(sent, lambda b: b.combine(b.combine_input(received[b.rank]), received[b.rank]))
    wide = random_sent(spec, (0, 1), 1)
    first = local.pool.submit(dispatch, zero, sent[0])
    with pytest.raises(CommError, match="rank 0 sent another kind of rows"):
        dispatch(one, wide[1])
    with pytest.raises(CommError, match="rank 1 sent another kind of rows"):
        first.result(LIMIT_S)


def test_every_row_tells_where_it_came_from(local: Local) -> None:
    spec = spec_of(3)
    local.start(spec, [0, 1, 2])
    unmask_all(local, (0, 1, 2))
    sent = random_sent(spec, (0, 1, 2), 4)
    for got in local.each(sent, lambda b: dispatch(b, sent[b.rank])).values():
        home = [sent[int(s)].x[int(t)] for s, t in zip(got.source, got.token, strict=True)]
        assert same_bits(got.x, torch.stack(home) if home else got.x)
        for address, row in zip(got.rows.tolist(), got.x, strict=True):
            raw = bytes(ffi.buffer(ffi.cast("char *", address), 2 * spec.hidden))
            assert raw == row.view(torch.uint8).numpy().tobytes()


def test_statistics_name_the_slow_rank_and_count_each_token_once(local: Local) -> None:
    spec = spec_of(3)
    ids = (0, 1, 2)
    local.start(spec, ids)
    unmask_all(local, ids)
    sent = random_sent(spec, ids, 7)
    slow = threading.Event()
    threading.Timer(0.2, slow.set).start()

    def one(buffer: HostBuffer) -> None:
        if buffer.rank == 1:
            assert slow.wait(LIMIT_S)
        got = dispatch(buffer, sent[buffer.rank])
        buffer.combine(got.x.clone(), got)

    local.each(ids, one)
    told = local.buffers[0].statistics()
    assert told.exchanges == 1
    assert max(told.dispatch_wait_ns, key=lambda r: told.dispatch_wait_ns[r]) == 1
    owners = sent[0].table.rank[sent[0].expert_ids.clamp(min=0).long()]
    to_one = int(((owners == 1) & (sent[0].expert_ids >= 0)).any(1).sum())
    row = local.buffers[0]._core.window.layout
    dispatched = to_one * (row.meta_bytes + row.result_stride)
    from_one = int(
        (
            (sent[1].table.rank[sent[1].expert_ids.clamp(min=0).long()] == 0)
            & (sent[1].expert_ids >= 0)
        )
        .any(1)
        .sum()
    )
    assert told.bytes_sent[1] == dispatched + from_one * row.result_stride
    assert told.bytes_sent[0] == 0


# ---- any sequence -------------------------------------------------------------------------------


class Masks(RuleBasedStateMachine):
    """Joins, masks, stalls, ends and rejoins of up to 8 ranks without a coordinator.

    The model: `up` exchange with each other. Whoever leaves and comes back is taken for new.
    """

    def __init__(self) -> None:
        super().__init__()
        self.spec = spec_of(8, max_tokens=5, hidden=24, topk=3)
        self.local = Local()
        self.up: set[int] = set()
        self.seed = 0

    @initialize(ids=st.sets(st.integers(0, 7), min_size=1, max_size=4))
    def begin(self, ids: set[int]) -> None:
        self.local.start(self.spec, ids, "mask")
        self.come(ids)

    def come(self, ids: set[int]) -> None:
        self.up |= ids
        unmask_all(self.local, tuple(self.up))

    def sent(self) -> dict[int, Sent]:
        """Tables name all ids that are connected; some owners are masked."""
        self.seed += 1
        return random_sent(self.spec, tuple(sorted(self.local.buffers)), self.seed)

    @rule(data=st.data())
    def join(self, data: st.DataObject) -> None:
        absent = sorted(set(range(8)) - set(self.local.buffers))
        if absent:
            new = data.draw(st.sets(st.sampled_from(absent), min_size=1, max_size=3))
            self.local.start(self.spec, new, "mask")
            self.come(new)

    @rule(reduce=st.sampled_from(["rank", "home"]), count=st.integers(1, 3))
    def step(self, reduce: str, count: int) -> None:
        for _ in range(count):
            sent = self.sent()
            views = together(tuple(self.up))
            exchange(self.local, {r: sent[r] for r in self.up}, views, reduce)

    @rule()
    def meet(self) -> None:
        votes = self.local.each(self.up, lambda b: b.barrier(bytes([b.rank]), timeout_s=LIMIT_S))
        assert all(vote == {r: bytes([r]) for r in self.up} for vote in votes.values())

    @precondition(lambda self: len(self.up) > 1)
    @rule(data=st.data())
    def mask(self, data: st.DataObject) -> None:
        out = data.draw(st.sampled_from(sorted(self.up)))
        self.up.discard(out)
        for rank in self.up:
            self.local.buffers[rank].mask([out])
        self.local.buffers[out].mask(self.up)

    @precondition(lambda self: set(self.local.buffers) - self.up)
    @rule(data=st.data())
    def unmask(self, data: st.DataObject) -> None:
        away = sorted(set(self.local.buffers) - self.up)
        self.come(data.draw(st.sets(st.sampled_from(away), min_size=1)))

    @precondition(lambda self: len(self.up) > 1)
    @rule(data=st.data(), phase=st.sampled_from(["dispatch", "sent", "combine"]))
    def stall(self, data: st.DataObject, phase: str) -> None:
        """One stops at some point of an exchange; the others find out by their limit."""
        out = data.draw(st.sampled_from(sorted(self.up)))
        sent = self.sent()
        lost = self.local.buffers[out]
        hook = None
        if phase != "dispatch":
            s = sent[out]
            hook = lost.begin_dispatch(s.x, s.expert_ids, s.weights, s.table)
        others = self.up - {out}

        def one(buffer: HostBuffer) -> None:
            got = dispatch(buffer, sent[buffer.rank], 0.05)
            buffer.combine(got.x.clone(), got, timeout_s=0.05)
            assert out not in buffer.active

        self.local.each(others, one)
        self.up = others
        if hook is not None:  # it wakes: what it was sent is intact, then nobody is left
            got = hook(0.0 if phase == "sent" else 0.05)
            lost.combine(got.x.clone(), got, timeout_s=0.02)
        lost.mask(others)
        for rank in others:  # a limit of 50 ms may strike healthy ranks, too
            self.local.buffers[rank].mask(others - {rank})
        unmask_all(self.local, tuple(self.up))

    @precondition(lambda self: len(self.local.buffers) > 1)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        """A rank ends; the others let go of it, before their next exchange or after."""
        gone = data.draw(st.sampled_from(sorted(self.local.buffers)))
        if self.up == {gone}:
            return
        self.local.buffers.pop(gone).close()
        self.up.discard(gone)
        for buffer in self.local.buffers.values():
            buffer.disconnect([gone])

    def teardown(self) -> None:
        with self.local:
            pass


Masks.TestCase.settings = settings(
    max_examples=20,
    stateful_step_count=15,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
test_any_sequence_of_masks = Masks.TestCase
