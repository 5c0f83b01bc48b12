"""Serves the embedded model on this GPU, and compares with the CPU: alone, elastic, and killed.

    PYTHONPATH=src python tools/gpu/check_serving.py            # one rank; two, four, two of them
    PYTHONPATH=src python tools/gpu/check_serving.py --kill     # two, of which one is killed

Several ranks on one GPU run at the same time under NVIDIA's MPS only; without it they take turns,
and a killed rank takes nobody down: so start MPS for the first and not for the second.

Exit status 1 if a request is lost, more than one answer in ten is another one, a rank captured a
graph again, or a killed rank did not come back.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable

from flexpert import LLM, SamplingParams
from flexpert.cluster.views import OperationView

STARTS = ["In the beginning", "And it came to pass", "Blessed are", "The LORD said unto Moses"]
PROMPTS = [f"{start} {number}" for start in STARTS for number in range(16)]
GREEDY = SamplingParams(max_tokens=128, temperature=0.0)
ENOUGH = 0.9
"""Share of equal answers: where two tokens are almost equally likely, rounding decides."""

Answers = list[list[int]]


def main() -> None:
    good = True
    expected = served("cpu")[0]
    if "--kill" in sys.argv[1:]:
        good &= elastic(expected, [killed, killed])
    else:
        alone, rate = served("cuda")
        print(f"one rank: {rate:,.0f} tokens/s, {share(alone, expected)}")
        good &= same(alone, expected)
        good &= elastic(expected, [scaled(4), scaled(2)])
    sys.exit(0 if good else 1)


def served(device: str) -> tuple[Answers, float]:
    """The answers of one rank, and tokens a second of a second round."""
    began = time.perf_counter()
    with LLM("tiny", engine__device=device, model__dtype="float32") as llm:
        print(f"{device}: started in {time.perf_counter() - began:.1f} s", flush=True)
        answers = generate(llm)
        again = time.perf_counter()
        generate(llm)
        return answers, len(PROMPTS) * (GREEDY.max_tokens or 0) / (time.perf_counter() - again)


def elastic(expected: Answers, events: list[Callable[[LLM], str]]) -> bool:
    """Two ranks of at most four; each event happens under load."""
    good = True
    with LLM("tiny", ranks=2, max_ranks=4, engine__device="cuda", model__dtype="float32") as llm:
        undisturbed = generate(llm)
        began = time.perf_counter()
        generate(llm)
        rate = len(PROMPTS) * (GREEDY.max_tokens or 0) / (time.perf_counter() - began)
        print(f"two ranks: {rate:,.0f} tokens/s, {share(undisturbed, expected)}", flush=True)
        good &= same(undisturbed, expected)
        for event in events:
            before = {rank.pid: rank.graphs for rank in llm.cluster().ranks}
            happened = ""

            def happen(event: Callable[[LLM], str] = event) -> None:
                nonlocal happened
                happened = event(llm)

            timer = threading.Timer(0.3, happen)
            timer.start()
            began = time.perf_counter()
            answers: Answers = []
            while timer.is_alive():  # the load goes on until it has happened
                answers += generate(llm)
            took = time.perf_counter() - began
            ranks = llm.cluster().ranks
            again = [r.id for r in ranks if r.graphs != before.get(r.pid, r.graphs)]
            print(
                f"{happened or 'it did not happen'}: {len(answers)} requests in {took:.1f} s, "
                f"{share(answers, expected)}; "
                f"ranks {[r.id for r in ranks]}, captured again: {again or 'none'}",
                flush=True,
            )
            good &= bool(happened) and same(answers, expected) and not again
            good &= all(rank.graphs > 0 for rank in ranks)
    return good


def scaled(ranks: int) -> Callable[[LLM], str]:
    def scale(llm: LLM) -> str:
        done: OperationView = llm.scale(ranks)
        return (
            f"scaled to {ranks} ({sum(done.phases.values()):.1f} s, pause {done.pause_ms} ms, "
            f"{done.copied_experts} of {done.moved_experts} experts from peers, "
            f"{done.moved_with_kv} of {done.moved_requests} requests moved with KV)"
        )

    return scale


def killed(llm: LLM) -> str:
    victim = llm.cluster().ranks[-1]
    os.kill(victim.pid, signal.SIGKILL)
    began = time.perf_counter()
    while (
        victim.pid in {rank.pid for rank in llm.cluster().ranks}
        or any(rank.state != "active" for rank in llm.cluster().ranks)
        or len(llm.cluster().ranks) < 2
    ):
        if time.perf_counter() - began > 120:
            raise TimeoutError(f"rank {victim.id} was killed, and was not replaced in 120 s")
        time.sleep(0.01)
    return f"killed rank {victim.id}, all are back after {time.perf_counter() - began:.1f} s"


def generate(llm: LLM) -> Answers:
    return [answer.token_ids for answer in llm.generate(PROMPTS, GREEDY)]


def same(found: Answers, expected: Answers) -> bool:
    return _equal(found, expected) >= ENOUGH * len(found)


def share(found: Answers, expected: Answers) -> str:
    return f"{_equal(found, expected)} of {len(found)} answers are the CPU's"


def _equal(found: Answers, expected: Answers) -> int:
    """Of some rounds of all prompts."""
    rounds = expected * (len(found) // len(expected))
    return sum(a == b for a, b in zip(found, rounds, strict=True))


if __name__ == "__main__":
    main()
