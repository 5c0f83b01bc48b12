"""A connection that is cut: nothing is heard on either side, and nothing is lost."""

from __future__ import annotations

import socket
import time

from flexpert.cluster.processes.child_connection import Connection
from flexpert.cluster.processes.relay import Relay


def test_what_is_said_while_the_line_is_cut_arrives_afterwards_in_order() -> None:
    ours, theirs = socket.socketpair()
    relay = Relay(theirs)
    head, rank = Connection(ours), Connection(relay.near)
    try:
        for number in range(3):
            rank.send(b"up %d" % number)
            assert head.receive() == b"up %d" % number
            head.send(b"down")
            assert rank.receive() == b"down"
        relay.cut(0.4)
        until = time.monotonic() + 0.4
        for number in range(1000):
            rank.send(b"%d" % number)
            head.send(b"%d" % number)
        assert head.receive() == b"0"
        assert time.monotonic() >= until
        assert [int(head.receive()) for _ in range(999)] == list(range(1, 1000))
        assert [int(rank.receive()) for _ in range(1000)] == list(range(1000))
    finally:
        head.close()
        rank.close()
