"""What children of one kind need is imported once, in the process that they are forks of."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from flexpert.forking.fork_server import (
    Begin,
    Exited,
    Fork,
    Ready,
    Started,
    decode_answer,
    encode,
    start_server,
)

MODULE = """
import os
importer = os.getpid()
def tell(spec, end, shared):
    end.sendall(b"%d" % importer)
    return 0
"""


@pytest.fixture
def channel(tmp_path: Path) -> Iterator[socket.socket]:
    """Of a fork server that finds `needed`."""
    (tmp_path / "needed.py").write_text(MODULE)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        with theirs:
            process = start_server(theirs)
        ours.settimeout(20.0)
        ours.send(encode(Begin("builtins:bytes", path=[str(tmp_path), *sys.path])))
        assert decode_answer(ours.recv(1 << 16)) == Ready()
        yield ours
    assert process.wait(20) == 0


def importers(channel: socket.socket, entry: str, *, shares: bool) -> list[tuple[int, bytes, int]]:
    """Pid, what it says, exit status; of two children."""
    found = []
    for number in range(2):
        ours, theirs = socket.socketpair()
        with ours:
            with theirs:
                fork = encode(Fork(number, entry, b"", shares=shares))
                socket.send_fds(channel, [fork], [theirs.fileno()])
                packet, given, _, _ = socket.recv_fds(channel, 1 << 16, 1)
            started = decode_answer(packet)
            assert isinstance(started, Started)
            for descriptor in given:
                socket.close(descriptor)
            ended = decode_answer(channel.recv(1 << 16))
            assert isinstance(ended, Exited)
            found.append((started.pid, ours.recv(32), ended.status))
    return found


def test_the_second_child_shares_what_the_first_needed(channel: socket.socket) -> None:
    said = {who for _, who, _ in importers(channel, "needed:tell", shares=True)}
    children = {b"%d" % pid for pid, _, _ in importers(channel, "needed:tell", shares=True)}
    assert len(said) == 1
    assert not said & children


def test_others_import_for_themselves(channel: socket.socket) -> None:
    for pid, importer, _ in importers(channel, "needed:tell", shares=False):
        assert importer == b"%d" % pid


def test_what_cannot_be_imported_ends_the_child_alone(channel: socket.socket) -> None:
    assert [status for _, _, status in importers(channel, "missing:tell", shares=True)] == [1, 1]
    assert [status for _, _, status in importers(channel, "needed:tell", shares=True)] == [0, 0]
