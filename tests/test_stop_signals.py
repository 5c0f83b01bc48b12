"""When a second signal means that a process is to end at once."""

from __future__ import annotations

import signal

import pytest

from flexpert.stop_signals import StopRequest

TERM, INT = signal.SIGTERM, signal.SIGINT


@pytest.mark.parametrize(
    ("signals", "at_once"),
    [
        ([(TERM, 10.0)], False),
        ([(TERM, 10.0), (TERM, 10.5)], False),  # one request, told twice
        ([(TERM, 10.0), (TERM, 11.0), (TERM, 12.5)], True),
        ([(INT, 10.0), (INT, 10.1)], True),
        ([(TERM, 10.0), (INT, 10.1)], True),
        ([(INT, 10.0), (TERM, 10.1)], False),
    ],
)
def test_the_second_is_meant_or_is_the_same_request(
    signals: list[tuple[int, float]], *, at_once: bool
) -> None:
    stop = StopRequest()
    assert not stop.asked
    for number, now in signals:
        stop.on_signal(number, now)
    assert (stop.asked, stop.at_once) == (True, at_once)
