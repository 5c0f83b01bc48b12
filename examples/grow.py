"""The buffer alone. One terminal: python grow.py 0. Another: python grow.py 1. Then: grow.py 2."""

import socket
import sys
import time

import torch
from torch.distributed import TCPStore

from flexpert.comm import BufferSpec, ExpertTable, make_buffer

HERE = ("127.0.0.1", 29411)

rank = int(sys.argv[1])
if rank == 0:  # without a socket of ours torch's store listens on all interfaces
    listener = socket.create_server(HERE).detach()
    store = TCPStore(*HERE, is_master=True, wait_for_workers=False, master_listen_fd=listener)
else:
    store = TCPStore(*HERE, is_master=False)
spec = BufferSpec(capacity=8, max_tokens=16, hidden=64, topk=2, dtype=torch.float32)
buffer = make_buffer(rank, spec, store=store, on_timeout="mask", timeout_s=10)
store.add("members", 1)
buffer.connect(range(rank), activate=True)  # all that came before

while True:
    members = store.add("members", 0)
    buffer.connect(range(members))  # newcomers, masked; nothing to do if there are none
    seen = buffer.barrier(bytes([members]), timeout_s=60)
    if set(seen.values()) == {bytes([members])} and len(buffer.active) + len(buffer.lost) < members:
        buffer.unmask(set(buffer.connected) - set(buffer.lost))  # all at the same barrier
        continue
    up = torch.tensor(buffer.active, dtype=torch.int32)  # two experts on each rank
    table = ExpertTable(up.repeat_interleave(2), torch.tensor([0, 1] * len(up)).int(), slots=2)
    x, ids = torch.randn(16, 64), torch.randint(2 * len(up), (16, 2))
    received = buffer.dispatch(x, ids, torch.full((16, 2), 0.5), table)
    y = buffer.combine_input(received).copy_(received.x * 2)  # both experts double their rows
    out = buffer.combine(y, received)
    right = (
        torch.allclose(out, 2 * x) if not buffer.missing_results(received) else "a rank was lost"
    )
    print(f"ranks {buffer.active}: {len(y)} rows for my experts, result {right}", flush=True)
    time.sleep(0.5)
