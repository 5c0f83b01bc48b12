"""One rank of a measured decode step: the engine's own path, from tokens on the host to the next.

A batch on the host becomes inputs on the GPU, a captured graph is replayed, the likeliest tokens
come back. Several ranks do so in lock-step; one whose share of a batch is empty replays, too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flexpert.bench.gpu.model import RandomModel
from flexpert.kernels.experts import Gate
from flexpert.models.batch import ForwardBatch
from flexpert.models.model_runner import ModelRunner
from flexpert.models.state_runs import NO_STATE, StateRuns
from flexpert.models.step_graphs import GraphShape, StepGraphs
from flexpert.moe.cuda.exchanged_experts import ExchangedExperts
from flexpert.moe.cuda.local_experts import LocalExperts

WARM_UP = 3
BLOCK = 16
CHECK_TOKENS = 33
CHECK_PROMPTS = 2


@dataclass(slots=True)
class _Counting:
    """Notes, while asked to, which experts get a token."""

    moe: LocalExperts | ExchangedExperts
    experts: int
    counting: bool = False
    active: list[Tensor] = field(default_factory=list)

    def expect(self, tokens: int, mean_tokens: int = 0) -> None:
        self.moe.expect(tokens, mean_tokens)

    def forward(
        self, layer: int, x: Tensor, expert_ids: Tensor, weights: Tensor, apply_gate: Gate
    ) -> Tensor:
        if self.counting:
            count = torch.bincount(expert_ids.flatten(), minlength=self.experts)
            self.active.append((count > 0).cpu())
        return self.moe.forward(layer, x, expert_ids, weights, apply_gate)

    def forward_added(
        self,
        layer: int,
        x: Tensor,
        expert_ids: Tensor,
        weights: Tensor,
        residual: Tensor,
        apply_gate: Gate,
    ) -> Tensor | None:
        if self.counting or not isinstance(self.moe, LocalExperts):
            return None
        return self.moe.forward_added(layer, x, expert_ids, weights, residual, apply_gate)


def check_prompts(vocab: int, seed: int, tokens: int = CHECK_TOKENS) -> Tensor:
    """[prompts, tokens], the same wherever they are asked for."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocab, (CHECK_PROMPTS, tokens), generator=draw)


class DecodeRank:
    """A shard with a cache that holds the largest of its batches, and its graphs.

    Args:
        batches: sequences of this rank.
        longest: tokens of a sequence.
        settle: raises what exchanges have reported; called after each step.
    """

    def __init__(
        self,
        model: RandomModel,
        moe: LocalExperts | ExchangedExperts,
        batches: Sequence[int],
        longest: int,
        *,
        settle: Callable[[], object] = lambda: None,
    ) -> None:
        self.model = model
        self.runtime = _Counting(moe, model.info.experts)
        self.device = next(iter(model.weights.values())).device
        self._settle = settle
        self.width = -(-max(longest, CHECK_TOKENS + 1) // BLOCK)
        largest = max(*batches, CHECK_PROMPTS)
        self.runner: ModelRunner = model.runner(
            moe,
            kv_blocks=largest * self.width,
            kv_block_size=BLOCK,
            state_slots=2 * largest if model.info.states else 0,
            runtime=self.runtime,
        )
        for cache in (*self.runner.kv.layers, *(kept.values() for kept in self.runner.kv.states)):
            for tensor in cache:
                tensor.normal_()
        self._odd = False  # which of each sequence's two slots has its states
        self.tables = torch.randperm(largest * self.width).int().view(-1, self.width)
        began = time.perf_counter()
        sizes = sorted({*batches, CHECK_PROMPTS} - {0})
        self.runner.capture([GraphShape(size, size) for size in sizes], self.width)
        self._wait()
        self.capture_s = time.perf_counter() - began

    @property
    def graphs(self) -> StepGraphs:
        assert self.runner.graphs is not None  # captured at the start
        return self.runner.graphs

    def logits(self, prompts: Tensor) -> Tensor:
        """[prompts, vocab] of the last tokens: all others at once, the last by a graph."""
        self._step(self.batch_of(prompts[:, :-1].tolist(), 0))
        last = self.batch_of(prompts[:, -1:].tolist(), prompts.shape[1] - 1)
        if not self.graphs.fits(last):
            raise AssertionError("a decode step that no graph was captured for")
        return self._step(last).clone()

    def idle(self, steps: int) -> None:
        """Take part in others' steps."""
        for _ in range(steps):
            self.runner.forward_idle()
            self._settle()

    def active(self, batch: int, context: int) -> Tensor:
        """[layers, experts] bool: which experts get a token of a step, walked module by module."""
        graphs, self.runner.graphs = self.graphs, None
        self.runtime.counting, self.runtime.active = True, []
        try:
            self._step(self.batch_of(self._tokens(batch), context) if batch else None)
        finally:
            self.runtime.counting, self.runner.graphs = False, graphs
        return torch.stack(self.runtime.active)

    def times_us(self, batch: int, context: int, steps: int) -> list[float]:
        """From one step's tokens to the next."""
        tokens = self._tokens(batch)
        times = []
        for step in range(WARM_UP + steps):
            prepared = self.batch_of(tokens, context + step) if batch else None
            self._wait()
            began = time.perf_counter()
            logits = self._step(prepared)
            chosen = logits.argmax(dim=-1).tolist()
            times.append((time.perf_counter() - began) * 1e6)
            tokens = [[token] for token in chosen]
        return times[WARM_UP:]

    def _step(self, batch: ForwardBatch | None) -> Tensor:
        """[M, vocab] logits; of nothing, [0, vocab]."""
        if batch is None:
            self.runner.forward_idle()
            self._settle()
            return torch.empty((0, self.model.info.vocab))
        logits = self.runner.forward(batch)
        self._settle()
        return logits

    def _tokens(self, batch: int) -> list[list[int]]:
        return torch.randint(0, self.model.info.vocab, (batch, 1)).tolist()

    def batch_of(self, tokens: list[list[int]], begin: int) -> ForwardBatch:
        """As many tokens of each sequence, at `begin` and on; logits of each one's last."""
        each = len(tokens[0])
        sequences = len(tokens)
        positions = torch.arange(begin, begin + each)
        tables = self.tables[:sequences]
        slots = tables[:, positions // BLOCK].long() * BLOCK + positions % BLOCK
        ends = torch.arange(1, sequences + 1) * each
        runs = None
        if self.model.info.states:
            runs = self._runs(sequences, each, begins=begin == 0)
        return ForwardBatch(
            token_ids=torch.tensor(tokens).flatten(),
            positions=positions.repeat(sequences),
            query_start=torch.cat([torch.zeros(1), ends]).int(),
            context_len=torch.full((sequences,), begin + each, dtype=torch.int32),
            block_tables=tables,
            slot_mapping=slots.flatten(),
            sample_rows=ends - 1,
            states=runs,
        )

    def _runs(self, sequences: int, each: int, *, begins: bool) -> StateRuns:
        """The states behind the step before are read; it was the last batch that was made."""
        now, self._odd = self._odd, not self._odd
        sources = [NO_STATE if begins else 2 * one + now for one in range(sequences)]
        targets = [2 * one + (not now) for one in range(sequences)]
        rows = range(0, (sequences + 1) * each, each)
        return StateRuns(rows, sources, targets, sequences if each == 1 and not begins else 0)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
