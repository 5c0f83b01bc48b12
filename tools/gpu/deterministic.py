"""Does `--deterministic` keep its promise on these GPUs, and what does it cost?

    PYTHONPATH=src python tools/gpu/deterministic.py MODEL [--ranks 1,2] [--changes 4] [--kills 2]

Answers of 64 clients at once, on each number of ranks and through changes and kills, are compared
bit for bit (tokens and log probabilities) with those of batch 1 on one rank. Then tokens/s with and
without the mode. A model: tools/gpu/random_model.py. Exit status 1: an answer differs.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from flexpert import LLM, SamplingParams
from flexpert.frontend.outputs import Completion
from flexpert.models.source import ModelSource

BEGAN = time.perf_counter()
Asked = list[tuple[list[int], SamplingParams]]


def say(what: str) -> None:
    print(f"[{time.perf_counter() - BEGAN:6.1f} s] {what}", flush=True)


@dataclass
class Report:
    """What is known so far. rates: (ranks, deterministic) → tokens/s of each round."""

    lines: list[str] = field(default_factory=list)
    rates: dict[tuple[int, bool], list[float]] = field(default_factory=dict)
    wrong: int = 0

    def compare(self, name: str, found: list[Completion], expected: list[Completion]) -> None:
        different = [
            client
            for client, pair in enumerate(zip(found, expected, strict=True))
            if bits(pair[0]) != bits(pair[1])
        ]
        self.wrong += len(different)
        self.lines.append(f"{name:48} {len(found) - len(different):5d} of {len(found)} equal")
        say(self.lines[-1])
        for client in different[:4]:
            say(f"  client {client}: {where(found[client], expected[client])}")

    def show(self) -> None:
        print("\n".join(["", *self.lines]))
        for ranks in sorted({ranks for ranks, _ in self.rates}):
            plain, fixed = (self.rates.get((ranks, way)) for way in (False, True))
            text = f"{ranks} rank(s), tokens/s (median of rounds)"
            for name, rates in (("default", plain), ("deterministic", fixed)):
                if rates:
                    text += f", {name} {statistics.median(rates):.0f}"
                    text += f" ({min(rates):.0f}-{max(rates):.0f})"
            if plain and fixed:
                text += f", ratio {statistics.median(fixed) / statistics.median(plain):.3f}"
            print(text)
        sys.stdout.flush()


def bits(answer: Completion) -> tuple[Any, ...]:
    """All that must be equal; floats are compared as they are, and come from float64."""
    return answer.token_ids, answer.outputs[0].logprobs, answer.prompt_logprobs


def where(found: Completion, expected: Completion) -> str:
    """Where two answers part."""
    ours, theirs = found.outputs[0], expected.outputs[0]
    for place, (a, b) in enumerate(itertools.zip_longest(ours.token_ids, theirs.token_ids)):
        if a != b:
            return f"token {place} is {a}, not {b}"
        if ours.logprobs and theirs.logprobs and ours.logprobs[place] != theirs.logprobs[place]:
            a, b = ours.logprobs[place].chosen, theirs.logprobs[place].chosen
            return f"the log probability of token {place} is {a!r}, not {b!r}"
    return "the log probabilities of the prompt differ"


def requests(args: argparse.Namespace, vocab: int) -> Asked:
    """Half of the prompts begin alike, a third asks for the likeliest tokens."""
    draw = random.Random(args.seed)
    shared = draw.choices(range(vocab), k=args.input_len // 2)
    asked: Asked = []
    for client in range(args.clients):
        length = draw.randint(max(1, args.input_len // 4), args.input_len)
        prompt = draw.choices(range(vocab), k=length)
        if client % 2:
            prompt = (shared + prompt)[: args.input_len]
        more: dict[str, Any] = {}
        if client % 4 == 0:
            more["logprobs"] = 2
        if client % 8 == 3:
            more |= {"frequency_penalty": 0.5, "top_p": 0.9}
        if client % 16 == 5:
            more["prompt_logprobs"] = 1
        temperature = 0.0 if client % 3 == 0 else 1.0
        params = SamplingParams(
            max_tokens=args.output_len,
            temperature=temperature,
            seed=client,
            ignore_eos=True,
            **more,
        )
        asked.append((prompt, params))
    return asked


def plain(asked: Asked) -> Asked:
    """The same prompts, drawn without anything else: for rates."""
    return [
        (
            prompt,
            SamplingParams(max_tokens=p.max_tokens, temperature=1.0, seed=p.seed, ignore_eos=True),
        )
        for prompt, p in asked
    ]


@contextmanager
def opened(
    args: argparse.Namespace, ranks: int, *, deterministic: bool, **more: Any
) -> Iterator[LLM]:
    name = f"{ranks} rank(s), {'deterministic' if deterministic else 'default'}"
    say(f"starting {name} {more or ''}")
    settings = {**args.settings, **more}
    with LLM(
        args.model, ranks=ranks, max_ranks=ranks, deterministic=deterministic,
        engine__device=args.device, **settings,
    ) as llm:  # fmt: skip
        say(f"{name} is up")
        yield llm


def answers(llm: LLM, asked: Asked) -> list[Completion]:
    return llm.generate([prompt for prompt, _ in asked], [params for _, params in asked])


def rate(llm: LLM, asked: Asked, rounds: int, into: list[float]) -> None:
    """Tokens/s of each round but the first."""
    asked = plain(asked)
    for number in range(rounds + 1):
        began = time.perf_counter()
        tokens = sum(len(answer.token_ids) for answer in answers(llm, asked))
        speed = tokens / (time.perf_counter() - began)
        say(f"round {number}: {speed:.0f} tokens/s{'' if number else ' (not counted)'}")
        if number:
            into.append(speed)


def disturbed(
    llm: LLM,
    asked: Asked,
    name: str,
    expected: list[Completion],
    report: Report,
    disturb: Callable[[], object],
) -> None:
    """Compare answers that are computed while something happens, in rounds until it has."""
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(answers, llm, asked)
        while not found.done() and not any(rank.running for rank in llm.cluster().ranks):
            time.sleep(0.005)
        happens = threading.Thread(target=disturb)
        happens.start()
        rounds = [found.result()]
        while happens.is_alive():
            rounds.append(answers(llm, asked))
    report.compare(name, list(itertools.chain(*rounds)), expected * len(rounds))


def kill_one(llm: LLM, ranks: int, limit_s: float) -> None:
    """And wait until as many ranks serve again."""
    victim = llm.cluster().ranks[0]
    say(f"killing rank {victim.id}")
    os.kill(victim.pid, signal.SIGKILL)
    until = time.perf_counter() + limit_s
    while (
        victim.pid in {rank.pid for rank in llm.cluster().ranks}
        or [rank.state for rank in llm.cluster().ranks] != ["active"] * ranks
    ):
        if time.perf_counter() > until:
            say(f"after {limit_s} s there are not {ranks} ranks again")
            return
        time.sleep(0.02)
    say("all ranks are back")


def measure(args: argparse.Namespace, report: Report) -> None:
    one = {"engine__max_running": 1, "engine__prefix_cache": False}
    counts = [int(count) for count in args.ranks.split(",")]
    asked = requests(args, args.vocab or ModelSource.open(args.model).info.vocab)
    with opened(args, 1, deterministic=True, **one) as llm:
        expected = answers(llm, asked)
        say(f"batch 1: {len(expected)} answers")
    for ranks in counts:
        with opened(args, ranks, deterministic=True) as llm:
            report.compare(f"{ranks} rank(s), all at once", answers(llm, asked), expected)
            report.compare("the same, prompts out of the cache", answers(llm, asked), expected)
            if args.rounds:
                rate(llm, asked, args.rounds, report.rates.setdefault((ranks, True), []))
            for number in range(args.changes if ranks > 1 else 0):
                to = max(1, ranks // 2) if number % 2 == 0 else ranks
                change = f"while {'leaving' if to < ranks else 'joining'}: to {to} rank(s)"
                disturbed(llm, asked, change, expected, report, lambda to=to: llm.scale(to))
            if ranks > 1 and args.changes % 2:
                llm.scale(ranks)
            for _ in range(args.kills if ranks > 1 else 0):
                disturbed(
                    llm, asked, "a rank is killed", expected, report,
                    lambda ranks=ranks: kill_one(llm, ranks, args.wait),
                )  # fmt: skip
        if args.rounds:
            with opened(args, ranks, deterministic=False) as llm:
                rate(llm, asked, args.rounds, report.rates.setdefault((ranks, False), []))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--ranks", default="1,2", help="numbers of ranks, one after the other")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--input-len", type=int, default=300, help="tokens of the longest prompt")
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--changes", type=int, default=4, help="leaves and joins in turn")
    parser.add_argument("--kills", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5, help="counted for tokens/s; 0: none")
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--vocab", type=int, help="tokens of prompts are below; default: the model's"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=560.0, help="seconds for everything")
    parser.add_argument("--wait", type=float, default=60.0, help="seconds for a rank to come back")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a setting: engine.kv_memory=8GiB",
    )
    args = parser.parse_args()
    args.settings = dict(one.split("=", 1) for one in args.set)
    report = Report()

    def give_up() -> None:
        say(f"{args.limit} s are over")
        report.show()
        os._exit(2)

    timer = threading.Timer(args.limit, give_up)
    timer.daemon = True
    timer.start()
    try:
        measure(args, report)
    finally:
        report.show()
    return 1 if report.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
