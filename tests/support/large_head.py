"""A fake head of 64 ranks with 256 experts in each of 60 layers, all of them busy: each look at it
finds other figures."""

from __future__ import annotations

import random
import time

import msgspec

from flexpert.cluster.views import (
    BalanceView,
    ClusterEvent,
    ClusterView,
    LayerPlacement,
    LiveLoad,
    OperationView,
    PlacementView,
    RankView,
)
from flexpert.errors import RequestError
from support.fake_head import FakeHead

RANKS, EXPERTS, LAYERS = 64, 256, 60
REDUNDANT = 64  # more replicas than experts, in each layer


class LargeHead(FakeHead):
    def __post_init__(self) -> None:
        super().__post_init__()
        self.ranks = list(range(RANKS))
        self._random = random.Random(0)
        self._layers = [self._layer() for _ in range(LAYERS)]

    def _layer(self) -> dict[int, list[int]]:
        replicas = [*range(EXPERTS), *self._random.sample(range(EXPERTS), REDUNDANT)]
        each = len(replicas) // RANKS
        return {rank: replicas[rank * each : (rank + 1) * each] for rank in range(RANKS)}

    def cluster(self) -> ClusterView:
        draw = self._random.random
        ranks = [
            RankView(
                id=id,
                state="active",
                host=f"node-{id // 8}",
                pid=4000 + id,
                running=int(64 * draw()),
                waiting=int(1.2 * draw()),
                kv_used=round(draw(), 4),
                cached_blocks=int(4000 * draw()),
                experts=300,
                memory_bytes=2 << 30,
                device_memory_bytes=int((60 + draw()) * 2**30),
                over_nixl=[other for other in range(RANKS) if other // 8 != id // 8],
                wire_bytes={other: int(1e9 * draw()) for other in range(RANKS) if other % 8 == 0},
                exchanges=int(time.monotonic() * 1000),
                exchanged_bytes=int(time.monotonic() * 1e9),
                dispatch_wait_s=round(time.monotonic() / 9, 6),
                combine_wait_s=round(time.monotonic() / 7, 6),
                waited_for={other: round(draw(), 6) for other in range(RANKS)},
            )
            for id in self.ranks
        ]
        replicas = LAYERS * (EXPERTS + REDUNDANT)
        return ClusterView(
            epoch=self.epoch,
            model="large",
            max_ranks=RANKS,
            ranks=ranks,
            placement=PlacementView(
                layers=LAYERS,
                experts=EXPERTS,
                replicas=replicas,
                experts_per_rank={str(id): replicas // RANKS for id in self.ranks},
            ),
            operation=self._running_operation(),
            balance=BalanceView(
                mode="auto",
                verdict="even",
                imbalance=1 + draw(),
                imbalance_by_layer=[round(1 + draw(), 6) for _ in range(LAYERS)],
                rank_loads={id: round(0.5 + draw(), 6) for id in self.ranks},
            ),
            desired=list(self.ranks),
            cursor=self.listeners.latest,
        )

    def live_load(self) -> LiveLoad:
        return LiveLoad(int(2000 * self._random.random()), 12, RANKS)

    def layer_placement(self, layer: int) -> LayerPlacement:
        if not 0 <= layer < LAYERS:
            raise RequestError(f"layer {layer}: there are MoE layers 0 to {LAYERS - 1}")
        chosen = [self._random.expovariate(1) for _ in range(EXPERTS)]
        total = sum(chosen)
        return LayerPlacement(
            epoch=self.epoch,
            layer=layer,
            layers=LAYERS,
            experts=EXPERTS,
            held=self._layers[layer],
            loads=[round(one / total, 6) for one in chosen],
        )

    def tell_past_changes(self, count: int) -> None:
        """As many operations, as if they had been."""
        for number in range(count):
            view = OperationView(
                id=f"past-{number}",
                state="done",
                target=list(range(RANKS)),
                add=[number % RANKS],
                remove=[],
                phase="done",
                progress=1.0,
                phases={"spawn": 0.4, "load": 1.1, "migrate": 0.2, "commit": 0.02, "release": 0.1},
                epoch=number,
                created=time.time() - 8.0 * (count - number),
                pause_ms=4.5,
                moved_experts=300,
                moved_requests=7,
            )
            self._operations[view.id] = view
            event = ClusterEvent(
                kind="operation", time=view.created, data=msgspec.to_builtins(view)
            )
            self.listeners.publish(event)
