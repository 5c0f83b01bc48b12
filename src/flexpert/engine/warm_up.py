"""A rank computes alone before it serves: its first step with others pays for no first calls."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from flexpert.comm import Buffer, CommError
from flexpert.engine.device_profile import DeviceProfile, WarmUpBatch
from flexpert.engine.engine_limits import EngineLimits
from flexpert.engine.epoch import PreparedEpoch
from flexpert.engine.request import RequestSequence, SamplingParams
from flexpert.engine.sampler import TokenSampler
from flexpert.engine.sequence import SampleState
from flexpert.engine.stopwatch import Stopwatch
from flexpert.kernels.step_shapes import FEW_TOKENS
from flexpert.models.batch import DraftRows, ForwardBatch
from flexpert.models.model_runner import ModelRunner
from flexpert.models.state_runs import NO_STATE, StateRuns
from flexpert.models.step_graphs import GraphShape
from flexpert.moe.moe_layers import ElasticMoELayers, LayerState
from flexpert.moe.runtime import warmup_tables


class WarmUp:
    """What is computed before the first epoch; nothing serves yet, so that any KV block will do."""

    def __init__(
        self,
        runner: ModelRunner,
        moe: ElasticMoELayers,
        buffer: Buffer,
        limits: EngineLimits,
        profile: DeviceProfile,
        sampler: TokenSampler,
    ) -> None:
        self._runner = runner
        self._moe = moe
        self._buffer = buffer
        self._limits = limits
        self._profile = profile
        self._sampler = sampler

    def run(self, prepared: PreparedEpoch) -> None:
        """Compute with the experts of a prepared epoch that are here.

        Raises: CommError, OSError, RuntimeError
        """
        tables = warmup_tables(prepared.plan.placement, self._buffer.rank)
        layers = [
            LayerState(table, layer.experts)
            for table, layer in zip(tables, prepared.layers, strict=True)
        ]
        self._moe.install(self._moe.stage(layers))
        if all(table.slots for table in tables):
            self._compute()
        self._moe.install(self._moe.stage([]))

    def capture(self, watch: Stopwatch) -> str:
        """Capture steps, and compile all else; no expert needs to be there.

        Returns why this rank can compute nothing, or "".
        """
        try:
            watch.lap("before")
            self._compute()
            self._sample()
            watch.lap("first steps")
            if self._buffer.capabilities.graph_capture:
                running = min(len(self._runner.sampled), self._most)
                shapes = self._profile.graph_shapes(running, self._most)
                if self._profile.config.speculate is not None:
                    shapes = with_shared(shapes)
                self._runner.capture(shapes, self._limits.longest_table)
                watch.lap("graphs")
        except (CommError, RuntimeError) as error:
            return f"{type(error).__name__}: {error}"
        return ""

    def _compute(self) -> None:
        """One of each shape of products, which would otherwise be compiled while serving."""
        limits = self._limits
        context = min(limits.max_model_len, limits.blocks * limits.block_size)
        for batch in self._profile.warm_up_batches(self._most, context):
            if not batch.experts and self._runner.is_recorded(batch.rows):
                continue
            shape = _batch(batch, limits, limits.max_running)
            with contextlib.nullcontext() if batch.experts else self._runner.stand_in_experts():
                if self._runner.device_drafts is not None:
                    most = self._runner.device_drafts.width - 1
                    shape.drafts = _draft_rows(shape, most)
                    self._runner.forward(shape)
                    self._runner.propose([most] * batch.sequences, most)
                    continue
                self._runner.forward(shape)
                if self._runner.drafts is not None:
                    self._runner.draft(shape)

    def _sample(self) -> None:
        """Once in each of the ways that a device has kernels of its own for."""
        ways: list[dict[str, Any]] = [
            {"temperature": 0.0},
            {"temperature": 1.0},
            {"temperature": 1.0, "top_k": 20, "top_p": 0.8, "min_p": 0.01},
            {"temperature": 1.0, "top_p": 0.8},
            {"temperature": 0.0, "repetition_penalty": 1.1, "logit_bias": {0: 1.0}},
            {"temperature": 0.0, "logprobs": 5, "allowed_token_ids": [0, 1]},
        ]
        logits = self._runner.forward(_batch(WarmUpBatch(1), self._limits, 1))
        for way in ways:
            params = SamplingParams(seed=0, max_tokens=1, **way)
            state = SampleState(
                RequestSequence(id="", prompt=[0], generated=[], params=params, eos=())
            )
            self._sampler.start(logits, [state]).finish()

    @property
    def _most(self) -> int:
        """Tokens of the largest step."""
        limits = self._limits
        return min(limits.max_tokens_per_step, limits.blocks * limits.block_size)


def with_shared(shapes: Sequence[GraphShape]) -> list[GraphShape]:
    """Those that decode also for proposed tokens, where these are computed by other kernels."""
    found = [shape for shape in shapes if not shape.decodes or shape.tokens <= FEW_TOKENS]
    return found + [replace(shape, shares=True) for shape in shapes if shape.decodes]


def _batch(shape: WarmUpBatch, limits: EngineLimits, samples: int) -> ForwardBatch:
    """In the first blocks and slots, which nobody uses before an epoch; what several sequences have
    in one of them is nothing anybody reads."""
    last = shape.rows - shape.sequences + 1
    context = max(last, shape.context)
    begins = torch.arange(shape.sequences + 1, dtype=torch.int32)
    begins[-1] = shape.rows
    lengths = torch.ones(shape.sequences, dtype=torch.int32)
    lengths[-1] = context
    positions = torch.zeros(shape.rows, dtype=torch.int64)
    positions[-last:] = torch.arange(context - last, context)
    blocks = torch.arange(-(-context // limits.block_size), dtype=torch.int32)
    return ForwardBatch(
        token_ids=torch.zeros(shape.rows, dtype=torch.int64),
        positions=positions,
        query_start=begins,
        context_len=lengths,
        block_tables=blocks.expand(shape.sequences, -1).contiguous(),
        slot_mapping=positions.clone(),
        sample_rows=(begins[1:].long() - 1)[:samples]
        if shape.sequences > 1
        else torch.arange(shape.rows)[:samples],
        states=_runs(shape, begins.tolist(), limits.state_slots),
    )


def _draft_rows(batch: ForwardBatch, most: int) -> DraftRows:
    """What is asked of the draft layer behind any batch. most: tokens for each sequence."""
    rows, sequences = len(batch.token_ids), len(batch.context_len)
    asked = torch.zeros((5, sequences), dtype=torch.int64)
    asked[0] = batch.query_start[1:] - 1
    asked[3] = most
    asked[4] = torch.arange(sequences)
    sources = torch.full((rows,), -1, dtype=torch.int64)
    return DraftRows(torch.zeros(rows, dtype=torch.int64), sources, asked)


def _runs(shape: WarmUpBatch, begins: list[int], slots: int) -> StateRuns | None:
    """All but the last sequence decode, from states that are as good as any."""
    if not slots:
        return None
    used = [sequence % slots for sequence in range(shape.sequences)]
    return StateRuns(begins, [*used[:-1], NO_STATE], used, shape.sequences - 1)
