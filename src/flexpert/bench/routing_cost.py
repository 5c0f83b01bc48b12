"""What it costs the head to choose a rank by prefix: processor time, without any process."""

from __future__ import annotations

import random
import time

from flexpert.cluster.request_routing import RankCaches, Router
from flexpert.engine.block_keys import prompt_keys
from flexpert.engine.request import BlockChanges, RequestSequence, SamplingParams

_BLOCK_SIZE = 16
_RUNNING = 64
_REQUESTS = 64
_REPEATS = 5


def choice_us(tokens: int, ranks: int) -> float:
    """Microseconds for a prompt that one of the ranks has, from its tokens to the end of its being
    expected there; the best of some repeats."""
    draw = random.Random(0)
    prompts = [[draw.randrange(2**17) for _ in range(tokens)] for _ in range(_REQUESTS)]
    keys = [key for prompt in prompts for key in prompt_keys(prompt, _BLOCK_SIZE, 1, "").keys]
    router = Router("prefix")
    router.set_caches(RankCaches(len(keys) + 1, _BLOCK_SIZE, _RUNNING, prefix_cache=True))
    router.learn(0, BlockChanges(b"".join(key.to_bytes(8, "little") for key in keys)))
    counts = dict.fromkeys(range(ranks), 0)
    params = SamplingParams(max_tokens=1)
    best = float("inf")
    for repeat in range(_REPEATS):
        sequences = [
            RequestSequence(id=f"{repeat}.{n}", prompt=prompt, generated=[], params=params, eos=())
            for n, prompt in enumerate(prompts)
        ]
        began = time.process_time()
        for sequence in sequences:
            router.placed(sequence, router.choose(sequence, counts))
            router.closed(sequence.id)
        best = min(best, time.process_time() - began)
    return best / _REQUESTS * 1e6
