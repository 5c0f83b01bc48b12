"""The same prompts through transformers alone, in a process of its own.

    python -m flexpert.bench.reference < job.json > result.json

Both ways know all prompts from the start and answer greedily with the desired number of tokens
each. A first, short call warms up; reading the checkpoint is not counted.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import msgspec

Method = Literal["generate_batch", "generate"]


class ReferenceJob(msgspec.Struct, kw_only=True):
    """prompts: token ids. output_tokens: of each answer. dtype: as in the settings.

    concurrency: requests that generate_batch may run at once; None: all.
    """

    model: str
    revision: str | None = None
    dtype: str = "auto"
    threads: int
    method: Method
    prompts: list[list[int]]
    output_tokens: list[int]
    concurrency: int | None = None
    warmup: int = 2


class ReferenceResult(msgspec.Struct, kw_only=True):
    """tokens: those that were asked for; a static batch makes more if the lengths differ.

    answers: the token ids of each.
    """

    seconds: float
    tokens: int
    attention: str
    answers: list[list[int]]


def main() -> None:
    job = msgspec.json.decode(sys.stdin.buffer.read(), type=ReferenceJob)
    out, sys.stdout = sys.stdout, sys.stderr  # libraries print; the result stands alone
    result = run(job)
    out.buffer.write(msgspec.json.encode(result))
    out.flush()


def run(job: ReferenceJob) -> ReferenceResult:
    """Load, warm up, measure."""
    import torch
    import transformers

    torch.set_num_threads(job.threads)
    torch.set_grad_enabled(False)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        model_path(job.model), revision=job.revision, dtype=job.dtype
    )
    model.eval()
    answer: Callable[[Any, list[list[int]], list[int]], list[list[int]]] = _static
    if job.method == "generate_batch":
        answer = partial(_continuous, concurrency=job.concurrency)
    warm = min(job.warmup, len(job.prompts))
    if warm:
        answer(model, job.prompts[:warm], [min(8, n) for n in job.output_tokens[:warm]])
    began = time.perf_counter()
    answers = answer(model, job.prompts, job.output_tokens)
    seconds = time.perf_counter() - began
    answers = [ids[:desired] for ids, desired in zip(answers, job.output_tokens, strict=True)]
    return ReferenceResult(
        seconds=seconds,
        tokens=sum(map(len, answers)),
        attention=model.config._attn_implementation,
        answers=answers,
    )


def model_path(model: str) -> str:
    """A directory or a hub id."""
    if model == "tiny":
        return str(Path(__file__).parents[1] / "models" / "tiny")
    return model


def _continuous(
    model: Any, prompts: list[list[int]], desired: list[int], *, concurrency: int | None
) -> list[list[int]]:
    from transformers import ContinuousBatchingConfig, GenerationConfig

    # no end token: every answer has its full length. The default KV page count is read off a
    # GPU's memory; here, as many as the work needs, all requests running at once.
    page = 256
    pages = sum(-(-(len(p) + n) // page) for p, n in zip(prompts, desired, strict=True)) + 8
    config = GenerationConfig(do_sample=False, eos_token_id=-1, max_new_tokens=max(desired))
    batching = ContinuousBatchingConfig(
        page_size=page,
        num_blocks=pages,
        max_batch_tokens=max(256, len(prompts)),
        max_requests_per_batch=concurrency,
    )
    results = model.generate_batch(
        prompts, generation_config=config, continuous_batching_config=batching
    )
    ordered = sorted(results.values(), key=lambda r: int(r.request_id.rsplit("_", 1)[-1]))
    if len(ordered) != len(prompts):
        raise SystemExit(f"generate_batch answered {len(ordered)} of {len(prompts)} prompts")
    return [list(result.generated_tokens) for result in ordered]


def _static(model: Any, prompts: list[list[int]], desired: list[int]) -> list[list[int]]:
    import torch

    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    output = model.generate(
        input_ids=ids,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=max(desired),
        min_new_tokens=max(desired),
        pad_token_id=0,
    )
    answers: list[list[int]] = output[:, longest:].tolist()
    return answers


if __name__ == "__main__":
    main()
