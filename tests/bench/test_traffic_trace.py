"""Traces of requests: Mooncake's and BurstGPT's, and what is none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from flexpert.bench.traffic_trace import RecordedRequest, read_trace
from flexpert.errors import ConfigError

MOONCAKE = """\
{"timestamp": 27000, "input_length": 1100, "output_length": 5, "hash_ids": [7, 8, 9]}
{"timestamp": 30000, "input_length": 600, "output_length": 6, "hash_ids": [7, 3]}
{"timestamp": 30000, "input_length": 40, "output_length": 7}
"""
BURSTGPT = """\
Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
5,ChatGPT,472,18,490,Conversation log
45,ChatGPT,1087,0,1087,Conversation log
118,GPT-4,417,276,693,"API, log"
"""
POOL = range(1000, 1500)

Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(text: str) -> Path:
        file = tmp_path / "trace"
        file.write_text(text)
        return file

    return write


def test_a_trace_of_mooncake_has_milliseconds_and_blocks(write: Write) -> None:
    trace = read_trace(write(MOONCAKE), speedup=2.0)
    assert [request.at for request in trace.requests] == [0.0, 1.5, 1.5]
    assert trace.requests[0] == RecordedRequest(
        at=0.0, input_tokens=1100, output_tokens=5, blocks=(7, 8, 9)
    )


def test_equal_hash_ids_are_equal_blocks_of_512_tokens(write: Write) -> None:
    trace = read_trace(write(MOONCAKE))
    first, second, third = trace.prompts(POOL, seed=1)
    assert [len(first), len(second), len(third)] == [1100, 600, 40]
    assert first[:512] == second[:512]
    assert first[512:600] != second[512:]
    assert trace.prompts(POOL, seed=1)[2] == third
    assert trace.prompts(POOL, seed=2)[2] != third


def test_a_trace_of_burstgpt_has_seconds_and_leaves_out_what_failed(write: Write) -> None:
    trace = read_trace(write(BURSTGPT))
    assert [(r.at, r.input_tokens, r.output_tokens) for r in trace.requests] == [
        (0.0, 472, 18),
        (113.0, 417, 276),
    ]
    assert trace.left_out == 1
    first, second = trace.prompts(POOL, seed=1)
    assert first[:100] != second[:100]


def test_the_first_requests_of_a_trace_suffice(write: Write) -> None:
    assert len(read_trace(write(MOONCAKE), count=2).requests) == 2
    assert len(read_trace(write(MOONCAKE), count=9).requests) == 3


def test_requests_that_the_service_cannot_take_are_left_out(write: Write) -> None:
    trace = read_trace(write(MOONCAKE))
    assert [r.input_tokens for r in trace.fitting(606).requests] == [600, 40]
    assert trace.fitting(606).left_out == 1
    assert trace.fitting(None) == trace
    with pytest.raises(ConfigError, match="every request is longer than the 46 tokens"):
        trace.fitting(46)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is no trace|no request in"),
        ("{}\n", "line 1 is no request of a trace: .*timestamp"),
        (MOONCAKE + "{", "line 4 is no request"),
        (MOONCAKE.replace("1100", "1025", 1).replace("[7, 8, 9]", "[7, 8]"), "line 1 .*2 hash_ids"),
        (MOONCAKE.replace("27000", "-1"), "line 1 .*its time is -0.001 s"),
        (MOONCAKE.replace("600", "0"), "line 2 .*prompt has 0 tokens"),
        (MOONCAKE.replace('output_length": 7', 'output_length": -7'), "line 3 .*has -7 tokens"),
        ("a,b\n1,2\n", "is no trace: neither JSON lines"),
        (BURSTGPT.replace("276", "x"), "line 4 is no request of a trace: .*x"),
        (BURSTGPT.replace("276", "1.5"), "line 4 .*1.5 is no number of tokens"),
        (BURSTGPT.replace("118", "nan"), "line 4 .*its time is nan"),
        (BURSTGPT + "9,ChatGPT\n", "line 5 .*has no 'Request tokens'"),
    ],
)
def test_what_is_no_trace_is_refused_with_its_line(write: Write, text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        read_trace(write(text))
