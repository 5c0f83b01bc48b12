"""A process of test_namespaces in a network namespace: `ip netns exec NAME python THIS FD`.

What it shall be comes through the inherited pipe, which does not cross the network.
"""

from __future__ import annotations

import sys
from datetime import timedelta
from multiprocessing.connection import Connection

import torch.distributed as dist

from support.comm_ranks import LIMIT_S, serve_rank


def serve_store(address: str, pipe: Connection) -> None:
    store = dist.TCPStore(address, 0, is_master=True, wait_for_workers=False)
    pipe.send((True, store.port))
    pipe.poll(None)  # until the test is over


def main() -> None:
    pipe = Connection(int(sys.argv[1]))
    what, *args = pipe.recv()
    if what == "store":
        serve_store(*args, pipe)
        return
    rank, spec, address, port, options = args
    limit = timedelta(seconds=LIMIT_S)
    store = dist.TCPStore(address, port, is_master=False, timeout=limit)
    serve_rank(rank, spec, 0, {**options, "store": store}, pipe)


if __name__ == "__main__":
    try:
        main()
    except (EOFError, BrokenPipeError):
        sys.exit(1)  # the test has ended
