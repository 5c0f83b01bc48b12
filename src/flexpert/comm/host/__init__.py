"""The host backend: ranks of one machine that write into each other's memory.

window.py   the memory a rank lends to its peers, and how they find and open it
kernels.c   copies, sums, flags, futexes
buffer.py   HostBuffer: the contract of flexpert.comm.Buffer on top of both
"""
