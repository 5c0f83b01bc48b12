"""llguidance against xgrammar: schemas compiled, masks made, schemas refused; on this machine.

    python tools/structured_engines.py [TOKENIZER_DIRECTORY …]

The engines that are not installed are left out. Answers are random walks through the masks: each
takes a token that is allowed at random, at most 200 tokens, so that both see the same states only
in kind. Times are of one thread, a mask at a time; a step of sixteen sequences makes sixteen.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from support.api_schemas import api_schemas

TINY = str(Path(__file__).parents[1] / "src" / "flexpert" / "models" / "tiny")
STEPS = 200
WALKS = 100


class LLGuidance:
    """Masks by llguidance."""

    def __init__(self, tokenizer: Any) -> None:
        from llguidance import LLMatcher
        from llguidance.hf import from_tokenizer

        self._matcher = LLMatcher
        self._tokens = from_tokenizer(tokenizer)
        self.eos: int = tokenizer.eos_token_id

    def compiled(self, schema: str) -> Any:
        matcher = self._matcher(self._tokens, self._matcher.grammar_from_json_schema(schema))
        if matcher.is_error():
            raise ValueError(matcher.get_error())
        return matcher

    def matcher(self, compiled: Any) -> Any:
        return compiled.deep_copy()

    def fill(self, matcher: Any, mask: np.ndarray) -> None:
        matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)

    def accept(self, matcher: Any, token: int) -> bool:
        return bool(matcher.consume_token(token))


class XGrammar:
    """Masks by xgrammar."""

    def __init__(self, tokenizer: Any) -> None:
        import xgrammar

        self._xgrammar = xgrammar
        info = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=len(tokenizer))
        self._compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)
        self.eos: int = tokenizer.eos_token_id

    def compiled(self, schema: str) -> Any:
        return self._compiler.compile_json_schema(schema)

    def matcher(self, compiled: Any) -> Any:
        return self._xgrammar.GrammarMatcher(compiled)

    def fill(self, matcher: Any, mask: np.ndarray) -> None:
        import torch

        matcher.fill_next_token_bitmask(torch.from_numpy(mask).unsqueeze(0))

    def accept(self, matcher: Any, token: int) -> bool:
        return bool(matcher.accept_token(token))


def timed(action: Callable[[], Any], into: list[float]) -> Any:
    began = time.perf_counter()
    result = action()
    into.append(time.perf_counter() - began)
    return result


def measure(engine: Any, vocabulary: int) -> dict[str, str]:
    rng = random.Random(0)
    compile_s: list[float] = []
    mask_s: list[float] = []
    accept_s: list[float] = []
    copy_s: list[float] = []
    refused = 0
    mask = np.zeros(-(-vocabulary // 32), dtype=np.int32)
    for number, one in enumerate(api_schemas()):
        schema = json.dumps(one.schema)
        try:
            compiled = timed(lambda schema=schema: engine.compiled(schema), compile_s)
        except Exception:  # noqa: BLE001 - each engine has its own
            refused += 1
            continue
        if number >= WALKS:
            continue
        matcher = timed(lambda compiled=compiled: engine.matcher(compiled), copy_s)
        for _ in range(STEPS):
            timed(lambda matcher=matcher: engine.fill(matcher, mask), mask_s)
            allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
            token = int(rng.choice(allowed))
            if token == engine.eos:
                break
            timed(lambda matcher=matcher, token=token: engine.accept(matcher, token), accept_s)
    return {
        "compile": spread(compile_s, 1e3, "ms"),
        "matcher": spread(copy_s, 1e6, "µs"),
        "mask": spread(mask_s, 1e6, "µs"),
        "accept": spread(accept_s, 1e6, "µs"),
        "refused": str(refused),
    }


def spread(seconds: list[float], scale: float, unit: str) -> str:
    ordered = sorted(seconds)
    p99 = ordered[int(len(ordered) * 0.99)] * scale
    middle, mean = statistics.median(ordered) * scale, statistics.mean(ordered) * scale
    return f"median {middle:.2f}, mean {mean:.2f}, p99 {p99:.2f} {unit} ({len(ordered)})"


def main() -> None:
    for path in (TINY, *sys.argv[1:]):
        tokenizer = AutoTokenizer.from_pretrained(path)
        for kind in (LLGuidance, XGrammar):
            try:
                made: list[float] = []
                engine = timed(lambda kind=kind, tokenizer=tokenizer: kind(tokenizer), made)
            except ImportError as error:
                print(f"{kind.__name__}: left out, {error}")
                continue
            print(f"{kind.__name__}, {len(tokenizer)} tokens, tokenizer {made[0] * 1e3:.0f} ms")
            for name, told in measure(engine, len(tokenizer)).items():
                print(f"  {name}: {told}")


if __name__ == "__main__":
    main()
