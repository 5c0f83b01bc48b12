"""`flexpert bench prefix`: pairs of halves, the same requests for both routings, and its table."""

from __future__ import annotations

from io import StringIO

from rich.console import Console

from flexpert.bench.load import ClientAnswer, HttpReply, Target, parse_completion
from flexpert.bench.machine import this_machine
from flexpert.bench.prefix import (
    OfferedPrefixes,
    PrefixCase,
    PrefixHalf,
    PrefixPlan,
    PrefixReport,
    gain_of,
)
from flexpert.bench.prefix_report import prefix_text
from flexpert.bench.statistics import figures

PLAN = PrefixPlan(
    rounds=1,
    groups=3,
    prompts=4,
    conversations=2,
    turns=2,
    prefix_tokens=20,
    own_tokens=5,
    output_tokens=1,
    concurrency=2,
    ranks=2,
    seed=0,
)


def half(seconds: float, first_s: float) -> PrefixHalf:
    answers = [ClientAnswer(0.0, times=[first_s], ended=seconds) for _ in range(10)]
    return PrefixHalf(figures=figures(answers), cached=0.5)


def test_gains_are_medians_of_pairs_that_were_measured_one_after_the_other() -> None:
    gain = gain_of(
        {
            "fewest": [half(2.0, 1.0), half(4.0, 2.0), half(8.0, 4.0)],
            "prefix": [half(1.0, 0.5), half(1.0, 0.2), half(2.0, 1.0)],
        }
    )
    assert gain.requests_per_s == 4.0
    assert gain.first_token == 0.25
    halves = {"fewest": [half(2.0, 1.0)], "prefix": [half(1.0, 0.5)]}
    case = PrefixCase(workload="groups", ranks=4, halves=halves, gain=gain_of(halves))
    report = PrefixReport(
        command="", machine=this_machine(), flags=[], cases=[case], choice_us={9: 1.0}
    )
    text = StringIO()
    Console(file=text, width=120).print(prefix_text(report))
    assert "prefix / fewest" in text.getvalue()
    assert report.failed == 0


def test_both_services_are_asked_the_same_and_groups_share_what_is_long() -> None:
    target = Target("127.0.0.1", 1)
    first, second = (OfferedPrefixes(PLAN, range(100), "seed", target) for _ in range(2))
    assert first.prompts == second.prompts
    assert len(first.prompts) == 12
    assert len({tuple(prompt[:20]) for prompt in first.prompts}) == 3
    assert len({tuple(prompt) for prompt in first.prompts}) == 12
    assert first.prompts != OfferedPrefixes(PLAN, range(100), "other", target).prompts


def test_an_answer_tells_its_token_ids_and_what_was_cached() -> None:
    events = (
        b'data: {"choices": [{"text": "", "token_ids": [7]}]}\n\n',
        b'data: {"choices": [{"text": "a", "token_ids": [8], "finish_reason": "length"}]}\n\n',
        b'data: {"choices": [], "usage": {"prompt_tokens": 40, "completion_tokens": 2,'
        b' "prompt_tokens_details": {"cached_tokens": 32}}}\n\n',
        b"data: [DONE]\n\n",
    )
    start = 3.0
    reply = HttpReply(200, [(start + number, event) for number, event in enumerate(events)])
    answer = parse_completion(start, reply)
    assert answer.whole
    assert (answer.token_ids, answer.prompt_tokens, answer.cached_tokens) == ([7, 8], 40, 32)
    assert answer.times == [start, start + 1]
