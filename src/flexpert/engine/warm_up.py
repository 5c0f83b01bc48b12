"""A rank computes alone before it serves: its first step with others pays for no first calls."""

from __future__ import annotations

import torch

from flexpert.comm import Buffer, CommError
from flexpert.engine.device_profile import DeviceProfile
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
            if self._buffer.capabilities.graph_capture:
                watch.lap("before")
                sizes = self._profile.graph_sizes(min(self._limits.max_running, self._most))
                self._runner.capture(sizes, self._limits.longest_table)
                watch.lap("graphs")
            self._compute()
            watch.lap("first steps")
        except (CommError, RuntimeError) as error:
            return f"{type(error).__name__}: {error}"
        return ""

    def _compute(self) -> None:
        """One of each shape of products, which would otherwise be compiled while serving."""
        block_size, samples = self._limits.block_size, self._limits.max_running
        for rows in self._profile.warm_up_sizes(self._most):
            self._runner.forward(_batch(rows, block_size, samples))

    @property
    def _most(self) -> int:
        """Tokens of the largest step."""
        limits = self._limits
        return min(limits.max_tokens_per_step, limits.blocks * limits.block_size)


def _batch(rows: int, block_size: int, samples: int) -> ForwardBatch:
    """One sequence of `rows` tokens in the first blocks, which nobody uses before an epoch."""
    count = torch.arange(rows)
    return ForwardBatch(
        token_ids=torch.zeros(rows, dtype=torch.int64),
        positions=count,
        query_start=torch.tensor([0, rows], dtype=torch.int32),
        context_len=torch.tensor([rows], dtype=torch.int32),
        block_tables=torch.arange(-(-rows // block_size), dtype=torch.int32).unsqueeze(0),
        slot_mapping=count,
        sample_rows=count[:samples],
    )
