"""A line that is cut: nothing is heard on either side, and nothing is lost."""

from __future__ import annotations

import secrets
import time

import pytest
import zmq

from flexpert.cluster.relay import Relay


def test_what_is_said_while_the_line_is_cut_arrives_afterwards_in_order() -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    head, rank = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
    try:
        endpoint = f"ipc://@flexpert-test-{secrets.token_hex(8)}"
        head.bind(endpoint)
        relay = Relay(endpoint)
        rank.connect(relay.endpoint)
        for number in range(3):
            rank.send(b"up %d" % number)
            assert head.recv() == b"up %d" % number
            head.send(b"down")
            assert rank.recv() == b"down"
        relay.cut(0.4)
        until = time.monotonic() + 0.4
        for number in range(1000):
            rank.send(b"%d" % number)
            head.send(b"%d" % number)
        assert head.recv() == b"0"
        assert time.monotonic() >= until
        assert [int(head.recv()) for _ in range(999)] == list(range(1, 1000))
        assert [int(rank.recv()) for _ in range(1000)] == list(range(1000))
    finally:
        head.close(0)
        rank.close(0)
        context.term()


def test_only_a_line_on_this_machine_can_be_cut() -> None:
    with pytest.raises(ValueError, match="can be cut"):
        Relay("tcp://10.0.0.1:5555")
