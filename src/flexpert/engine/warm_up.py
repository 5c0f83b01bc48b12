"""A rank computes alone before it serves: its first step with others pays for no first calls."""

from __future__ import annotations

import torch

from flexpert.comm import Buffer, CommError
from flexpert.engine.device_profile import DeviceProfile, WarmUpBatch
from flexpert.engine.epoch import PreparedEpoch
from flexpert.engine.scheduler import EngineLimits
from flexpert.engine.stopwatch import Stopwatch
from flexpert.models.batch import ForwardBatch
from flexpert.models.model_runner import ModelRunner
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
    ) -> None:
        self._runner = runner
        self._moe = moe
        self._buffer = buffer
        self._limits = limits
        self._profile = profile

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
        """Capture the decode steps, and compile all else; no expert needs to be there.

        Returns why this rank can compute nothing, or "".
        """
        try:
            watch.lap("before")
            self._compute()
            watch.lap("first steps")
            if self._buffer.capabilities.graph_capture:
                sizes = self._profile.graph_sizes(min(self._limits.max_running, self._most))
                self._runner.capture(sizes, self._limits.longest_table)
                watch.lap("graphs")
        except (CommError, RuntimeError) as error:
            return f"{type(error).__name__}: {error}"
        return ""

    def _compute(self) -> None:
        """One of each shape of products, which would otherwise be compiled while serving."""
        limits = self._limits
        context = min(limits.max_model_len, limits.blocks * limits.block_size)
        for batch in self._profile.warm_up_batches(self._most, context):
            self._runner.forward(_batch(batch, limits.block_size, limits.max_running))

    @property
    def _most(self) -> int:
        """Tokens of the largest step."""
        limits = self._limits
        return min(limits.max_tokens_per_step, limits.blocks * limits.block_size)


def _batch(shape: WarmUpBatch, block_size: int, samples: int) -> ForwardBatch:
    """In the first blocks, which nobody uses before an epoch; what several sequences have in one
    block is nothing anybody reads."""
    last = shape.rows - shape.sequences + 1
    context = max(last, shape.context)
    begins = torch.arange(shape.sequences + 1, dtype=torch.int32)
    begins[-1] = shape.rows
    lengths = torch.ones(shape.sequences, dtype=torch.int32)
    lengths[-1] = context
    positions = torch.zeros(shape.rows, dtype=torch.int64)
    positions[-last:] = torch.arange(context - last, context)
    blocks = torch.arange(-(-context // block_size), dtype=torch.int32)
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
    )
