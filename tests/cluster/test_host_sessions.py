"""Hosts that join: sessions, and what becomes of those who are not invited."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import shutil
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
from safetensors.torch import load_file, save_file
from support.service import until

from flexpert.cluster.hosts import agent_protocol as say
from flexpert.cluster.hosts.agent import wait_before_joining
from flexpert.cluster.hosts.cluster_token import keys_of, read_token
from flexpert.cluster.hosts.curve_socket import MOST_STRANGERS, CurveClient
from flexpert.cluster.hosts.host_sessions import HostSessions
from flexpert.cluster.hosts.model_description import describe_model, differences
from flexpert.cluster.hosts.ready_file import ReadyFile
from flexpert.cluster.saved_state import SavedHost
from flexpert.errors import ConfigError, OperationConflict, OperationRefused
from flexpert.models.source import ModelSource
from flexpert.version import VERSION

TOKEN = secrets.token_urlsafe(32)
TIMEOUT_S = 0.4
TRIES = 20_000
MODEL = {"architecture": "Qwen3MoeForCausalLM", "experts": "64"}
FREE = say.FreeMemory(2**30)


class Owner:
    """A head that notes what it is asked, and starts the rank of a change at once."""

    def __init__(self) -> None:
        self.sessions: HostSessions | None = None
        self.refusal: Exception | None = None
        self.is_busy = False
        self.members = {0}
        self.asked: list[tuple[str, int]] = []
        self.left: list[tuple[int, int, str]] = []
        self.heard = b""
        self.near: socket.socket | None = None
        self.saved: list[SavedHost] = []

    def save_hosts(self, records: list[SavedHost]) -> None:
        self.saved = records

    def free_id(self, wanted: int) -> int | None:
        assert self.sessions is not None
        free = {1, 2} - self.sessions.ids
        if wanted >= 0:
            return wanted if wanted in free else None
        return max(free, default=None)

    def busy(self) -> bool:
        return self.is_busy

    def is_member(self, rank: int) -> bool:
        return rank in self.members

    def begin_operation(self, *, join: tuple[int, ...] = (), remove: tuple[int, ...] = ()) -> None:
        assert self.sessions is not None
        if self.refusal:
            raise self.refusal
        for rank in join:
            self.asked.append(("join", rank))
            self.near, far = socket.socketpair()
            self.near.setblocking(False)
            self.sessions.spawn(rank, b"verdicts", far)
        for rank in remove:
            self.asked.append(("remove", rank))

    def read(self) -> None:
        """All that is there for the rank's end in the head."""
        with contextlib.suppress(BlockingIOError):
            while self.near:
                self.heard += self.near.recv(2**16)

    def rank_left_host(self, rank: int, status: int, why: str) -> None:
        self.read()
        self.left.append((rank, status, why))


class Host:
    """The agent's end of a connection, message by message."""

    def __init__(self, address: str, token: str = TOKEN) -> None:
        self.heard: list[Any] = []
        self.beats: list[bool] = []  # whether its rank serves
        self.refused = 0
        self.client = CurveClient(address, keys_of(token), self._receive, self._count)

    def _receive(self, message: bytes) -> None:
        heard = say.decode_to_agent(message)
        if isinstance(heard, say.HeadBeat):
            self.beats.append(heard.serves)
        else:
            self.heard.append(heard)

    def _count(self) -> None:
        self.refused += 1

    def send(self, message: say.ToHead) -> None:
        self.client.send(say.encode(message))

    async def hear(self) -> Any:
        await until(lambda: self.heard)
        return self.heard.pop(0)

    async def join(self, rank: int = -1) -> say.Welcome:
        self.send(say.Join(VERSION, rank, "there"))
        welcome = await self.hear()
        assert isinstance(welcome, say.Welcome), welcome
        return welcome

    async def serve(self, rank: int = -1) -> say.Welcome:
        """Join, and be asked for the rank."""
        welcome = await self.join(rank)
        self.send(say.Opened(welcome.session, MODEL, FREE))
        assert await self.hear() == say.Spawn(welcome.session, b"verdicts")
        return welcome


def sessions_of(
    owner: Owner,
    address: str = "tcp://127.0.0.1:0",
    known: Sequence[SavedHost] = (),
    *,
    timeout_s: float = 10.0,
) -> HostSessions:
    return HostSessions(
        address,
        keys_of(TOKEN),
        owner,
        settings="{}",
        model=MODEL,
        timeout_s=timeout_s,
        known=known,
    )


@contextlib.asynccontextmanager
async def listening(timeout_s: float) -> AsyncIterator[tuple[Owner, str, Callable[..., Host]]]:
    owner, hosts = Owner(), list[Host]()
    sessions = owner.sessions = sessions_of(owner, timeout_s=timeout_s)

    def host(token: str = TOKEN) -> Host:
        hosts.append(Host(sessions.address, token))
        return hosts[-1]

    try:
        yield owner, sessions.address, host
    finally:
        for one in hosts:
            one.client.close()
        sessions.close()
        if owner.near:
            owner.near.close()


def run(
    scenario: Callable[[Owner, str, Callable[..., Host]], Any], timeout_s: float = TIMEOUT_S
) -> None:
    async def within() -> None:
        async with listening(timeout_s) as parts:
            await scenario(*parts)

    asyncio.run(asyncio.wait_for(within(), 30))


def test_bytes_go_both_ways_and_all_are_heard_before_the_end() -> None:
    async def scenario(owner: Owner, address: str, host: Callable[..., Host]) -> None:
        one = host()
        welcome = await one.serve()
        assert owner.asked == [("join", 2)], "processes of the head's host take the lowest ids"
        much = secrets.token_bytes(3 * 2**20)
        for at in range(0, len(much), 2**18):
            one.send(say.FromRank(welcome.session, much[at : at + 2**18]))
        one.send(say.RankGone(welcome.session, 3, "by itself"))
        while not owner.left:
            owner.read()
            await asyncio.sleep(0)
        assert owner.left == [(2, 3, "by itself")]
        assert owner.heard == much, "what it said is heard before its end"
        assert isinstance(await one.hear(), say.Fenced)

    run(scenario)


def test_what_the_head_says_reaches_the_rank() -> None:
    async def scenario(owner: Owner, address: str, host: Callable[..., Host]) -> None:
        one = host()
        welcome = await one.serve(1)
        assert owner.near is not None
        owner.near.setblocking(True)
        owner.near.sendall(b"x" * 100_000)
        data = b""
        while len(data) < 100_000:
            told = await one.hear()
            assert told.session == welcome.session
            data += told.data
        assert data == b"x" * 100_000

    run(scenario)


def test_a_silent_host_is_lost_and_what_it_still_says_is_not_heard() -> None:
    async def scenario(owner: Owner, address: str, host: Callable[..., Host]) -> None:
        one = host()
        welcome = await one.serve()
        for _ in range(6):
            one.send(say.AgentBeat(welcome.session))
            await asyncio.sleep(TIMEOUT_S / 2)
        assert owner.left == []
        await until(lambda: owner.left)
        assert owner.left[0][:2] == (2, -9)
        assert "nothing was heard" in owner.left[0][2]
        assert isinstance(await one.hear(), say.Fenced)
        one.send(say.FromRank(welcome.session, b"late"))
        assert isinstance(await one.hear(), say.Fenced)
        assert (await one.join(2)).session != welcome.session, "its id is free again"

    run(scenario)


def test_an_end_while_hosts_come_and_go_waits_for_nobody() -> None:
    """ZeroMQ tells of connections until the end, when nobody may be left to take it."""

    async def scenario() -> None:
        for turn in range(60):
            async with listening(TIMEOUT_S) as (_, _, host):
                one = host()
                await (one.join() if turn % 3 == 0 else asyncio.sleep(0.002 * (turn % 3)))
                one.client.close()

    asyncio.run(scenario())


@pytest.mark.parametrize("address", ["nowhere", "tcp://127.0.0.1", "tcp://:x", "smtp://a:1"])
def test_what_is_no_address_to_join_is_named(address: str) -> None:
    async def scenario() -> None:
        with pytest.raises(ConfigError, match=f"'{address}' is no address to join: .*tcp://HOST"):
            CurveClient(address, keys_of(TOKEN), lambda _: None, lambda: None)

    asyncio.run(scenario())


def test_a_host_hears_when_its_rank_serves_and_may_go_before_it_does() -> None:
    async def scenario(owner: Owner, address: str, host: Callable[..., Host]) -> None:
        one = host()
        welcome = await one.join()
        await until(lambda: one.beats)
        owner.members.add(welcome.rank)
        await until(lambda: one.beats[-1])
        assert not one.beats[0]
        one.send(say.AskToLeave(welcome.session))
        assert isinstance(await one.hear(), say.Left)
        assert owner.left == [], "it had no rank"

    run(scenario)


def test_a_host_that_no_change_can_take_out_is_let_go_with_the_reason() -> None:
    async def scenario(owner: Owner, address: str, host: Callable[..., Host]) -> None:
        one = host()
        welcome = await one.serve()
        owner.refusal = OperationRefused("a service needs at least one rank")
        one.send(say.AskToLeave(welcome.session))
        left = await one.hear()
        assert isinstance(left, say.Left)
        assert "could not be drained: a service needs at least one rank" in left.reason
        assert owner.left[0][:2] == (2, -9)

    run(scenario)


def test_leaving_is_a_change_and_waits_until_one_can_begin() -> None:
    async def scenario(owner: Owner, address: str, host: Callable[..., Host]) -> None:
        one = host()
        welcome = await one.serve()
        owner.is_busy = True
        one.send(say.AskToLeave(welcome.session))
        await asyncio.sleep(TIMEOUT_S / 2)
        assert ("remove", 2) not in owner.asked
        owner.is_busy = False
        await until(lambda: ("remove", 2) in owner.asked)
        one.send(say.RankGone(welcome.session, 0))
        assert await one.hear() == say.Left(welcome.session)
        assert owner.left == [(2, 0, "")]

    run(scenario)


def test_who_cannot_join_is_told_why() -> None:
    async def scenario(owner: Owner, address: str, host: Callable[..., Host]) -> None:
        old = host()
        old.send(say.Join("0.0.1", -1, "there"))
        told = await old.hear()
        assert "0.0.1" in told.reason
        assert VERSION in told.reason
        other = host()
        welcome = await other.join()
        other.send(say.Opened(welcome.session, {**MODEL, "experts": "8"}, FREE))
        assert "'experts' is '8' there, '64' here" in (await other.hear()).reason
        taken = host()
        await taken.serve(1)
        late = host()
        late.send(say.Join(VERSION, 1, "there"))
        told = await late.hear()
        assert told.again
        assert "rank 1 is there already" in told.reason
        owner.refusal = OperationRefused("no memory")
        welcome = await late.join()
        late.send(say.Opened(welcome.session, MODEL, FREE))
        assert (await late.hear()).reason == "no memory"
        owner.refusal = OperationConflict("another runs")
        patient = host()
        welcome = await patient.join()
        patient.send(say.Opened(welcome.session, MODEL, FREE))
        await asyncio.sleep(TIMEOUT_S / 2)
        patient.send(say.AgentBeat(welcome.session))
        owner.refusal = None
        assert isinstance(await patient.hear(), say.Spawn)

    run(scenario)


def test_nonsense_from_one_host_ends_its_session_only() -> None:
    async def scenario(owner: Owner, address: str, host: Callable[..., Host]) -> None:
        one, other = host(), host()
        first, second = await one.serve(1), await other.serve(2)
        one.client.send(msgspec.msgpack.encode({"type": "from_rank", "session": 3}))
        await until(lambda: owner.left)
        assert [rank for rank, *_ in owner.left] == [1]
        other.send(say.AgentBeat(second.session))
        other.send(say.AgentBeat(first.session))  # not its own
        assert (await other.hear()).session == first.session
        assert owner.sessions is not None
        assert owner.sessions.ids == {2}

    run(scenario)


def test_the_uninvited_are_refused_and_cost_no_memory(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(owner: Owner, address: str, host: Callable[..., Host]) -> None:
        place = ("127.0.0.1", int(address.rpartition(":")[2]))
        stranger = host("another token than the head's")
        stranger.send(say.Join(VERSION, -1, "there"))
        await until(lambda: stranger.refused)
        assert stranger.heard == []
        process = psutil.Process()
        before = 0
        for attempt in range(TRIES):
            with socket.create_connection(place) as connection:
                connection.sendall(
                    secrets.token_bytes(40) if attempt % 2 else b"GET / HTTP/1.1\r\n"
                )
            if attempt % 100 == 0:
                await asyncio.sleep(0)
            if attempt == TRIES // 10:
                before = process.memory_info().rss
        assert process.memory_info().rss - before < 4 * 2**20
        before = process.memory_info().rss
        with monkeypatch.context() as patched:
            patched.setattr("flexpert.cluster.hosts.curve_socket._RECONNECT_MS", (1, 1))
            hasty = host("another token than the head's")
        hasty.send(say.Join(VERSION, -1, "there"))
        await until(lambda: hasty.refused >= 1000)
        assert process.memory_info().rss - before < 4 * 2**20
        hasty.client.close()
        invited = host()
        await invited.join()

    with caplog.at_level(logging.WARNING):
        run(scenario)
    assert TOKEN not in caplog.text


def test_a_crowd_that_says_nothing_leaves_descriptors_to_others(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def scenario(owner: Owner, address: str, host: Callable[..., Host]) -> None:
        one = host()
        welcome = await one.serve()
        place = ("127.0.0.1", int(address.rpartition(":")[2]))
        process = psutil.Process()
        before = process.num_fds()
        crowd = []
        try:
            for _ in range(3 * MOST_STRANGERS):
                crowd.append(socket.create_connection(place))
                one.send(say.AgentBeat(welcome.session))
                await asyncio.sleep(0)
            ours = len(crowd)
            await until(lambda: process.num_fds() - before - ours <= MOST_STRANGERS)
            await asyncio.sleep(0.1)
            assert owner.left == [], "whoever is connected stays so"
        finally:
            for connection in crowd:
                connection.close()
        one.send(say.AgentBeat(welcome.session))
        late = host()
        await late.join()

    with caplog.at_level(logging.WARNING):
        run(scenario)
    assert "too many had not shown a token" in caplog.text


def test_models_are_compared_by_shapes_and_by_samples_of_their_weights(tmp_path: Path) -> None:
    here = describe_model(ModelSource.open("tiny"))
    copy = tmp_path / "another-name"
    shutil.copytree(ModelSource.open("tiny").path, copy)
    assert differences(describe_model(ModelSource.open(str(copy))), here) == ""
    (file,) = copy.glob("*.safetensors")
    tensors = load_file(file)
    save_file({name: tensor * 2 for name, tensor in tensors.items()}, file, {"format": "pt"})
    trained_further = describe_model(ModelSource.open(str(copy)))
    assert differences(trained_further, here).startswith("'weights' is ")
    odd = {"experts": "9" * 10**6, "\x1b[2J": "x", **dict.fromkeys(map(str, range(1000)), "?")}
    said = differences(odd, here)
    assert len(said) < 600
    assert said.isascii()
    assert "\x1b" not in said


def test_a_rank_that_ends_at_once_is_not_started_in_a_loop() -> None:
    waits, last = [], 0.0
    for served_s in (0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 60.0, 1.0):
        last = wait_before_joining(last, served_s)
        waits.append(last)
    assert waits == [0.5, 1.0, 2.0, 4.0, 8.0, 10.0, 0.5, 1.0]


def test_a_token_is_long_enough_and_nobody_elses(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}\nmore\n")
    file.chmod(0o600)
    assert read_token(file, {}) == TOKEN
    assert read_token(None, {"FLEXPERT_CLUSTER_TOKEN": TOKEN}) == TOKEN
    assert read_token(None, {}) == ""
    file.chmod(0o640)
    with pytest.raises(ConfigError, match="chmod 600"):
        read_token(file, {})
    file.chmod(0o600)
    file.write_text("short")
    with pytest.raises(ConfigError, match="5 characters"):
        read_token(file, {})
    assert keys_of(TOKEN) == keys_of(TOKEN)
    assert TOKEN not in repr(keys_of(TOKEN))
    assert len({keys_of(TOKEN).head.public, keys_of(TOKEN).agents.public}) == 2


def test_an_agent_that_is_expected_starts_its_rank_without_another_change() -> None:
    async def scenario(owner: Owner, address: str, host: Callable[..., Host]) -> None:
        assert owner.sessions is not None
        near, far = socket.socketpair()
        with near:
            owner.sessions.expect(b"ticket", 0, b"verdicts", far)
            one = host()
            one.send(say.Join(VERSION, 0, "there", b"ticket"))
            welcome = await one.hear()
            assert welcome.rank == 0
            for _ in range(2):  # twice is as once
                one.send(say.Opened(welcome.session, MODEL, FREE))
            assert await one.hear() == say.Spawn(welcome.session, b"verdicts")
            one.send(say.FromRank(welcome.session, b"hello"))
            near.setblocking(False)
            assert await asyncio.get_running_loop().sock_recv(near, 10) == b"hello"
            late = host()
            late.send(say.Join(VERSION, 0, "elsewhere", b"ticket"))
            assert await late.hear() == say.Turned("it is not expected any more")
            owner.sessions.give_up(b"ticket", "its node is gone")
            assert isinstance(await one.hear(), say.Fenced)
        assert owner.asked == []
        assert owner.left == [(0, -9, "host there: its node is gone")]

    run(scenario)


def test_a_rank_whose_expected_agent_is_stopped_is_lost_and_still_desired() -> None:
    async def scenario(owner: Owner, address: str, host: Callable[..., Host]) -> None:
        assert owner.sessions is not None
        near, far = socket.socketpair()
        with near:
            owner.sessions.expect(b"ticket", 0, b"verdicts", far)
            one = host()
            one.send(say.Join(VERSION, 0, "there", b"ticket"))
            welcome = await one.hear()
            one.send(say.Opened(welcome.session, MODEL, FREE))
            assert isinstance(await one.hear(), say.Spawn)
            one.send(say.AskToLeave(welcome.session))
            await until(lambda: owner.left)
        assert owner.asked == []
        assert owner.left == [(0, -9, "host there: it was stopped")]

    run(scenario)


def test_a_rank_whose_expected_agent_fails_has_not_started() -> None:
    async def scenario(owner: Owner, address: str, host: Callable[..., Host]) -> None:
        assert owner.sessions is not None
        fails: list[tuple[Callable[[Host, say.Welcome], None], str]] = [
            (
                lambda one, it: one.send(say.Opened(it.session, {"experts": "?"}, FREE)),
                "its model is another one",
            ),
            (
                lambda one, it: one.send(say.AskToLeave(it.session, now=True, why="no model")),
                "no model",
            ),
            (lambda one, it: None, "nothing was heard"),
        ]
        for number, (fail, why) in enumerate(fails):
            near, far = socket.socketpair()
            with near:
                owner.sessions.expect(b"%d" % number, number, b"", far)
                one = host()
                one.send(say.Join(VERSION, number, "there", b"%d" % number))
                fail(one, await one.hear())
                await until(lambda: owner.left)
                rank, status, said = owner.left.pop()
                assert (rank, status) == (number, 1)
                assert why in said
                assert near.recv(1) == b"", "its connection is closed"
        near, far = socket.socketpair()
        with near:
            owner.sessions.expect(b"never", 7, b"", far)
            owner.sessions.give_up(b"never", "no room")
            owner.sessions.give_up(b"never", "no room")
            assert owner.left == [(7, 1, "no room")]
            assert near.recv(1) == b""

    run(scenario)


def test_a_host_goes_on_with_another_head_that_knows_it_and_with_no_other() -> None:
    async def scenario(owner: Owner, address: str, host: Callable[..., Host]) -> None:
        first, stranger = host(), host()
        known = await first.serve(1)
        held = owner.near  # or the rank would be cut off
        unknown = await stranger.serve(2)
        assert owner.sessions is not None
        assert [one.rank for one in owner.saved] == [1, 2]
        saved = [one for one in owner.saved if one.rank == 1]
        owner.sessions.leave()
        assert held is not None
        held.close()
        first.heard.clear()
        stranger.heard.clear()
        first.send(say.FromRank(known.session, b"to the head before"))
        other = Owner()
        sessions = other.sessions = sessions_of(other, address, saved)
        try:
            assert sessions.ids == {1}
            near, far = socket.socketpair()
            near.setblocking(False)
            with near:
                near.send(b"attach")
                sessions.attach(1, far)
                first.send(say.AgentBeat(known.session))
                assert await first.hear() == say.Reattach(known.session)
                assert await first.hear() == say.ToRank(known.session, b"attach")
                first.send(say.FromRank(known.session, b"of the old connection"))
                first.send(say.Reattached(known.session))
                first.send(say.FromRank(known.session, b"attached"))
                assert await asyncio.get_running_loop().sock_recv(near, 100) == b"attached"
                stranger.send(say.AgentBeat(unknown.session))
                assert await stranger.hear() == say.Fenced(unknown.session, "the session is over")
                first.send(say.RankGone(known.session, -9))
                await until(lambda: other.left)
            assert other.left == [(1, -9, "")]
            assert other.saved == []
        finally:
            sessions.close()

    run(scenario, 10.0)  # nobody beats here


def test_a_host_of_the_head_before_that_does_not_come_back_is_lost() -> None:
    async def scenario(owner: Owner, address: str, host: Callable[..., Host]) -> None:
        other = Owner()
        known = SavedHost(b"n" * 16, 1, "there", FREE)
        sessions = other.sessions = sessions_of(other, known=[known])
        try:
            near, far = socket.socketpair()
            with near:
                sessions.attach(1, far)
                sessions.kill(1)  # as `RankTakeover` does when its time is over
                await until(lambda: other.left)
                assert near.recv(1) == b"", "its connection is closed"
            late = Host(sessions.address)
            late.send(say.AgentBeat(known.session))
            assert isinstance(await late.hear(), say.Fenced)
            late.client.close()
        finally:
            sessions.close()

    run(scenario)


def test_the_ready_file_is_there_while_it_is_said_to_be(tmp_path: Path) -> None:
    file = tmp_path / "ready"
    file.touch()  # by a process that was killed
    ready = ReadyFile(file)
    assert not file.exists()
    ready.show(True)
    assert file.exists()
    ready.show(False)
    ready.show(False)
    assert not file.exists()
    with pytest.raises(ConfigError, match=r"--ready-file .* cannot be written"):
        ReadyFile(tmp_path / "none" / "ready")
    ReadyFile(None).show(True)
