"""Serves the embedded model on this GPU, and compares with the CPU: answers, speed, a killed rank.

    PYTHONPATH=src python tools/gpu/check_serving.py

Exit status 1 if a request is lost, or more than one answer in ten is another one.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

from flexpert import LLM, SamplingParams

STARTS = ["In the beginning", "And it came to pass", "Blessed are", "The LORD said unto Moses"]
PROMPTS = [f"{start} {number}" for start in STARTS for number in range(16)]
GREEDY = SamplingParams(max_tokens=128, temperature=0.0)
ENOUGH = 0.9
"""Share of equal answers: where two tokens are almost equally likely, rounding decides."""


def main() -> None:
    answers: dict[str, list[list[int]]] = {}
    for device in ("cpu", "cuda"):
        began = time.perf_counter()
        with LLM("tiny", engine__device=device, model__dtype="float32") as llm:
            started = time.perf_counter()
            answers[device] = [a.token_ids for a in llm.generate(PROMPTS, GREEDY)]
            again = time.perf_counter()
            llm.generate(PROMPTS, GREEDY)
            rate = len(PROMPTS) * GREEDY.max_tokens / (time.perf_counter() - again)
            print(f"{device}: started in {started - began:.1f} s, {rate:,.0f} tokens/s", flush=True)
            if device == "cuda":
                answers["killed"] = with_a_kill(llm)
    same = sum(a == b for a, b in zip(answers["cpu"], answers["cuda"], strict=True))
    after = sum(a == b for a, b in zip(answers["cuda"], answers["killed"], strict=True))
    print(
        f"float32, of {len(PROMPTS)} answers: {same} are the CPU's, {after} are unmoved by a kill"
    )
    sys.exit(0 if min(same, after) >= ENOUGH * len(PROMPTS) else 1)


def with_a_kill(llm: LLM) -> list[list[int]]:
    """The answers while the rank is killed under them."""
    rank = llm.cluster().ranks[0]
    timer = threading.Timer(0.1, os.kill, (rank.pid, signal.SIGKILL))
    timer.start()
    began = time.perf_counter()
    found = [answer.token_ids for answer in llm.generate(PROMPTS, GREEDY)]
    timer.join()
    now = llm.cluster().ranks[0].pid
    print(f"killed rank {rank.id}: all answered after {time.perf_counter() - began:.1f} s")
    if now == rank.pid:
        sys.exit("the rank was not replaced")
    return found


if __name__ == "__main__":
    main()
