"""`flexpert bench comm`: our exchange beside what else there is, in the same processes.

workload    sizes, routing and data; the float64 oracle
contender   what every contender does, and the list of them
ours, gloo, nixl_writes, memcpy
            the contenders; routes: the index work that the rivals share
ranks       real rank processes
run         who is checked and timed when
report, plot
            figures as a table and as a picture
cuda        the same on GPUs
"""
