"""What a captured graph of nixl_ep's dispatch and combine holds, launched again without the host.

A replay is these launches and nothing else: no call of the buffer, so nothing is voted on, checked
or applied. That shows in Triton's interpreter what a replay on a GPU does.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from flexpert.comm.cuda.cuda_buffer import CudaBuffer
from flexpert.comm.cuda.cuda_exchange import CudaDispatched
from flexpert.comm.cuda.expert_major import ExpertMajor, pack
from flexpert.compat.nixl_ep import Buffer
from support.nixl_ep_local import (
    Input,
    Setup,
    apply_experts,
    check_combined,
    check_dispatched,
    make_input,
)

CHOICES = 3


def whole(setup: Setup, mine: Input) -> Input:
    """With as many tokens as there can be: those that are not there choose no expert."""
    missing = setup.max_tokens - len(mine.x)
    return Input(
        torch.cat([mine.x, torch.zeros(missing, setup.hidden).bfloat16()]),
        torch.cat([mine.experts, torch.full((missing, CHOICES), -1)]),
        torch.cat([mine.weights, torch.zeros(missing, CHOICES)]),
    )


def whole_inputs(setup: Setup, ids: tuple[int, ...], seed: int) -> dict[int, Input]:
    return {rank: whole(setup, make_input(setup, rank, seed, k=CHOICES)) for rank in ids}


class ReplayedLayer:
    """The launches of one layer of one rank, over tensors that stay."""

    def __init__(self, buffer: Buffer, setup: Setup) -> None:
        core = buffer.runtime
        assert isinstance(core, CudaBuffer)
        assert buffer._exchange is not None
        self.setup, self.rank, self.exchange = setup, buffer.rank, core.exchange
        tokens = setup.max_tokens
        self.x = torch.zeros(tokens, setup.hidden, dtype=torch.bfloat16)
        self.experts = torch.full((tokens, CHOICES), -1)
        self.weights = torch.zeros(tokens, CHOICES)
        self._ones = torch.ones(tokens, CHOICES)
        self._table = buffer._exchange._table
        self.out = torch.zeros_like(self.x)
        self.y = torch.empty(0, dtype=torch.bfloat16)

    def load(self, mine: Input) -> None:
        self.x.copy_(mine.x)
        self.experts.copy_(mine.experts)
        self.weights.copy_(mine.weights)

    def send_dispatch(self) -> None:
        self.sent: CudaDispatched = self.exchange.send_dispatch(
            self.x, self.experts, self._ones, self._table, wait=False
        )

    def receive_dispatch(self) -> None:
        self.exchange.wait_dispatch(self.sent)
        self.exchange.index(self.sent)
        capacity = self.setup.capacity
        limit = capacity * self.setup.max_tokens
        self.into = ExpertMajor.empty(self.exchange, self.sent, limit, capacity)
        pack(self.exchange, self.sent, self.into)
        self.y = apply_experts(self.setup, self.rank, self.into.x).view(-1, self.setup.hidden)

    def send_combine(self) -> None:
        self.exchange.share_weights(self.weights, self.sent, wait=False)
        self.exchange.send_combine(
            self.out,
            self.y,
            self.sent,
            reduce="home",
            wait=False,
            places=self.into.places,
            shared=True,
        )

    def receive_combine(self) -> None:
        self.exchange.wait_combine()
        self.exchange.reduce(
            self.out,
            self.y,
            self.sent,
            reduce="home",
            weights=self.weights,
            places=self.into.places,
            shared=True,
        )

    def check(self, sent: Mapping[int, Input]) -> None:
        """Against the oracle: exactly these ranks took part."""
        handle = self.into.token, self.into.ranges, self.setup.max_tokens, self.setup.hidden
        check_dispatched(self.setup, sent, self.rank, self.into.x, self.into.count, handle)
        check_combined(self.setup, sent[self.rank], self.out, up=set(sent))


def replay(
    layers: Mapping[int, ReplayedLayer],
    setup: Setup,
    ids: tuple[int, ...],
    seed: int,
    *,
    early: tuple[int, ...] = (),
) -> None:
    """One replay on each of these ranks, checked. early: they have sent by `send_early`."""
    sent = whole_inputs(setup, ids, seed)
    chosen = [layers[rank] for rank in ids]
    for layer in chosen:
        if layer.rank not in early:
            layer.load(sent[layer.rank])
            layer.send_dispatch()
    for layer in chosen:
        layer.receive_dispatch()
    for layer in chosen:
        layer.send_combine()
    for layer in chosen:
        layer.receive_combine()
    for layer in chosen:
        layer.check(sent)


def send_early(layer: ReplayedLayer, setup: Setup, seed: int) -> None:
    """The sending half of the replay with this seed."""
    layer.load(whole_inputs(setup, (layer.rank,), seed)[layer.rank])
    layer.send_dispatch()
