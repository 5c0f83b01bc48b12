"""The host backend: ranks of one machine that write into each other's memory.

window.py, memfd.py   the memory a rank exports to its peers, and how they find and open it
kernels.c, quant.c    copies, sums, flags, futexes; codes.py: numbers they share with Python
links.py, nixl.py     a peer on this machine, and one that is reached over NIXL
watch.py              ends of processes

buffer.py     HostBuffer: the contract of flexpert.comm.Buffer, handed on to these, each of which
              knows only those above it:
checks.py       arguments
core.py         the kernels' struct, the locks, where this rank stands
remote.py       what is sent and taken over NIXL
members.py      links and active ids, as the kernels know them
changes.py      who is connected or to be masked: noted at any time, in force between exchanges
connecting.py   how peers come to be connected
waiting.py      waits for all that are active
votes.py        the step barrier
exchange.py     dispatch and combine; received.py, workspaces.py: what they bring, and memory for it
"""
