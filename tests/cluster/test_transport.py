"""Between head and children: messages come whole and in order, whoever cannot be understood is cut
off, and nobody else notices."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from collections.abc import Callable, Coroutine
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexpert.cluster.hosts import agent_protocol as say
from flexpert.cluster.processes.child_connection import Connection, ConnectionEnded
from flexpert.cluster.processes.rank_spec import decode_spec
from flexpert.cluster.processes.transport import ChildLink, Transport
from flexpert.engine import rank_protocol as msg
from flexpert.forking import fork_server as forkserver
from flexpert.forking.framing import PROTOCOL, BadFrame, Deframer, WrongProtocol, frame

LOAD = msg.Load(0, 0, 0.0, 0)
LIMIT = 1 << 16


# ---- frames -------------------------------------------------------------------------------------


@given(st.lists(st.binary(max_size=200), max_size=20), st.lists(st.integers(1, 50), min_size=1))
def test_messages_come_whole_and_in_order_however_the_stream_is_cut(
    messages: list[bytes], pieces: list[int]
) -> None:
    stream = b"".join(map(frame, messages))
    deframer, got, at, turn = Deframer(), [], 0, 0
    while at < len(stream):
        size = pieces[turn % len(pieces)]
        got += deframer.feed(stream[at : at + size])
        at, turn = at + size, turn + 1
    assert got == messages


@given(st.binary(max_size=2000))
def test_any_bytes_are_messages_or_refused_and_no_more_is_kept_than_came(data: bytes) -> None:
    deframer = Deframer(LIMIT)
    try:
        messages = list(deframer.feed(data))
    except BadFrame:
        return
    assert b"".join(map(frame, messages)) == data[: len(data) - len(deframer._held)]


def test_a_long_message_is_refused_before_it_is_there() -> None:
    with pytest.raises(BadFrame, match="announced"):
        list(Deframer(LIMIT).feed(announced(LIMIT + 1)))


def announced(length: int, version: int = PROTOCOL) -> bytes:
    return version.to_bytes(2, "little") + length.to_bytes(4, "little")


@given(st.integers(0, 2**16 - 1).filter(lambda version: version != PROTOCOL), st.binary())
def test_another_version_is_refused_before_its_message_is_read(version: int, data: bytes) -> None:
    with pytest.raises(WrongProtocol, match=rf"version {version} .* version {PROTOCOL} here"):
        list(Deframer(LIMIT).feed(announced(len(data), version) + data))


@pytest.mark.parametrize("decode", [say.decode_to_head, say.decode_to_agent])
def test_agents_of_another_version_are_refused(decode: Callable[[bytes], object]) -> None:
    other = (PROTOCOL + 1).to_bytes(2, "little") + say.encode(say.AgentBeat(b"x"))[2:]
    with pytest.raises(WrongProtocol, match=rf"version {PROTOCOL + 1} .* version {PROTOCOL} here"):
        decode(other)


# ---- decoders -----------------------------------------------------------------------------------

JSON: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
    | st.binary(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=8,
)
TAGS = st.sampled_from(
    ["hello", "published", "prepared", "switched", "handed_over", "offered", "admit", "fork", "x"]
)
TAGGED = st.builds(lambda tag, rest: {**rest, "type": tag}, TAGS, st.dictionaries(st.text(), JSON))
PACKETS = st.binary(max_size=64) | (JSON | TAGGED).map(msgspec.msgpack.encode)


@pytest.mark.parametrize(
    "decode",
    [
        msg.decode_report,
        msg.decode_command,
        forkserver.decode_answer,
        forkserver.decode_request,
        decode_spec,
    ],
)
@settings(max_examples=300)
@given(packet=PACKETS)
def test_any_packet_is_a_message_or_an_error_that_is_expected(
    decode: Callable[[bytes], object], packet: bytes
) -> None:
    try:
        decode(packet)
    except msgspec.MsgspecError:
        pass
    except UnicodeDecodeError:  # msgspec lets it out for a string that is no UTF-8
        pass


# ---- the head's end ----------------------------------------------------------------------------


class Heard:
    """A transport with what it was told, and the other ends of its connections."""

    def __init__(self, on_report: Callable[[int, msg.Report], None] | None = None) -> None:
        self.reports: list[tuple[int, msg.Report]] = []
        self.cut_off: dict[int, str] = {}
        self.changed = asyncio.Event()
        self._on_report = on_report
        self.disconnected: list[int] = []
        self.transport = Transport(self._report, self._cut, self._disconnect)

    def _report(self, rank: int, report: msg.Report) -> None:
        self.changed.set()
        if self._on_report:
            self._on_report(rank, report)
        self.reports.append((rank, report))

    def _cut(self, rank: int, why: str) -> None:
        self.cut_off[rank] = why
        self.changed.set()

    def _disconnect(self, rank: int) -> None:
        self.disconnected.append(rank)
        self.changed.set()

    def open(self, rank: int) -> socket.socket:
        end = self.transport.open(rank)
        return socket.socket(fileno=os.dup(end.fileno()))

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not condition():
                self.changed.clear()
                await self.changed.wait()


def run(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(scenario)


def alive() -> bytes:
    return frame(msg.encode(msg.Alive(0.0)))


BAD = {
    "no message pack": frame(b"\xc1"),
    "no utf-8": frame(msgspec.msgpack.encode({"type": "hello"}).replace(b"hello", b"h\xff\xfelo")),
    "nested": frame(b"\x91" * 100_000),
    "a command": frame(msg.encode(msg.Stop())),
    "nothing": frame(b""),
    "too long": announced(2**31),
    "another version": announced(0, PROTOCOL + 1),
    "a number out of range": frame(msgspec.msgpack.encode({"type": "halted", "epoch": -(2**63)}))
    + frame(msgspec.msgpack.encode({"type": "halted", "epoch": 1.5})),
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD.keys())
def test_a_rank_that_cannot_be_understood_is_cut_off_and_the_others_are_heard(bad: bytes) -> None:
    async def scenario() -> None:
        heard = Heard()
        with heard.open(0) as liar, heard.open(1) as other:
            liar.sendall(alive() + bad + alive())
            await heard.until(lambda: 0 in heard.cut_off)
            assert "cannot be" in heard.cut_off[0]
            other.sendall(alive())
            await heard.until(lambda: (1, msg.Alive(0.0)) in heard.reports)
            assert [rank for rank, report in heard.reports if isinstance(report, msg.Alive)] == [
                0,
                1,
            ]
        heard.transport.close()

    run(scenario())


def test_a_report_that_cannot_be_handled_costs_its_rank_and_nobody_else() -> None:
    def fails(rank: int, report: msg.Report) -> None:
        if rank == 0:
            raise KeyError("no such thing")

    async def scenario() -> None:
        heard = Heard(fails)
        with heard.open(0) as liar, heard.open(1) as other:
            liar.sendall(alive())
            other.sendall(alive())
            await heard.until(lambda: 0 in heard.cut_off and bool(heard.reports))
            assert "KeyError" in heard.cut_off[0]
            assert 1 not in heard.cut_off
        heard.transport.close()

    run(scenario())


def test_a_rank_that_says_very_much_does_not_keep_the_loop_from_the_others() -> None:
    async def scenario() -> None:
        heard = Heard()
        with heard.open(0) as talker:
            talker.setblocking(False)
            flood = alive() * 10_000
            turns = 0
            sending = asyncio.ensure_future(asyncio.get_running_loop().sock_sendall(talker, flood))
            while len(heard.reports) < 10_000:
                turns += 1
                await asyncio.sleep(0)
            await sending
            assert turns > 1
        heard.transport.close()

    run(scenario())


def test_a_child_that_reads_nothing_is_cut_off_before_it_fills_the_head() -> None:
    async def scenario() -> None:
        ends: list[str] = []
        link = ChildLink(lambda message: None, ends.append, most_unsent=1 << 20)
        for _ in range(40):
            link.send(bytes(1 << 16))
        assert len(ends) == 1
        assert "unread" in ends[0]
        link.send(b"dropped")

    run(scenario())


def test_a_message_in_pieces_comes_as_one_between_the_others() -> None:
    async def scenario() -> None:
        link = ChildLink(lambda message: None, lambda why: None)
        child = Connection(link.child_end)
        large = bytearray(b"c" * 500_000)  # more than the socket holds
        link.send(b"before")
        link.send_pieces([b"ab", b"", large, b"d"])
        link.send_pieces([])
        link.send(b"after")
        got = [await asyncio.to_thread(child.receive) for _ in range(4)]
        assert got == [b"before", b"ab" + large + b"d", b"", b"after"]
        link.close()

    run(scenario())


def test_what_a_rank_said_before_its_end_is_heard_before_its_end_is_told() -> None:
    async def scenario() -> None:
        heard = Heard()
        with heard.open(3) as rank:
            rank.sendall(frame(msg.encode(msg.Unable("no memory"))))
        heard.transport.drain(3)
        assert heard.reports == [(3, msg.Unable("no memory"))]
        heard.transport.forget(3)

    run(scenario())


def test_a_connection_that_a_rank_closes_is_told_once_and_after_what_it_said() -> None:
    async def scenario() -> None:
        heard = Heard(lambda rank, report: order.append(report))
        order: list[object] = []
        rank = heard.open(3)
        heard.transport._links[3].child_end.close()
        rank.sendall(frame(msg.encode(msg.Alive())))
        rank.close()
        await heard.until(lambda: bool(heard.disconnected))
        assert order == [msg.Alive()]
        heard.transport.drain(3)
        heard.transport.forget(3)
        assert heard.disconnected == [3]
        assert not heard.cut_off

    run(scenario())


# ---- the child's end ---------------------------------------------------------------------------


def test_both_ways_and_large_messages_with_a_slow_reader() -> None:
    ours, theirs = socket.socketpair()
    head, rank = Connection(ours), Connection(theirs)
    sent = [bytes([number]) * (number * 100_003) for number in range(30)]
    for message in sent:
        rank.send(message)  # far more than the socket holds: returns all the same
    assert [head.receive() for _ in sent] == sent
    head.send(b"down")
    assert rank.receive() == b"down"
    head.close()
    with pytest.raises(ConnectionEnded):
        rank.receive()
    rank.close()


def test_from_many_threads_each_message_comes_whole() -> None:
    ours, theirs = socket.socketpair()
    head, rank = Connection(ours), Connection(theirs)

    def speak(number: int) -> None:
        for _ in range(50):
            rank.send(bytes([number]) * 5000)

    threads = [threading.Thread(target=speak, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    got = [head.receive() for _ in range(200)]
    for thread in threads:
        thread.join()
    assert all(len(set(message)) == 1 and len(message) == 5000 for message in got)
    assert sorted(message[0] for message in got) == sorted([*range(4)] * 50)
    head.close()
    rank.close()


def test_a_head_that_never_reads_does_not_fill_the_rank() -> None:
    ours, theirs = socket.socketpair()
    with ours:
        rank = Connection(theirs, most_unsent=1 << 20)

        def speak() -> None:
            for _ in range(100):
                rank.send(bytes(1 << 16))

        with pytest.raises(ConnectionEnded, match="unread"):
            speak()
        rank.close(timeout_s=0.05)
