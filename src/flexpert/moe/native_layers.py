"""A rank's layers of experts as C reads them (kernels/cpu/experts.c).

What depends on the epoch is one array, which is put in force by a single address; so a change of
members records nothing again.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from contextlib import AbstractContextManager
from typing import Any

from flexpert.comm import Buffer
from flexpert.comm.buffer import Reduce
from flexpert.kernels.cpu import ops
from flexpert.kernels.cpu.expert_products import LayerExperts
from flexpert.moe.load_counter import HostLoadCounter
from flexpert.moe.moe_layers import LayerState


class LayerTables:
    """The layers of an epoch; immutable, and keeps what its addresses lead to."""

    def __init__(
        self,
        layers: Sequence[LayerState[LayerExperts]],
        *,
        left: Container[int],
        counter: HostLoadCounter | None,
    ) -> None:
        """left: layers that are Python's."""
        self.count = len(layers)
        self._kept = tuple(layers)
        self._array = ops.ffi.new("moe_layer[]", max(self.count, 1))
        for index, state in enumerate(layers):
            if index not in left:
                _describe(self._array[index], state)
                if counter:
                    self._array[index].counts = counter.address(index)
        self.address = int(ops.ffi.cast("intptr_t", self._array))


def _describe(layer: Any, state: LayerState[LayerExperts]) -> None:
    table, products = state.table, state.experts.tables
    if products is None:
        if state.experts.slots:
            return  # of a dtype that our kernels do not know
    else:
        layer.up, layer.down = (one.table[0] for one in products)
    layer.table_rank, layer.table_slot = table.rank.data_ptr(), table.slot.data_ptr()
    layer.entries, layer.slots, layer.experts = table.experts, table.slots, table.experts
    if state.split is not None:
        layer.split = state.split.data_ptr()
        layer.period, layer.experts = state.split.shape[0], state.split.shape[1] - 1
    layer.ready = 1


class NativeLayers(AbstractContextManager[int]):
    """Entered while C walks layers (`NativeMoELayers.native`).

    step: the `moe_step *` of tables.h.
    """

    def __init__(self, buffer: Buffer, reduce: Reduce) -> None:
        self._buffer = buffer
        self._tables: LayerTables | None = None
        self._entered: AbstractContextManager[Any] | None = None
        self.step = ops.ffi.gc(ops.ffi.new("moe_step *"), ops.lib.fx_free_step)
        self.step.home = reduce == "home"
        self._address = int(ops.ffi.cast("intptr_t", self.step))

    def install(self, tables: LayerTables) -> None:
        self._tables = tables
        self.step.layers, self.step.count = tables.address, tables.count

    def __enter__(self) -> int:
        self._entered = self._buffer.native()
        exchange = self._entered.__enter__()
        if exchange is None:
            return 0
        self.step.exchange, self.step.buffer = exchange.function, exchange.buffer
        return self._address

    def __exit__(self, *raised: Any) -> None:
        assert self._entered is not None
        self._entered.__exit__(*raised)
