"""A rank's engine without head and HTTP: how far are its steps from those of `bench decode`?

    PYTHONPATH=src python tools/gpu/engine_rate.py MODEL [--concurrency 64,256] [--input-len 512]

Requests are sampled at temperature 1, so that a random model uses all of its experts. One that ends
makes way for the next, as with clients that ask again at once.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import threading
import time
from collections import defaultdict

from flexpert.config import Config
from flexpert.engine import rank_protocol as msg
from flexpert.engine.rank_engine import RankEngine
from flexpert.engine.request import RequestSequence, SamplingParams
from flexpert.models.source import ModelSource
from flexpert.moe.placement import replan

_LIMIT_S = 300.0


class Clients:
    """Sends `total` requests, `at_once` at a time, and notes when tokens come."""

    def __init__(self, args: argparse.Namespace, vocab: int, seed: int) -> None:
        self.args, self.vocab, self.draw = args, vocab, random.Random(seed)
        self.said = threading.Condition()
        self.prepared = False
        self.asked: dict[str, float] = {}
        self.came: dict[str, list[float]] = defaultdict(list)
        self.left = 0
        self.send = lambda sequences: None

    def begin(self, at_once: int, total: int) -> None:
        self.asked, self.came, self.left = {}, defaultdict(list), total
        self.unsent = total
        self.ask(at_once)

    def ask(self, count: int) -> None:
        """Of those that are still to be sent."""
        count = min(count, self.unsent)
        self.unsent -= count
        sequences = []
        for _ in range(count):
            prompt = self.draw.choices(range(self.vocab), k=self.args.input_len)
            seed = self.draw.randrange(2**31)
            params = SamplingParams(
                max_tokens=self.args.output_len, temperature=self.args.temperature, seed=seed
            )
            name = f"{len(self.asked) + len(sequences)}-{seed}"
            sequences.append(
                RequestSequence(id=name, prompt=prompt, generated=[], params=params, eos=())
            )
        now = time.perf_counter()
        self.asked |= dict.fromkeys((one.id for one in sequences), now)
        if sequences:
            self.send(sequences)

    def __call__(self, report: msg.Report) -> None:
        now = time.perf_counter()
        if isinstance(report, msg.Prepared):
            with self.said:
                self.prepared = True
                self.said.notify()
        elif isinstance(report, msg.Published):
            ended = 0
            for event in report.events:
                self.came[event.id] += [now] * len(event.tokens)
                ended += event.finish is not None
            if ended:
                self.ask(ended)
                with self.said:
                    self.left -= ended
                    self.said.notify()
        elif isinstance(report, msg.Failed | msg.Rejected | msg.Broken | msg.Unable):
            raise SystemExit(f"the rank says: {report}")

    def show(self, at_once: int) -> None:
        times = list(self.came.values())
        began, ended = min(self.asked.values()), max(one[-1] for one in times)
        gaps = [b - a for one in times for a, b in itertools.pairwise(one)]
        first = [self.came[name][0] - at for name, at in self.asked.items()]
        tokens = sum(map(len, times))
        quantiles = statistics.quantiles(gaps, n=100)
        print(
            f"{at_once:4d} at once: {tokens / (ended - began):9.0f} tokens/s, first token "
            f"{statistics.mean(first) * 1e3:7.1f} ms (mean), between tokens "
            f"{statistics.mean(gaps) * 1e3:6.2f} ms (mean), {quantiles[49] * 1e3:6.2f} (p50), "
            f"{quantiles[98] * 1e3:6.1f} (p99)",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--concurrency", default="1,64,256")
    parser.add_argument("--rounds", type=int, default=3, help="requests of each client")
    parser.add_argument("--input-len", type=int, default=512)
    parser.add_argument("--output-len", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--max-tokens-per-step", type=int)
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    engine = {"device": args.device}
    if args.max_tokens_per_step:
        engine["max_tokens_per_step"] = args.max_tokens_per_step
    config = Config.model_validate({"model": {"model": args.model}, "engine": engine}).engine
    source = ModelSource.open(args.model)
    info = source.info
    clients = Clients(args, info.vocab, seed=time.time_ns())
    rank = RankEngine(0, source, config, capacity=1, exchange_timeout_s=_LIMIT_S, report=clients)
    clients.send = lambda sequences: rank.submit(msg.Admit(sequences))
    running = threading.Thread(target=rank.run, daemon=True)
    running.start()
    placement = replan(None, [0], experts=info.experts, layers=info.moe_layers)
    rank.submit(msg.Prepare(1, {0: rank.buffer.address}, placement))
    with clients.said:
        clients.said.wait_for(lambda: clients.prepared, _LIMIT_S)
    rank.submit(msg.Commit(1))
    for at_once in map(int, args.concurrency.split(",")):
        for counted in (False, True):
            with clients.said:
                clients.begin(at_once, at_once * (args.rounds if counted else 1))
                clients.said.wait_for(lambda: clients.left == 0, _LIMIT_S)
        clients.show(at_once)
    rank.submit(msg.Stop())
    running.join(_LIMIT_S)


if __name__ == "__main__":
    main()
