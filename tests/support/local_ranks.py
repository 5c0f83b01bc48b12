"""Ranks of one model in the test's own process: the real exchange and placement, no engine.

`greedy_on(source, ranks, prompts, count)` says what they generate.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from flexpert.comm import BufferSpec
from flexpert.kernels.cpu.expert_products import LayerExperts
from flexpert.models.model_runner import ModelRunner
from flexpert.models.source import ModelSource
from flexpert.moe.moe_layers import LayerState
from flexpert.moe.placement import replan
from flexpert.moe.runtime import MoERuntime, expert_tables
from support.checkpoints import SLOTS, Sequences
from support.comm_local import Local

_BLOCK = 8
_CHUNK = 13  # tokens of a prompt in one step


def greedy_on(
    source: ModelSource, ranks: int, prompts: Sequence[Sequence[int]], count: int
) -> list[list[int]]:
    """The next `count` tokens of each prompt; prompt i runs on rank i modulo `ranks`, in chunks.

    All ranks walk all steps together, those without a prompt without tokens.
    """
    info = source.info
    ids = range(ranks)
    spec = BufferSpec(
        capacity=ranks,
        max_tokens=max(1, sum(map(len, prompts))),
        hidden=info.hidden,
        topk=info.topk,
        dtype=info.dtype,
    )
    placement = replan(None, ids, experts=info.experts, layers=info.moe_layers)
    with Local() as local:
        local.start(spec, ids)
        runners = {}
        for rank in ids:
            moe = MoERuntime(local.buffers[rank], reduce="home")
            layers = []
            held = placement.held_by(rank)
            for layer, table in enumerate(expert_tables(placement, rank)):
                weights = source.load_experts(layer, held[layer])
                own = [weights[expert] for expert in held[layer]]
                layers.append(LayerState(table, LayerExperts(own, deterministic=False)))
            moe.install(moe.stage(layers))
            runner = ModelRunner.load(
                source,
                moe=moe,
                kv_blocks=64,
                kv_block_size=_BLOCK,
                deterministic=False,
                state_slots=SLOTS,
            )
            runners[rank] = Sequences(runner, _BLOCK, seed=rank)
        local.activate(ids)

        answers: list[list[int]] = [[] for _ in prompts]
        left = [list(prompt) for prompt in prompts]

        def step(rank: int) -> None:
            torch.set_num_threads(1)
            own = [i for i in range(len(prompts)) if i % ranks == rank]
            work = {i: left[i][:_CHUNK] or answers[i][-1:] for i in own}
            if not work:
                runners[rank].runner.forward_idle()
                return
            for i, logits in runners[rank].step(work).items():
                del left[i][:_CHUNK]
                if not left[i]:
                    answers[i].append(int(logits[-1].argmax()))

        while min(map(len, answers)) < count:
            local.each(ids, lambda buffer: step(buffer.rank))
    return [answer[:count] for answer in answers]
