"""NIXL's one-sided writes over DRAM as a baseline, used as its documentation shows it.

An inbox has a part for each peer: routing [n, 2 k] int32, then rows [n, hidden]; and another for
partial sums that come back. n travels in the notification.
"""

from __future__ import annotations

import secrets
import struct
import time
from typing import Any

import numpy as np
import torch

from flexpert.bench.comm import index_work as routes
from flexpert.bench.comm.baseline import Site, Unavailable
from flexpert.comm import CommError
from flexpert.comm.host.nixl import load

_NAP_S = 20e-6  # between polls; NIXL has no call that sleeps until something comes
_NOTE = struct.Struct("<cqq")  # phase, turn, rows
_DISPATCH, _COMBINE = b"d", b"c"


class NixlWrites:
    def __init__(self, site: Site, *, packed: bool) -> None:
        """packed: rows of a peer in one piece, else one descriptor a row.

        Raises: Unavailable
        """
        try:
            nixl = load()
        except CommError as error:
            raise Unavailable(str(error)) from error
        work = site.work
        self._site, self._work, self._packed = site, work, packed
        self._routing_bytes = 8 * work.topk
        self._part = work.tokens * (self._routing_bytes + work.row_bytes)
        self._inbox = torch.zeros(2 * work.ranks * self._part, dtype=torch.uint8)
        self._outbox = torch.zeros(2 * work.ranks * self._part, dtype=torch.uint8)
        self._name = f"bench-{site.rank}-{secrets.token_hex(8)}"
        self._agent: Any = nixl.agent(self._name, nixl.config(enable_prog_thread=False))
        own = [self._inbox, self._outbox, *(i.x for i in site.pool)]
        self._registered = self._agent.register_memory(own)
        offers = site.gather((self._name, self._agent.get_agent_metadata(), self._inbox.data_ptr()))
        self._names = [name for name, _, _ in offers]
        self._theirs = [at for _, _, at in offers]
        self._others = [rank for rank in range(work.ranks) if rank != site.rank]
        for rank in self._others:
            self._agent.add_remote_agent(offers[rank][1])
        self._notes: dict[tuple[bytes, int, int], int] = {}
        self._flying: list[Any] = []
        most = work.ranks * work.tokens * min(work.topk, work.slots)
        self._y = torch.ones((most, work.hidden), dtype=work.torch_dtype)
        self._back = torch.empty((work.ranks * work.tokens, work.hidden), dtype=work.torch_dtype)
        self._sequence = 0

    # ---- the exchange -------------------------------------------------------------------------

    def dispatch(self, turn: int) -> None:
        work, me = self._work, self._site.rank
        i = self._site.input(turn)
        self._sequence += 1
        self._out = out = routes.outgoing(i.expert_ids, work.slots, work.ranks)
        routing = torch.empty((work.tokens, 2 * work.topk), dtype=torch.int32)
        routes.pack_routing(routing, i.expert_ids, i.weights)
        tokens = torch.split(out.token, out.counts)
        for peer in self._others:
            to = tokens[peer]
            packed_routing, rows = self._parts(self._outbox, peer, len(to))
            torch.index_select(routing, 0, to, out=packed_routing)
            place = me * self._part
            if self._packed:
                torch.index_select(i.x, 0, to, out=rows)
                size = len(to) * (self._routing_bytes + work.row_bytes)
                pieces = [(packed_routing.data_ptr(), place, size)]
            else:
                first = len(to) * self._routing_bytes
                pieces = [(packed_routing.data_ptr(), place, first)]
                pieces += [
                    (i.x.data_ptr() + token * work.row_bytes, place + first + at, work.row_bytes)
                    for at, token in zip(
                        range(0, len(to) * work.row_bytes, work.row_bytes), to.tolist(), strict=True
                    )
                ]
            self._write(peer, pieces, _DISPATCH, len(to))
        counts = self._collect(_DISPATCH)
        parts = [self._parts(self._inbox, rank, counts[rank]) for rank in range(work.ranks)]
        parts[me] = (routing[tokens[me]], i.x)
        ids, weights = routes.unpack_routing(torch.cat([part for part, _ in parts]))
        self._local = routes.local_pairs(ids, weights, work.slots, me)
        counts[me] = len(tokens[me])
        self._counts = counts
        self._rows = [rows for _, rows in parts]
        self._own = tokens[me]

    def combine(self) -> torch.Tensor:
        work, me, local, out = self._work, self._site.rank, self._local, self._out
        partial = routes.sum_rows(self.y_room(), local.bags, local.starts, local.weights)
        parts = torch.split(partial, self._counts)
        area = work.ranks * self._part
        for peer in self._others:
            size = self._counts[peer] * work.row_bytes
            at = area + peer * self._part
            room = self._outbox[at : at + size].view(work.torch_dtype).view(-1, work.hidden)
            room.copy_(parts[peer])
            place = area + me * self._part
            step = size if self._packed else work.row_bytes
            pieces = [
                (room.data_ptr() + offset, place + offset, step)
                for offset in range(0, size, step or 1)
            ]
            self._write(peer, pieces, _COMBINE, self._counts[peer])
        self._collect(_COMBINE)
        back: list[torch.Tensor] = []
        for rank in range(work.ranks):
            at = area + rank * self._part
            raw = self._inbox[at : at + out.counts[rank] * work.row_bytes]
            back.append(raw.view(work.torch_dtype).view(-1, work.hidden))
        back[me] = parts[me]
        rows = self._back[: sum(out.counts)]
        torch.cat(back, out=rows)
        return routes.sum_rows(rows, out.bags, out.starts)

    def rows(self) -> torch.Tensor:
        rows = list(self._rows)
        rows[self._site.rank] = rows[self._site.rank][self._own]
        return torch.cat(rows)[self._local.token]

    def y_room(self) -> torch.Tensor:
        return self._y[: len(self._local.token)]

    def close(self) -> None:
        for rank in self._others:
            self._agent.remove_remote_agent(self._names[rank])
        self._agent.deregister_memory(self._registered)
        self._agent = None

    # ---- NIXL ---------------------------------------------------------------------------------

    def _parts(self, box: torch.Tensor, rank: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        work, at = self._work, rank * self._part
        middle = at + n * self._routing_bytes
        routing = box[at:middle].view(torch.int32).view(n, 2 * work.topk)
        rows = box[middle : middle + n * work.row_bytes].view(work.torch_dtype)
        return routing, rows.view(n, work.hidden)

    def _write(self, peer: int, pieces: list[tuple[int, int, int]], phase: bytes, n: int) -> None:
        """pieces: (own address, offset in the peer's inbox, bytes)."""
        note = _NOTE.pack(phase, self._sequence, n)
        if n == 0:
            self._agent.send_notif(self._names[peer], note)
            return
        table = np.array(pieces, dtype=np.uint64)
        zeros = np.zeros(len(pieces), dtype=np.uint64)
        source = np.stack([table[:, 0], table[:, 2], zeros], axis=1)
        target = np.stack([table[:, 1] + np.uint64(self._theirs[peer]), table[:, 2], zeros], axis=1)
        handle = self._agent.initialize_xfer(
            "WRITE",
            self._agent.get_xfer_descs(source, "DRAM"),
            self._agent.get_xfer_descs(target, "DRAM"),
            self._names[peer],
            note,
        )
        if self._agent.transfer(handle) == "ERR":
            raise CommError(f"NIXL could not write to rank {peer}")
        self._flying.append(handle)

    def _collect(self, phase: bytes) -> list[int]:
        """Wait until all peers have written and own writes are done; rows from each rank."""
        deadline = time.monotonic() + self._site.timeout_s
        desired = [(phase, self._sequence, rank) for rank in self._others]
        while True:
            for name, notes in self._agent.get_new_notifs().items():
                for note in notes:
                    kind, sequence, n = _NOTE.unpack(note)
                    self._notes[kind, sequence, self._names.index(name)] = n
            still = []
            for handle in self._flying:
                if self._agent.check_xfer_state(handle) == "PROC":
                    still.append(handle)
                else:
                    handle.release()
            self._flying = still
            if not still and all(key in self._notes for key in desired):
                counts = [0] * self._work.ranks
                for key in desired:
                    counts[key[2]] = self._notes.pop(key)
                return counts
            if time.monotonic() > deadline:
                raise CommError(f"NIXL peers did not write within {self._site.timeout_s} s")
            time.sleep(_NAP_S)
