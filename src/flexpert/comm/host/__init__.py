"""The host backend: ranks that write into each other's memory, by shared memory or NIXL.

Each file keeps one invariant; `HostBuffer` only hands the calls of the contract on to them.

memory
  memfd.py, window.py   who maps a rank's memory maps the right process's, and keeps it when that
                        process ends; each connection writes into a place of its own
  process_watch.py      the end of a peer's process is noticed at once
flags and rows
  kernels.c, quant.c    nothing is accepted but the flag that is expected, no number of a peer is
                        trusted unchecked, no memory is written that is still to be read
  codes.py              Python and C mean the same by a number
links
  links.py              a link looks the same to the kernels, whatever carries it
  nixl.py, remote.py    what goes over NIXL arrives in order, and never into memory of another link
  link_memory.py        what NIXL writes can be mapped by ranks of this machine, and by no others
  gateways.py           all ranks send what a machine needs to the same rank there (pure)
calls, each file using only those above it
  arguments.py          what a caller gives is checked before anything is sent (pure)
  core.py               each call holds the lock of what it uses; one state says what may come next
  relays.py             memory of a sibling is mapped for the epoch's links, and not beyond its end
  members.py            the kernels know the links and active ids of the exchange under way
  changes.py            membership may be changed at any time, and takes effect between exchanges
  connecting.py         a peer is connected, and masked, or not connected at all
  waits.py              no wait is longer than its limit or waits for a peer that is gone, and none
                        blames a peer that waits itself
  votes.py              a step's vote ends when all active ranks have voted, and only once
  host_received.py      rows stay valid, where they arrived, until the next dispatch
  host_exchange.py      a dispatch is received and combined before the next, or the epoch is over
  native.c, native.py   what C exchanges alone is what those calls would have, and what it cannot do
                        alone is done by them
  host_buffer.py        the contract of comm/buffer.py
build_kernels.py        compiles the C files
"""
